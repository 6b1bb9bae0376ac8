"""Grid of a sweep: axes and named variants to cells, each checked before anything runs.

A variant is a set of options; a cell is a variant with a seed. Variants whose runs would be the
same (an option that their method does not read, a value that is the default) are one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.config import run as resolving
from bilora_diffusion.core.errors import UserError, did_you_mean, placed
from bilora_diffusion.core.files import ROOT, without_paths
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.text.config import TextConfig

from .axes import SEED, Values
from .reporting import HELDOUT

MEASURED = (*sorted(resolving.HELDOUT_OPTIONS), "validation_loss_steps")
"""Options that don't touch what is learned, but decide what there is to compare."""
CONFIGS = {"train_dreambooth_bilora.py": DreamBoothConfig, "train_text_bilora.py": TextConfig}
"""Training script -> what its command line is read as."""


@contextmanager
def _each_remark_once() -> Iterator[None]:
    """Within the context, what the training script remarks on many cells is logged once."""
    seen = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        known = len(seen)
        seen.add(record.getMessage())
        return len(seen) > known

    remarks = logging.getLogger(resolving.__name__)
    remarks.addFilter(is_new)
    try:
        yield
    finally:
        remarks.removeFilter(is_new)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        label: its name.
        values: option -> value, without those that its method does not read.
        also: other labels that turned out to be the same run.
    """

    label: str
    values: Values
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        name: of its run folder: the variant, the seed, and a digest of what is run.
        variant: label of its variant.
        seed: of data, noise and initialization.
        flags: for the training script, beside the recipe and the run folder.
    """

    name: str
    variant: str
    seed: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """All variants and seeds, and a cell for each pair: seed by seed, so that pairs are early."""

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    def control(self, word: str | None) -> Variant:
        """The variant that the others are compared with.

        Args:
            word: a label; None for the first variant.
        """
        if word is None:
            return self.variants[0]
        for variant in self.variants:
            if word in (variant.label, *variant.also):
                return variant
        labels = [variant.label for variant in self.variants]
        raise UserError(
            f'--control "{word}" is none of the variants{did_you_mean(word, labels)}: use one of '
            + ", ".join(f'"{label}"' for label in labels)
            + "."
        )


def open_script(name: str) -> Path:
    """A training script by its name in the repository, or by its path.

    A script that is not listed in ``CONFIGS`` must take the options of the DreamBooth script; it is
    imported, so that methods which it registers are known.
    """
    path = next((p for p in (ROOT / name, Path(name)) if p.is_file()), None)
    if path is None:
        raise UserError(
            f'there is no script "{name}"{did_you_mean(name, CONFIGS)}: correct --script.'
        )
    if path.name not in CONFIGS:
        runpy.run_path(str(path))
    return path.resolve()


