"""A command line checked: the runs, their images and the settings, before anything is measured."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bilora_diffusion.choices import NOISE_LEVELS
from bilora_diffusion.config import DreamBoothConfig
from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.image.sets import ImageSet

from ..command import open_device, open_folder
from ..groups import control
from . import subjects
from .models import FULL_WEIGHTS, SPACES, SPLITS, Sample, open_set
from .profile import coordinates
from .result import Settings
from .subjects import BASE, Subject


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Args:
        found: the runs, group by group.
        images: of each run.
        sample: what the loss is a mean over.
        settings: how the landscape is looked at.
        control: label of the group to compare with.
        with_grid: labels of the runs whose planes are measured.
    """

    found: list[Subject]
    images: list[ImageSet]
    sample: Sample
    settings: Settings
    control: str
    with_grid: frozenset[str]

    def about(self, subject: Subject, images: ImageSet) -> list[Any]:
        """What identifies the weights and the loss of a run, for the store."""
        return [
            subject.digest,
            subject.kind,
            subjects.base_key(subject.config),
            images.fingerprint(),
            [getattr(subject.config, name) for name in subjects.LOSS_OPTIONS],
            [self.sample.split, self.sample.max_images, self.sample.levels],
        ]


def make(args: Namespace) -> Plan:
    """Check everything and open the image sets.

    Raises:
        UserError: bad input; nothing was measured or written.
    """
    spaces = _check(args)
    found = subjects.read(args.runs, args.group)
    _check_spaces(found, spaces)
    labels = list(dict.fromkeys(subject.group for subject in found))
    chosen = 0 if args.control is None else control(labels, args.control)
    device = str(open_device(None if args.device == "auto" else args.device))
    sample = Sample(args.split, args.max_images, args.levels, device)
    images = _open_all(found, args.split)
    subjects.check_comparable(found, [own.fingerprint() for own in images])
    open_folder(args.output_dir)
    count = len(images[0])
    radii = {"lora": args.radius, "full": args.full_radius}
    settings = Settings(
        spaces=spaces,
        full_weights=args.full_weights,
        directions=args.directions,
        positions={space: coordinates(radii[space], args.points) for space in spaces},
        grid_positions=(
            {space: coordinates(radii[space], args.grid) for space in spaces} if args.grid else {}
        ),
        rho=args.rho,
        ascent_steps=args.ascent_steps,
        restarts=args.restarts,
        eigenvalue=args.eigenvalue,
        split=args.split,
        images=min(count, args.max_images) if args.max_images else count,
        levels=args.levels,
        seed=args.seed,
    )
    return Plan(found, images, sample, settings, labels[chosen], _with_grid(found, args))


def _check(args: Namespace) -> list[str]:
    """Refuse odd numbers and names; returns the spaces."""
    for flag in ("points", "grid"):
        value = getattr(args, flag)
        if (value < 3 or value % 2 == 0) and not (flag == "grid" and value == 0):
            zero = ", or 0 for no plane" if flag == "grid" else ""
            raise UserError(
                f"--{flag} {value} has no middle and two ends: take an odd number from 3 on{zero}."
            )
    for flag in ("radius", "full_radius", "rho"):
        value = getattr(args, flag)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{flag} {value} is no distance: take a number above 0.")
    for flag, least in (
        ("directions", 1),
        ("ascent_steps", 1),
        ("restarts", 0),
        ("max_images", 0),
        ("grid_runs", 0),
    ):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} is {getattr(args, flag)}: take {least} or more.")
    if not 1 <= args.levels <= NOISE_LEVELS:
        raise UserError(f"--levels is {args.levels}: take a number from 1 to {NOISE_LEVELS}.")
    spaces = list(dict.fromkeys(word for word in args.space.split(",") if word))
    named = [("space", word, SPACES) for word in spaces or [args.space]]
    named += [("full_weights", args.full_weights, FULL_WEIGHTS), ("split", args.split, SPLITS)]
    for flag, word, known in named:
        if word not in known:
            hint = did_you_mean(word, known)
            raise UserError(f'--{flag} has "{word}"{hint}: take {" or ".join(known)}.')
    return [space for space in SPACES if space in spaces]


def _check_spaces(found: Sequence[Subject], spaces: Sequence[str]) -> None:
    for subject in found:
        if not subject.has_factors and "full" not in spaces:
            what = "the base model" if subject.kind == BASE else f"{subject.folder}"
            raise UserError(f"{what} has no adapter: take --space full, or leave it out.")


def _open_all(found: Sequence[Subject], split: str) -> list[ImageSet]:
    """The images of each run; runs whose options name the same set share it."""
    names = (
        "dataset_name",
        "dataset_config_name",
        "instance_data_dir",
        "validation_dataset",
        "image_column",
        "caption_column",
        "skip_bad_images",
    )
    opened: dict[tuple[Any, ...], ImageSet] = {}

    def of(config: DreamBoothConfig) -> ImageSet:
        key = tuple(getattr(config, name) for name in names)
        if key not in opened:
            opened[key] = open_set(config, split)
        return opened[key]

    return [of(subject.config) for subject in found]


def _with_grid(found: Sequence[Subject], args: Namespace) -> frozenset[str]:
    if not args.grid:
        return frozenset()
    chosen: list[str] = []
    for group in dict.fromkeys(subject.group for subject in found):
        own = [subject.label for subject in found if subject.group == group]
        chosen += own[: args.grid_runs or len(own)]
    return frozenset(chosen)
