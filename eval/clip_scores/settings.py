"""Command-line options and the settings that follow from them; all are checked before any image is
generated.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_diffusion import mini
from bilora_diffusion.config.lora_sources import SAMPLING_OPTION, parse_lora_source
from bilora_diffusion.config.machine import default_precision, require
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import like, option
from bilora_diffusion.core.values import (
    ADAPTER_GUIDANCE,
    BASE_PRECISIONS,
    EVALUATED_STRENGTH,
    GUIDANCES,
    NF4,
    NOISES,
    SAMPLER_STEPS,
    SIDES,
    STRENGTHS,
    WORKERS,
)
from bilora_diffusion.image.base_model import BaseModel, read_base_model
from bilora_diffusion.image.config import require_unconditional
from bilora_diffusion.image.options import ImageOptions

from ..checkpoints import HELP
from ..command import COUNTS, read_integers
from ..sampler import RunSampler, sampler_of_runs
from ..sources import BASE
from ..subjects import Subject
from .prompts import CONTEXTS, GENERAL, read

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from .defaults import Question
    from .sampling import Sampling

DEMO = Path("demo")
SCORERS = "embedded, open_clip:MODEL/TAG or open_clip:FOLDER"
CAPTIONERS = "embedded or blip:ID_OR_FOLDER"
IMAGE_MODELS = "dinov2:ID_OR_FOLDER, such as dinov2:facebook/dinov2-base"
BLIP = "Salesforce/blip-image-captioning-large"
GENERAL_SCORER = "open_clip:ViT-L-14/openai"
GENERAL_CAPTIONER = f"blip:{BLIP}"
# --mixed_precision -> torch's name of the dtype
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
EMBEDDED = "embedded"
NONE = "none"
MINI_GUIDANCE = 4.0
USUAL = "(default: the usual value for the model)"


@dataclass(frozen=True)
class ScoringOptions:
    """Prompts, scores and comparison."""

    section = "prompts and models"
    prompts: str | None = option(
        None,
        'Prompts: a shipped set; a text file; a CSV file with the column "prompt"; held-out images'
        " with captions (mini-heldout, mini-duotone-heldout or a folder), which are then the ground"
        " truth; or contexts, which puts the first run's instance prompt or trigger word into 20"
        " contexts. The default follows from the first run's training; see below.",
    )
    general_prompts: str | None = option(
        None,
        "Prompt set for measuring drift, such as general; none skips drift (default: general if the"
        " first run learned shipped images, otherwise none).",
    )
    max_prompts: int | None = option(
        None, "Use only the first prompts of each set: at most this number.", range=COUNTS
    )
    seeds: str = option("0,1", "Seeds of the initial noise, such as 0,1 or 0..3.")
    base_model: str | None = option(
        None, "Hub id, folder or mini (default: the base model that the adapters name)."
    )
    scorer: str | None = option(None, f"Model that scores: {SCORERS}.")
    captioner: str | None = option(None, f"Model that captions images for T2T: {CAPTIONERS}.")
    image_model: str | None = option(
        None,
        f"{IMAGE_MODELS}: also measure the likeness to held-out and training pictures by its"
        " embeddings, which distinguish similar subjects better than CLIP's.",
    )
    skip_captions: bool = option(False, "Skip captions and T2T.")
    control: str | None = option(
        None,
        "Label to compare with (default: the first one that is not the base model; with --steps,"
        " the first run's last step).",
    )
    train_data: str | None = option(
        None, "Training images for memorization; none skips it (default: each run's own images)."
    )
    steps: str | None = option(None, HELP)


@dataclass(frozen=True)
class SamplingOptions:
    """Options of the sampled images."""

    section = "images"
    num_inference_steps: int | None = option(None, f"Sampler steps {USUAL}.", range=SAMPLER_STEPS)
    guidance_scale: float | None = option(
        None,
        "Classifier-free guidance scale (default: the usual value for the model, 4 for the"
        " miniature; no guidance if all adapters were trained with --guided_target).",
        range=GUIDANCES,
    )
    # `usual_guidance_from` chooses the default.
    guidance_from: float | str | None = like(
        ImageOptions,
        "validation_guidance_from",
        default=None,
        help="Model of guidance's unconditional prediction: adapter (the adapted model, as in other"
        " programs), base (the base model), or a number between 0 and 1 (the adapter's strength in"
        " that prediction). Default: 0.5, or adapter if there is no guidance, or an adapter is"
        " merged or can't be scaled.",
        ignored=(),
    )
    sampling_lora: str | None = option(
        None,
        "LoRA file (FILE or FILE:STRENGTH) that is applied to all images, including those of the"
        " base model, such as Lightning; none for no file. Default: the LoRA file, scheduler, steps"
        " and guidance of the runs' validation images, if all runs have the same ones.",
    )
    sampling_scheduler: str | None = option(
        None,
        "Scheduler, as in training (docs/options.md); none for the model's own. Default: see"
        " --sampling_lora.",
    )
    resolution: int | None = option(None, f"Side of the images in pixels {USUAL}.", range=SIDES)
    adapter_scale: float = option(1.0, "Strength of each adapter.", range=STRENGTHS)
    batch_size: int = option(
        16, "Number of images that are generated before they are written to disk.", range=COUNTS
    )
    processes: int | None = option(
        None,
        "Number of processes on one device (default: one per core for the miniature on a CPU,"
        " otherwise 1).",
        range=WORKERS,
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, mps (default: accelerate's choice).")
    dtype: str | None = option(
        None,
        "Dtype of the denoiser and the text encoders (default: the best one for the device).",
        choices=tuple(PRECISIONS.values()),
    )
    base_precision: str | None = option(
        None,
        "Merge each adapter into the denoiser and round its linear weights to 8 to 2 bits,"
        " with a scale for each output, or to NF4. The rounded layers are those of --quantize nf4"
        " (default: no merging and no rounding).",
        choices=BASE_PRECISIONS,
    )
    weight_noise: float = option(
        0.0,
        "Standard deviation of Gaussian noise on the same weights, in units of each base weight's"
        " standard deviation. Adapters are merged, and all get the same noise before any rounding.",
        range=NOISES,
    )


def read_seeds(text: str) -> list[int]:
    """Read seeds such as ``0,1`` or ``0..3``.

    Raises:
        UserError: the text is something else, or a seed is negative or repeated.
    """
    seeds = read_integers(text, f'--seeds is "{text}"')
    if min(seeds) < 0:
        raise UserError(f'--seeds is "{text}": give numbers of at least 0, such as 0,1 or 0..3.')
    return seeds


def base_model(subjects: Sequence[Subject], name: str | None) -> str:
    """Return the base model that all subjects share.

    Args:
        subjects: all scored subjects.
        name: value of ``--base_model``. It is required if no subject names its base model, and may
            be a local copy of the hub model that the subjects name.

    Raises:
        UserError: the base model is unknown, the subjects have different ones, or ``name`` is
            another one.
    """
    subject_of: dict[str, Subject] = {}  # path or hub id of a base model -> its first subject
    for subject in subjects:
        if subject.base_model is not None:
            subject_of.setdefault(_place(subject.base_model), subject)
    if len(subject_of) > 1:
        first, second = list(subject_of.values())[:2]
        raise UserError(
            f'"{first.label}" was trained on {first.base_model} and "{second.label}" on'
            f" {second.base_model}: compare adapters of one base model."
        )
    if name is None and not subject_of:
        raise UserError("no adapter names its base model: give --base_model.")
    # At this point, there is at most one base model.
    for place, subject in subject_of.items():
        if name is None:
            name = str(subject.base_model)
        # A hub id has a slash. The content of a local copy is not compared with the hub's.
        is_copy = Path(name).is_dir() and "/" in place and not Path(place).is_dir()
        if place != _place(name) and not is_copy:
            raise UserError(
                f'"{subject.label}" was trained on {subject.base_model}, not on {name}: remove'
                f" --base_model, or give {subject.base_model}."
            )
    return mini.find_embedded(str(name)) or str(name)


def _place(base_model: str) -> str:
    """Return the resolved path of a base model's folder, or its hub id."""
    from bilora_diffusion.image.pipeline import resolve

    folder = Path(resolve(base_model)).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base_model


