"""What a comparison is made of, decided and checked before anything is generated."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from bilora_diffusion import mini
from bilora_diffusion.config.resolve import MINI, default_precision, pipeline_side
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import load_pipeline, resolve
from bilora_diffusion.image.sources import ImageSet
from bilora_diffusion.run import runlog

from ..groups import control
from . import adapters as adapter_files
from . import prompts as prompt_sets
from . import trained_on
from .adapters import Adapter
from .names import DEMO, GENERAL_CAPTIONER, GENERAL_SCORER, PRECISIONS
from .prompts import Prompt
from .store import Job, Sampling, jobs

BASE, EMBEDDED, NONE = "base", "embedded", "none"
DEMO_METHODS = ("lora", "bilora")
MINI_GUIDANCE, SDXL_GUIDANCE = 4.0, 5.0

Key = tuple[int, int, int]
"""Adapter and prompt by position, and seed."""


@dataclass(frozen=True)
class Plan:
    """A comparison to be made.

    Args:
        adapters: the columns.
        control: position of the adapter that the others are compared with; None without another.
        prompts: those that are scored, then the general ones.
        prompt_set: its name for the report.
        seeds: of the initial noise.
        sampling: how images are made.
        scorer, captioner: names; no captioner for no T2T.
        training: adapter's position -> the images that it may have memorized.
        notes: sentences that a reader of the result has to know.
    """

    adapters: list[Adapter]
    control: int | None
    prompts: list[Prompt]
    prompt_set: str
    seeds: list[int]
    sampling: Sampling
    scorer: str
    captioner: str | None
    training: dict[int, ImageSet]
    notes: list[str]

    def jobs(self) -> dict[Key, Job]:
        """The image of each adapter, prompt and seed; adapters with equal weights share theirs.

        Scored and general prompts are numbered apart, so that a change in one set leaves the
        images of the other as they are.
        """
        table: dict[Key, Job] = {}
        for general in (False, True):
            numbers = [i for i, prompt in enumerate(self.prompts) if prompt.general == general]
            chosen = [self.prompts[i] for i in numbers]
            for position, adapter in enumerate(self.adapters):
                made = jobs([self.adapters[self.first(adapter)]], chosen, self.seeds)
                keys = ((position, i, seed) for i, seed in product(numbers, self.seeds))
                table |= dict(zip(keys, made, strict=True))
        return table

    def references(self) -> dict[tuple[int, int], Job]:
        """The base model's image of each general prompt (by position) and seed, for drift."""
        numbers = [i for i, prompt in enumerate(self.prompts) if prompt.general]
        base = next((a for a in self.adapters if a.kind == BASE), None)
        base = base or adapter_files.parse([BASE])[0]
        made = jobs([base], [self.prompts[i] for i in numbers], self.seeds)
        return dict(zip(product(numbers, self.seeds), made, strict=True))

    def first(self, adapter: Adapter) -> int:
        """Position of the first adapter with the same weights."""
        return next(
            i
            for i, other in enumerate(self.adapters)
            if (other.kind == BASE, other.digest) == (adapter.kind == BASE, adapter.digest)
        )

    @property
    def on_miniature(self) -> bool:
        """Whether the base model is the embedded miniature."""
        return is_miniature(self.sampling.base_model)


def make(args: Namespace) -> Plan:
    """The plan that the command line describes.

    Raises:
        UserError: bad input; nothing was generated and no folder was made.
    """
    _check_numbers(args)
    seeds = read_seeds(args.seeds)
    given = args.runs or _demo()
    notes = [] if args.runs else [_demo_note()]
    columns = adapter_files.parse(given)
    base = _base_model(columns, args.base_model)
    scorer, captioner = _models(args, base)
    plan = Plan(
        adapters=columns,
        control=_control(columns, args.control),
        prompts=_prompts(args),
        prompt_set=Path(args.prompts).name,
        seeds=seeds,
        sampling=_sampling(args, base),
        scorer=scorer,
        captioner=captioner,
        training=trained_on.open_sets(columns, args.train_data),
        notes=notes,
    )
    _check_files(plan)
    return plan


def is_miniature(base_model: str) -> bool:
    """Whether a base model's name or folder is the embedded miniature."""
    return Path(resolve(base_model)).expanduser().resolve() == mini.pipeline_dir()


