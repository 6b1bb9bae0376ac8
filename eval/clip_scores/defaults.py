"""Default prompts for a comparison without ``--prompts``: they fit the first run's training images.

The first of the following that is available is used:

1. the shipped prompts for the paper's or the miniature's images, if the run learned them:
   ``3d_icon`` for icons in their own colors, or the held-out captions for icons in other colors and
   for animals;
2. the captions of its held-out images, if there are at least two different ones; these images are
   then the ground truth;
3. its instance prompt or trigger word in the contexts of ``eval/prompts/contexts.txt``, because
   scores over one or two validation prompts are too noisy;
4. its validation prompts;
5. the captions of its training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import counted
from bilora_diffusion.image.captions import add_trigger
from bilora_diffusion.image.derived import ICONS
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.run.data import choose_samples

from ..subjects import Subject
from .prompts import CONTEXTS, FOLDER, ICON_PROMPTS, Prompt, instance_of, numbered_lines, read

# Maximum number of held-out captions. With two checkpoints and two seeds, they take 256 images.
MAX_HELDOUT_PROMPTS = 64
# Maximum number of training captions; it equals the number of contexts.
MAX_TRAINING_PROMPTS = 20
# Placeholder of the instance prompt in a context
PLACE = "{prompt}"
FIX = "give --prompts, a text file with a prompt on each line"

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """The prompts of a comparison."""

    # Name of the prompt set, for the first printed line and the report
    name: str
    # Scored prompts; `settings.question` adds the general ones.
    prompts: Sequence[Prompt]
    # Whether the first run learned shipped images, to which the shipped general prompts belong;
    # without a run, whether the base model is a miniature
    is_of_icons: bool = False
    # Sentences that the report shows above the scores; "" for none
    note: str = ""


def of_subjects(subjects: Sequence[Subject], base: str) -> Question:
    """Choose the prompts for the first run.

    The note names the runs that would get different prompts if they were scored alone.

    Args:
        subjects: all scored subjects. Only run folders have a record of their training.
        base: the base model. If there is no run folder, a miniature gets the prompts of its icons.

    Raises:
        UserError: there is no run folder and the base model is not a miniature; or the first run
            has no prompts or captions, or its images can't be opened.
    """
    runs = _runs(subjects)
    if not runs:
        if base in mini.PIPELINES:
            return _icons(ICON_PROMPTS)
        raise UserError(f"no run folder is given, so the training images are unknown: {FIX}.")
    question = _of_run(runs[0])
    texts = [prompt.text for prompt in question.prompts]
    different = []
    for run in runs[1:]:
        try:
            run_texts = [prompt.text for prompt in _of_run(run).prompts]
        except UserError:  # it has no prompts, or its images are gone
            run_texts = []
        if run_texts != texts:
            different.append(_name(run))
    if not different:
        return question
    note = (
        f"All prompts come from {_name(runs[0])}; scored alone, {', '.join(different)} would get"
        " other prompts or none."
    )
    return replace(question, note=f"{question.note} {note}".strip())


def in_contexts(subjects: Sequence[Subject]) -> Question:
    """Put the first run's instance prompt into the shipped contexts (``--prompts contexts``).

    Raises:
        UserError: there is no run folder, or the run has no instance prompt or trigger word.
    """
    runs = _runs(subjects)
    if not runs:
        raise UserError(
            f"--prompts {CONTEXTS} needs the instance prompt of a run: give a run folder."
        )
    name = _name(runs[0])
    prompts = _contexts(_concepts(runs[0]))
    if not prompts:
        raise UserError(
            f"--prompts {CONTEXTS} needs an instance prompt or a trigger word, and {name} was"
            " trained with neither: give a prompt file."
        )
    return Question(f"instance prompt of {name} in contexts", prompts, _icon_set(runs[0]) != "")


def learned_icons(subjects: Sequence[Subject], base: str) -> bool:
    """Return whether the first run learned the paper's or the miniature's images.

    Without a run, return whether the base model is a miniature.

    Args:
        subjects: all scored subjects.
        base: the base model, which decides if there is no run folder.
    """
    runs = _runs(subjects)
    if runs:
        return _icon_set(runs[0]) != ""
    return base in mini.PIPELINES


def _runs(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the subjects that are run folders, each folder once."""
    runs: dict[Path, Subject] = {}
    for subject in subjects:
        if subject.folder is not None:
            runs.setdefault(subject.folder, subject)
    return list(runs.values())


def _icon_set(run: Subject) -> str:
    """Return the name of the prompt set for the paper's or a miniature's images; "" for others."""
    datasets = {_text(concept, "dataset_name") for concept in _concepts(run)}
    if datasets <= {ICONS, mini.MINI}:
        return ICON_PROMPTS
    # For icons in other colors and for animals, other pictures are the ground truth.
    if len(datasets) == 1:
        heldout = mini.heldout_name(str(datasets.pop()))
        if heldout in mini.FOLDERS:
            return heldout
    return ""