def models(args: Namespace, base: str) -> tuple[str, str | None]:
    """Return the names of the scorer and of the captioner, which is None if none is used.

    Raises:
        UserError: an embedded model was chosen for a base model that is no miniature.
    """
    is_miniature = base in mini.PIPELINES
    names = {}
    for flag, general_name in (("scorer", GENERAL_SCORER), ("captioner", GENERAL_CAPTIONER)):
        default = EMBEDDED if is_miniature else general_name
        names[flag] = getattr(args, flag) or default
        if names[flag] == EMBEDDED and not is_miniature:
            raise UserError(
                f"--{flag} embedded knows only the miniature's icons, and the base model is"
                f' "{base}": use another, such as {general_name}.'
            )
    if args.skip_captions:
        return names["scorer"], None
    return names["scorer"], names["captioner"]


def question(args: Namespace, subjects: Sequence[Subject], base: str) -> Question:
    """Choose the scored and the general prompts, from the flags or the first run's training."""
    from . import defaults

    if args.prompts is None:
        default = defaults.of_subjects(subjects, base)
    elif args.prompts == CONTEXTS:
        default = defaults.in_contexts(subjects)
    else:
        # This depends on the runs, not on the given prompts.
        is_of_icons = defaults.learned_icons(subjects, base)
        default = defaults.Question(Path(args.prompts).name, read(args.prompts), is_of_icons)
    general_set = args.general_prompts or (GENERAL if default.is_of_icons else NONE)
    # A general set that is given as --prompts is scored like any other.
    prompts = [replace(prompt, general=False) for prompt in default.prompts[: args.max_prompts]]
    if general_set != NONE:
        for prompt in read(general_set)[: args.max_prompts]:
            prompts.append(replace(prompt, general=True))
    return replace(default, prompts=prompts)