def read_seeds(text: str) -> list[int]:
    """``0,1`` or ``0..3`` as numbers.

    Raises:
        UserError: something else, or a seed twice.
    """
    seeds: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        ends = re.fullmatch(r"(\d{1,18})(?:\.\.(\d{1,18}))?", part)
        span = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not span or len(span) > 1000:
            raise UserError(f'--seeds is "{text}": write numbers from 0 on, such as 0,1 or 0..3.')
        seeds += span
    if len(set(seeds)) < len(seeds):
        raise UserError(f'--seeds "{text}" has a seed twice: keep one.')
    return seeds


def _check_numbers(args: Namespace) -> None:
    counts = ("num_inference_steps", "batch_size", "lanes", "processes", "max_prompts")
    for name in (*counts, "grid_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more.")
    for name in ("guidance_scale", "adapter_scale"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name} is {value}: give a finite number.")
    side = args.resolution
    if side is not None and (side < 8 or side % 8):
        raise UserError(f"--resolution is {side}: give a multiple of 8, such as 64 or 1024.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserError(f"--output_dir {args.output_dir} is a file: give a folder.")


def _demo() -> list[str]:
    for method in DEMO_METHODS:
        if not (DEMO / method / runlog.RUN).is_file():
            raise UserError(
                f"no adapter was named and there is no demo run {DEMO / method}: run `make demo`"
                " first, or name run folders, LoRA files or hub ids."
            )
    return [*(str(DEMO / method) for method in DEMO_METHODS), BASE]


def _demo_note() -> str:
    runs = " and ".join(str(DEMO / method) for method in DEMO_METHODS)
    return (
        f"No adapter was named, so these are the demo's two runs ({runs}), with the base model for"
        " context, scored by the embedded scorer."
    )


def _base_model(columns: Sequence[Adapter], given: str | None) -> str:
    base = adapter_files.require_one_base(columns, given)
    return MINI if is_miniature(base) else base


def _models(args: Namespace, base: str) -> tuple[str, str | None]:
    """Names of scorer and captioner."""
    small = is_miniature(base)
    scorer = args.scorer or (EMBEDDED if small else GENERAL_SCORER)
    captioner = args.captioner or (EMBEDDED if small else GENERAL_CAPTIONER)
    if args.skip_captions:
        if args.captioner_revision is not None:
            raise UserError("--captioner_revision is for captions: drop it or --skip_captions.")
        captioner = None
    for flag, name, general in (
        ("--scorer", scorer, GENERAL_SCORER),
        ("--captioner", captioner, GENERAL_CAPTIONER),
    ):
        if name == EMBEDDED and not small:
            raise UserError(
                f"{flag} embedded knows the miniature's icons only, and the base model is"
                f' "{base}": use another, such as {general}.'
            )
    return scorer, captioner


def _prompts(args: Namespace) -> list[Prompt]:
    scored = prompt_sets.read(args.prompts, args.prompt_column)[: args.max_prompts]
    general: list[Prompt] = []
    if args.general_prompts != NONE:
        general = prompt_sets.read(args.general_prompts)[: args.max_prompts]
    return [replace(prompt, general=False) for prompt in scored] + [
        replace(prompt, general=True) for prompt in general
    ]


def _control(columns: Sequence[Adapter], given: str | None) -> int | None:
    if given is not None:
        return control([entry.label for entry in columns], given)
    return next((i for i, entry in enumerate(columns) if entry.kind != BASE), None)


def _check_files(plan: Plan) -> None:
    """Refuse two prompts whose images would have one file: long ones that begin alike."""
    texts: dict[Path, str] = {}
    for job in plan.jobs().values():
        if texts.setdefault(job.file, job.prompt.text) != job.prompt.text:
            raise UserError(
                f'the prompt "{job.prompt.text}" of --general_prompts begins as the one in the same'
                " place of --prompts: move it to another line."
            )


def _sampling(args: Namespace, base: str) -> Sampling:
    small = is_miniature(base)
    guidance = args.guidance_scale
    if guidance is None:
        guidance = MINI_GUIDANCE if small else SDXL_GUIDANCE
    return Sampling(
        base_model=base,
        size=args.resolution or pipeline_side(base) or _loaded_side(base),
        steps=args.num_inference_steps,
        guidance_scale=guidance,
        scale=args.adapter_scale,
        dtype=args.dtype or PRECISIONS[default_precision()],
        lanes=args.lanes,
    )


def _loaded_side(base: str) -> int:
    import torch

    pipeline = load_pipeline(base, dtype=torch.float32)
    return int(pipeline.default_sample_size * pipeline.vae_scale_factor)