@dataclass(frozen=True)
class Planner:
    """Turns axes and variants into a grid.

    Args:
        recipe: YAML file of options that all cells share.
        script: what is run, see :func:`open_script`.
        shared: options of all cells; those of a variant win.
        metric: what the variants are compared by.
    """

    recipe: Path
    script: Path
    shared: Values = dataclasses.field(default_factory=dict)
    metric: str = HELDOUT

    def grid(self, over: Mapping[str, Sequence[str]], variants: Mapping[str, Values]) -> Grid:
        """The variants times the axes times the seeds, each cell checked."""
        over, shared = dict(over), dict(self.shared)
        if both := [n for n in over if n in shared or any(n in a for a in variants.values())]:
            raise UserError(f'"{both[0]}" is an axis of --over and set elsewhere too: keep one.')
        given = over.pop(SEED, None) or ([shared[SEED]] if SEED in shared else None)
        if wrong := [seed for seed in given or () if not re.fullmatch(r"\s*-?\d+\s*", seed)]:
            raise UserError(f'seed is "{wrong[0]}": give whole numbers, as in --over seed=0..4.')
        seeds = None if given is None else tuple(map(int, given))
        with _each_remark_once():
            merged = self._merge(over, variants or {"": {}}, seeds[0] if seeds else None)
            if seeds is None:
                seeds = (int(self.read(merged[0].label, merged[0].values, None)[0].seed),)
            cells = tuple(self._cell(variant, seed) for seed in seeds for variant in merged)
        return Grid(merged, seeds, cells)

    def _merge(
        self, over: Mapping[str, Sequence[str]], named: Mapping[str, Values], seed: int | None
    ) -> tuple[Variant, ...]:
        """The named variants times the axes; what would be the same run is one variant."""
        variants: dict[str, Variant] = {}
        for base, point in itertools.product(named, itertools.product(*over.values())):
            axes = dict(zip(over, point, strict=True))
            values = {**named[base], **axes}
            title = base or ", ".join(f"{name}={value}" for name, value in axes.items())
            config, _ = self.read(title or self.recipe.stem, values, seed)
            unread = unread_options(config)
            parts = [f"{n}={without_paths(str(v))}" for n, v in axes.items() if n not in unread]
            label = ", ".join([base, *parts] if base else parts) or self.recipe.stem
            key = _digest({**self._identity(config), SEED: None})
            if key not in variants:
                taken = sum(variant.label.split(" #")[0] == label for variant in variants.values())
                kept = {name: value for name, value in values.items() if name not in unread}
                variants[key] = Variant(f"{label} #{taken + 1}" if taken else label, kept)
            elif label not in (variants[key].label, *variants[key].also):
                also = (*variants[key].also, label)
                variants[key] = dataclasses.replace(variants[key], also=also)
        return tuple(variants.values())

    def read(self, label: str, values: Values, seed: int | None) -> tuple[Any, tuple[str, ...]]:
        """The configuration of a variant with a seed, as the script will see it, and its flags.

        Args:
            seed: None for the recipe's.
        """
        merged = {**self.shared, **values, **({} if seed is None else {SEED: seed})}
        flags = to_flags(merged)
        own = ("--output_dir=run", "--overwrite_output_dir")
        script = CONFIGS.get(self.script.name, DreamBoothConfig)
        with placed(f'in the variant "{label}": '):
            config = script.resolve(["--config", str(self.recipe), *flags, *own])
        if self.metric == HELDOUT and getattr(config, "validation_dataset", "") is None:
            raise UserError(
                f'the variant "{label}" would have no {HELDOUT}: add --set validation_dataset=...,'
                " or compare by another --metric."
            )
        return config, flags

    def _cell(self, variant: Variant, seed: int) -> Cell:
        config, flags = self.read(variant.label, variant.values, seed)
        slug = re.sub(r"[^a-z0-9.]+", "-", variant.label.lower()).strip("-.")[:60] or "arm"
        name = f"{slug}-seed{seed}-{_digest(self._identity(config))}"
        return Cell(name, variant.label, seed, flags)

    def _identity(self, config: Any) -> dict[str, Any]:
        """Options that decide the run's result: those that are not at their default and are read.

        The recipe's options are among them, so a finished run is not taken for that of an edited
        recipe; defaults are not, so that a new option of the script renames no run.
        """
        values = {**config.fingerprint(), **{n: config.to_dict().get(n) for n in MEASURED}}
        for field in dataclasses.fields(config):
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if field.name in values and values[field.name] == default:
                del values[field.name]
        for name in unread_options(config):
            values.pop(name, None)
        script = self.script.name
        return values if script in CONFIGS else {**values, "script": script, "launch": []}


def unread_options(config: Any) -> frozenset[str]:
    """Options of other methods, which the method of ``config`` does not read."""
    return methods.option_names() - methods.reads(config.method)


def to_flags(values: Values) -> tuple[str, ...]:
    """Options as ``--name=value``.

    YAML reads a bare yes or no as a boolean; said as a word it fits a switch and an option alike.
    """
    words = {True: "yes", False: "no"}
    return tuple(
        f"--{name}={words[value] if isinstance(value, bool) else value}"
        for name, value in values.items()
    )


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