def sampling(args: Namespace, base: str, subjects: Sequence[Subject] = ()) -> Sampling:
    """Make the sampling parameters from the flags, the runs, and the base model's defaults.

    Args:
        args: the command's options.
        base: the base model.
        subjects: all sampled subjects. If every adapter was trained with ``--guided_target``, the
            default is no guidance.
    """
    from .sampling import Sampling

    model = read_base_model(base)
    steps, guidance = usual(model)
    if args.guidance_from in (None, ADAPTER_GUIDANCE) and needs_no_guidance(subjects):
        guidance = model.family.unguided_scale
    sampler = run_sampler(args, subjects)
    steps, guidance = sampler.usual(steps, guidance)
    steps = args.num_inference_steps or steps
    if args.guidance_scale is not None:
        guidance = args.guidance_scale
    check_perturbation(args)
    guidance_from = args.guidance_from
    if guidance_from is None:
        is_guided = model.family.is_guided(guidance, model.index, model.configs)
        guidance_from = usual_guidance_from(args, subjects) if is_guided else ADAPTER_GUIDANCE
    elif guidance_from != ADAPTER_GUIDANCE:
        request = f"--guidance_from {guidance_from}"
        require_unconditional(model.family, guidance, model.index, model.configs, request)
    if sampler.scheduler is not None:
        from bilora_diffusion.image.schedulers import check_scheduler

        check_scheduler(sampler.scheduler, model.configs["scheduler"], [steps])
    return Sampling(
        base_model=base,
        size=args.resolution or model.side,
        steps=steps,
        guidance_scale=guidance,
        scale=args.adapter_scale,
        dtype=args.dtype or PRECISIONS[default_precision()],
        guidance_from=guidance_from,
        base_precision=args.base_precision,
        weight_noise=args.weight_noise,
        lora=sampler.lora,
        scheduler=sampler.scheduler,
    )


