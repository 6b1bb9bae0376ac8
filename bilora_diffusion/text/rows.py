"""From a task's name or files to examples, and on to the tokenized rows that a run is about."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import UserError, translated
from ..core.seeds import digest_texts, generator, seed_of
from ..run.data import chosen
from . import catalog
from .catalog import OTHER_SET, CatalogTask, packaged_rows
from .config import TextConfig
from .encode import Encoded, encode, pack, require_packable
from .examples import Example, label_words_of, open_file, with_labels
from .models import TextModel

DRAW = 0
"""Seed of what is drawn from a set that is used in part: the same rows for every run's seed."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Examples before tokenization, and how their answers are scored (``metrics.score``)."""

    name: str  # what the training set is called in messages
    train: list[Example]
    validation: list[Example] | None
    metrics: tuple[str, ...]
    label_words: tuple[str, ...] = ()  # the answers that there are; empty for free text
    answer_marker: str | None = None


@dataclass(frozen=True)
class TextData:
    """Training and held-out rows, tokenized."""

    rows: Rows
    train: Encoded
    validation: Encoded | None = None


def open_rows(cfg: TextConfig) -> Rows:
    """The examples that a configuration names; ``cfg.task_type`` is decided.

    Raises:
        UserError: they can't be found or read, or don't suit the kind of model.
    """
    rows = _task_rows(cfg) if cfg.task else _file_rows(cfg)
    validation = rows.validation and subset(rows.validation, cfg.max_eval_samples, "validation")
    if validation:
        names = [
            digest_texts([row.prompt, row.input, row.pair or "", row.answer]) for row in validation
        ]
        label = f"the held-out rows of {rows.name}"
        validation = [validation[i] for i in chosen(cfg.validation_part, names, label)]
    return replace(
        rows, train=subset(rows.train, cfg.max_train_samples, "train"), validation=validation
    )


def _task_rows(cfg: TextConfig) -> Rows:
    task = catalog.get(str(cfg.task))
    if cfg.task_type == "classification" and not task.label_words:
        raise UserError(
            f"{task.name} has free answers, and --task_type classification needs classes: use a"
            " causal or seq2seq model."
        )
    train, validation = open_task(task, cfg.task_type, cfg.cache_dir)
    return Rows(
        task.name, train, validation or None, task.metrics, task.label_words, task.answer_marker
    )


def _file_rows(cfg: TextConfig) -> Rows:
    files = [Path(file).expanduser() for file in (cfg.train_file, cfg.validation_file) if file]
    sets = [open_file(file, cfg.input_column, cfg.target_column) for file in files]
    name, metrics, words = files[0].name, ("exact_match",), ()
    if cfg.task_type == "classification":
        metrics, words = ("accuracy", "f1"), label_words_of(sets[0])
        if len(words) < 2:
            raise UserError(
                f'{name} has only the label "{"".join(words)}", and a classifier needs two: correct'
                " --target_column or the file."
            )
        sets = [with_labels(examples, words) for examples in sets]
    return Rows(name, sets[0], sets[1] if len(sets) > 1 else None, metrics, words)


def subset(values: Sequence[T], size: int | None, purpose: str) -> list[T]:
    """``size`` of the values, drawn by their purpose and in their own order; or all of them."""
    if size is None or size >= len(values):
        return list(values)
    import torch

    order = torch.randperm(len(values), generator=generator(seed_of(DRAW, purpose), "subset"))
    return [values[i] for i in sorted(order[:size].tolist())]


def open_task(
    task: CatalogTask, kind: str, cache_dir: str | None = None
) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and those that are held out, for a kind of model.

    Raises:
        UserError: the set can't be loaded, or is another one than the task was made for.
    """

    def examples(rows: Any, split: str, numbers: Sequence[int]) -> list[Example]:
        return [
            task.example(row, kind, f'row {n + 1} of the split "{split}" of {task.dataset}')
            for n, row in zip(numbers, rows.select(numbers), strict=True)
        ]

    rows = _load(task, "train", cache_dir)
    numbers: Sequence[int] = range(len(rows))
    if task.validation is None:
        heldout_numbers = held_out(task, rows)
        validation = examples(rows, "train", sorted(heldout_numbers))
        numbers = [n for n in numbers if n not in heldout_numbers]
    else:
        validation_rows = _load(task, task.validation, cache_dir)
        validation = examples(validation_rows, task.validation, range(len(validation_rows)))
    return examples(rows, "train", subset(numbers, task.max_train_samples, "train")), validation


def held_out(task: CatalogTask, rows: Any) -> set[int]:
    """Numbers of the rows that a task without a validation split holds out: ``task.holdout`` or a
    few more, because equal values of ``task.group`` stay together. The groups with the lowest
    hashes are taken, so the choice depends on the texts alone and on no seed or order.
    """
    if task.group not in rows.column_names:
        raise UserError(
            f'{task.dataset} has no column "{task.group}", only {", ".join(rows.column_names)}:'
            f" {OTHER_SET}."
        )
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(rows[task.group]):
        groups.setdefault(str(key), []).append(number)
    heldout_numbers: set[int] = set()
    for key in sorted(groups, key=lambda key: digest_texts(["held out", key])):
        if len(heldout_numbers) >= task.holdout:
            return heldout_numbers
        heldout_numbers.update(groups[key])
    raise UserError(
        f"{task.dataset} has {len(rows)} rows, and {task.name} holds {task.holdout} of them out:"
        " its download is incomplete, delete it and try again."
    )


def _load(task: CatalogTask, split: str, cache_dir: str | None) -> Any:
    import datasets

    if task.package:
        return datasets.Dataset.from_list(packaged_rows(task, split))
    arguments: Any = {"split": split, "cache_dir": cache_dir}
    with translated(
        f"the dataset {task.dataset} of the task {task.name} could not be loaded",
        "check the connection, log in with `hf auth login` if it is not public, or give a file by"
        " --train_file",
    ):
        try:
            return datasets.load_dataset(task.dataset, task.config_name, **arguments)
        except RuntimeError as error:
            if "Dataset scripts are no longer supported" not in str(error):
                raise
        # Of sets that come as a script, the hub keeps Parquet files on a branch.
        branch = f"hf://datasets/{task.dataset}@refs%2Fconvert%2Fparquet"
        files = {split: f"{branch}/{task.config_name or 'default'}/{split}/*.parquet"}
        return datasets.load_dataset("parquet", data_files=files, **arguments)


def encode_rows(cfg: TextConfig, rows: Rows, loaded: TextModel) -> TextData:
    """Tokenize, and pack if that is asked for."""
    train, validation = encode(rows.train, cfg, loaded, rows.name), None
    if cfg.packing:
        require_packable(loaded.model)
        before, train = len(train), pack(train, cfg.max_length)
        logger.info("%d rows are packed into %d", before, len(train))
    if rows.validation:
        validation = encode(rows.validation, cfg, loaded, f"the held-out rows of {rows.name}")
    return TextData(rows, train, validation)