def _of_run(run: Subject) -> Question:
    """Choose the prompts of one run, in the order of the module docstring."""
    name = _name(run)
    concepts = _concepts(run)
    if icon_set := _icon_set(run):
        return _icons(icon_set)
    heldout, num_left_out = _heldout(run, concepts)
    # A single caption usually belongs to all pictures, so it describes no particular one.
    if len(heldout) > 1:
        title = f"held-out captions of {name}, whose pictures are the ground truth"
        if len(heldout) > MAX_HELDOUT_PROMPTS:
            title = f"the first {MAX_HELDOUT_PROMPTS} of {len(heldout)} {title}"
        note = ""
        if num_left_out:
            note = (
                f"{name} has {counted(num_left_out, 'held-out image')} that have no caption of"
                " their own or are not local files, so no sample is compared with them: give a"
                " folder of images, each with a caption (docs/data.md)."
            )
        return Question(title, heldout[:MAX_HELDOUT_PROMPTS], note=note)

    note = ""
    if any(_text(concept, "validation_dataset") for concept in concepts):
        note = (
            f"The held-out images of {name} have no captions of their own (two different ones are"
            " needed) or are not local files, so no sample is compared with them: give a folder of"
            " images, each with a caption (docs/data.md)."
        )
    contexts = _contexts(concepts)
    if contexts:
        return Question(f"instance prompt of {name} in contexts", contexts, note=note)
    validation = []
    for text in run.record["config"].get("validation_prompts") or []:
        if text.strip():
            validation.append(Prompt(text.strip(), instance_of(text)))
    if validation:
        return Question(f"validation prompts of {name}", _distinct(validation), note=note)

    # The training images are opened last, because a dataset may have to be downloaded from the hub.
    captions: list[Prompt] = []
    for concept in concepts:
        dataset = _text(concept, "dataset_name") or _text(concept, "instance_data_dir")
        if dataset is not None:
            images = _open(run, concept, dataset, _text(concept, "dataset_config_name"))
            captions += _caption_prompts(images, concept, with_pictures=False)
    captions = _distinct(captions)
    if not captions:
        raise UserError(
            f"{name} has no held-out captions, instance prompt, validation prompts or training"
            f" captions: {FIX}."
        )
    title = f"training captions of {name}"
    return Question(title, captions[:MAX_TRAINING_PROMPTS], note=note)


def _icons(name: str) -> Question:
    """Return a shipped prompt set: all of ``3d_icon``, or the first prompts of a held-out set."""
    prompts = read(name)
    if name != ICON_PROMPTS:
        prompts = prompts[:MAX_HELDOUT_PROMPTS]
    return Question(name, prompts, is_of_icons=True)


def _heldout(run: Subject, concepts: Sequence[Config]) -> tuple[list[Prompt], int]:
    """Read the captions of the run's held-out images; each prompt gets the first of its images.

    Returns:
        The distinct captions as prompts, and the number of images without a caption or without a
        file of their own.
    """
    prompts: list[Prompt] = []
    num_images = 0
    for concept in concepts:
        dataset = _text(concept, "validation_dataset")
        if dataset is None:
            continue
        images = _open(run, concept, dataset)
        # Only the images that the run used for its held-out loss
        names = images.names()
        limit = run.record["config"].get("max_eval_samples")
        measured_images = images.only(choose_samples(names, limit))
        num_images += len(measured_images)
        prompts += _caption_prompts(measured_images, concept, with_pictures=True)
    return _distinct(prompts), num_images - len(prompts)


def _caption_prompts(images: ImageSet, concept: Config, with_pictures: bool) -> list[Prompt]:
    """Return the captions of images as prompts, with the trigger word that the run added.

    Args:
        images: the images; those without a caption are skipped.
        concept: options of the images' concept.
        with_pictures: whether each prompt gets the path of its image. Images of a hub dataset,
            which have no files, are then skipped.
    """
    prompts = []
    for entry in images.entries:
        if entry.caption is None:
            continue
        text = add_trigger(entry.caption, _text(concept, "trigger_word")).strip()
        file = None
        if with_pictures:
            file = entry.encoded_image()
            if isinstance(file, bytes):
                continue
        prompts.append(Prompt(text, instance_of(text), file))
    return prompts


def _contexts(concepts: Sequence[Config]) -> list[Prompt]:
    """Put each concept's instance prompt, or its trigger word, into the contexts.

    "a TOK icon, in the style of TOK" becomes "a TOK icon in fresh snow, in the style of TOK". With
    many concepts, each gets fewer contexts, so that there are about `MAX_HELDOUT_PROMPTS` prompts
    in total.
    """
    contexts = numbered_lines(FOLDER / f"{CONTEXTS}.txt", CONTEXTS)
    count = max(1, MAX_HELDOUT_PROMPTS // len(concepts))
    prompts = []
    for concept in concepts:
        trigger = _text(concept, "trigger_word")
        plain = _text(concept, "instance_prompt") or trigger
        if plain is None:
            continue
        # The context goes before the first comma, and the style usually follows that comma.
        head, comma, tail = plain.partition(",")
        for _, context in contexts[:count]:
            placed = context.replace(PLACE, head.strip())
            text = add_trigger(f"{placed}{comma}{tail}", trigger)
            prompts.append(Prompt(text, context.replace(PLACE, "").strip()))
    return _distinct(prompts)


def _open(run: Subject, concept: Config, dataset: str, config_name: str | None = None) -> ImageSet:
    """Open a set of images; its columns and captions are read with the run's options."""
    try:
        return open_images(
            dataset,
            image_column=_text(concept, "image_column") or "image",
            caption_column=_text(concept, "caption_column"),
            config_name=config_name,
            cache_dir=_text(concept, "cache_dir"),
            skip_bad_images=True,
        )
    except UserError as error:
        raise UserError(
            f"the images of {_name(run)} can't be opened to read their captions"
            f" ({str(error).rstrip('.')}): {FIX}."
        ) from error


def _concepts(run: Subject) -> list[Config]:
    """Return the options of each concept of a run; one entry for a run without concepts."""
    config = run.record["config"]
    return [{**config, **concept} for concept in config.get("concepts") or [{}]]


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Drop prompts whose text is repeated; the first one is kept."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def _text(config: Config, name: str) -> str | None:
    """Return the value of a text option; None if it is blank or not a string."""
    value = config.get(name)
    if isinstance(value, str) and value.strip():
        return value
    return None


def _name(run: Subject) -> str:
    return Path(str(run.folder)).resolve().name