def check_perturbation(args: Namespace) -> None:
    """Raise UserError if the weights can't be perturbed with these options."""
    if args.base_precision == NF4:
        require("bitsandbytes>=0.50", "--base_precision nf4")  # older versions need CUDA
    flag = "--base_precision" if args.base_precision else "--weight_noise"
    if is_perturbed(args) and args.guidance_from not in (None, ADAPTER_GUIDANCE):
        raise UserError(
            f"{flag} merges the adapter into the base weights, but --guidance_from"
            f" {args.guidance_from} weakens the adapter in the unconditional prediction: remove"
            " one of the two."
        )


def is_perturbed(args: Namespace) -> bool:
    """Return whether the adapters are merged into rounded or noisy weights."""
    return args.base_precision is not None or args.weight_noise > 0


def usual_guidance_from(args: Namespace, subjects: Sequence[Subject]) -> float | str:
    """Return the default of ``--guidance_from`` for subjects that are sampled with guidance.

    All subjects get the same value: "adapter" if any of them has no adapter that can be scaled.
    """
    if is_perturbed(args) or any(subject.is_whole_model for subject in subjects):
        return ADAPTER_GUIDANCE
    return EVALUATED_STRENGTH


def run_sampler(args: Namespace, subjects: Sequence[Subject]) -> RunSampler:
    """Return the LoRA file and scheduler of the flags; without these flags, the runs' sampler."""
    if args.sampling_lora is None and args.sampling_scheduler is None:
        adapters = [subject for subject in subjects if subject.kind != BASE]
        return sampler_of_runs([subject.record.get("config", {}) for subject in adapters])
    lora = None
    if args.sampling_lora not in (None, NONE):
        lora = parse_lora_source(SAMPLING_OPTION, args.sampling_lora)
    scheduler = None if args.sampling_scheduler == NONE else args.sampling_scheduler
    return RunSampler(lora, scheduler)


def needs_no_guidance(subjects: Sequence[Subject]) -> bool:
    """Return whether all adapters were trained towards guidance (``--guided_target``)."""
    adapters = [subject for subject in subjects if subject.kind != BASE]
    return bool(adapters) and all(subject.guided_target > 1 for subject in adapters)


def strength_note(args: Namespace, sampling: Sampling) -> str:
    """Return a note if the default strength of ``--guidance_from`` is used; "" otherwise."""
    if args.guidance_from is not None or sampling.guidance_from == ADAPTER_GUIDANCE:
        return ""
    return (
        "In guidance's unconditional prediction, adapters have a strength of"
        f" {EVALUATED_STRENGTH:g}, which preserves more of a style. To sample as other programs do,"
        " give --guidance_from adapter."
    )


def guidance_note(args: Namespace, subjects: Sequence[Subject]) -> str:
    """Return a note if the default guidance scale does not suit every subject; "" otherwise."""
    guided = [subject.label for subject in subjects if subject.guided_target > 1]
    if args.guidance_scale is not None or not guided or needs_no_guidance(subjects):
        return ""
    return (
        f"{', '.join(guided)}: trained towards guidance (--guided_target) and meant to be sampled"
        " without it. All images here use the default guidance: also compare without guidance"
        " (--guidance_scale 1, or 0 for Z-Image and Krea 2)."
    )


def usual(model: BaseModel) -> tuple[int, float]:
    """Return the default number of steps and guidance scale for a base model."""
    steps, guidance = model.usual_sampling
    if model.name in mini.PIPELINES:
        guidance = MINI_GUIDANCE
    return steps, guidance
