"""Read the rows of a run, from a task or from files, and tokenize them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..core.errors import UserError, as_user_error
from ..core.seeds import digest_texts, generator, seed_of
from . import catalog
from .catalog import OTHER_SET, CatalogTask, packaged_rows
from .config import TextConfig
from .encode import Encoded, encode, pack, require_packable
from .examples import Example, label_words_of, open_file, with_labels
from .models import TextModel

# Seed that chooses rows of a large dataset, so that runs with any seed use the same rows.
SUBSET_SEED = 0
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Examples before tokenization, and how their answers are scored.

    Attributes:
        name: name of the training set for messages.
        train: training examples.
        validation: held-out examples, if there are any.
        metrics: names in `metrics.METRICS`.
        label_words: answers by class number; () for free text.
        answer_marker: text that precedes the final answer.
    """

    name: str
    train: list[Example]
    validation: list[Example] | None
    metrics: tuple[str, ...]
    label_words: tuple[str, ...] = ()
    answer_marker: str | None = None


@dataclass(frozen=True)
class TextData:
    """The training and held-out rows, before and after tokenization."""

    rows: Rows
    train: Encoded
    validation: Encoded | None = None


def open_rows(cfg: TextConfig) -> Rows:
    """Read the examples that a resolved configuration names.

    Raises:
        UserError: the rows can't be found or read, or do not fit the kind of model.
    """
    rows = _task_rows(cfg) if cfg.task else _file_rows(cfg)
    if cfg.validation_split is not None:
        rows = hold_out(rows, cfg.validation_split)
    train = subset(rows.train, cfg.max_train_samples, "train")
    validation = None
    if rows.validation:
        validation = subset(rows.validation, cfg.max_eval_samples, "validation")
    return replace(rows, train=train, validation=validation)


def _task_rows(cfg: TextConfig) -> Rows:
    """Read the rows of ``--task``."""
    task = catalog.get(str(cfg.task))
    if cfg.task_type == "classification" and not task.label_words:
        raise UserError(
            f"{task.name} has free-text answers, but --task_type classification needs classes: use"
            " a causal or seq2seq model."
        )
    train, validation = open_task(task, cfg.task_type, cfg.cache_dir)
    return Rows(
        task.name, train, validation or None, cfg.metrics, task.label_words, task.answer_marker
    )


def _file_rows(cfg: TextConfig) -> Rows:
    """Read the rows of ``--train_file`` and ``--validation_file``."""
    train_file = Path(str(cfg.train_file)).expanduser()
    train = open_file(train_file, cfg.input_column, cfg.target_column)
    validation = None
    if cfg.validation_file:
        validation_file = Path(cfg.validation_file).expanduser()
        validation = open_file(validation_file, cfg.input_column, cfg.target_column)
    if cfg.task_type != "classification":
        return Rows(train_file.name, train, validation, cfg.metrics)

    words = label_words_of(train)
    if len(words) < 2:
        raise UserError(
            f'{train_file.name} has only the label "{"".join(words)}", but a classifier needs at'
            " least two: correct --target_column or the file."
        )
    train = with_labels(train, words)
    if validation is not None:
        validation = with_labels(validation, words)
    return Rows(train_file.name, train, validation, cfg.metrics, label_words=words)


def hold_out(rows: Rows, share: float) -> Rows:
    """Hold out approximately the given share of training rows, chosen by a hash of their content.

    A row is held out if its hash, as a number in [0, 1), is below the share. The choice does not
    depend on other rows or on a seed. Equal rows stay together, and a larger share also holds out
    all rows that a smaller share holds out.

    Raises:
        UserError: one side would have no rows.
    """
    train = []
    heldout = []
    for example in rows.train:
        if _content_number(example) < share:
            heldout.append(example)
        else:
            train.append(example)
    if not train or not heldout:
        missing_side = "training" if heldout else "held-out"
        raise UserError(
            f"--validation_split {share:g} leaves no {missing_side} row among the"
            f" {len(rows.train)} in {rows.name}: give another share, more rows, or"
            " --validation_file instead."
        )
    logger.info(
        "--validation_split %g holds out %d of the %d rows of %s, by a hash of their content",
        share,
        len(heldout),
        len(rows.train),
        rows.name,
    )
    return replace(rows, train=train, validation=heldout)


def _content_number(example: Example) -> float:
    """Hash an example's text to a number in [0, 1)."""
    # The class number is left out, since a new label word in another row can change it.
    texts = [example.prompt, example.input, example.pair or "", example.answer]
    for role, content in example.turns:
        texts += [role, content]
    return seed_of("validation split", *texts) / 2**63


def subset(values: Sequence[T], size: int | None, purpose: str) -> list[T]:
    """Choose values at random and keep their order.

    Args:
        values: values to choose from.
        size: number of values; None for all of them.
        purpose: part of the seed, so that training and validation rows are chosen independently.
    """
    if size is None or size >= len(values):
        return list(values)
    # Every run uses the same rows, so that runs with different seeds can be compared.
    random = generator(seed_of(SUBSET_SEED, purpose), "subset")
    order = torch.randperm(len(values), generator=random)
    return [values[number] for number in sorted(order[:size].tolist())]


def open_task(
    task: CatalogTask, kind: str, cache_dir: str | None = None
) -> tuple[list[Example], list[Example]]:
    """Read a task's training and held-out examples for a kind of model.

    Args:
        task: a task of the catalog.
        kind: "seq2seq", "causal" or "classification".
        cache_dir: folder for downloads.

    Raises:
        UserError: the dataset can't be loaded, is too small, or is not the one that the task
            expects.
    """

    def examples_of(rows: Any, split: str, indices: Sequence[int]) -> list[Example]:
        examples = []
        for index, row in zip(indices, rows.select(indices), strict=True):
            where = f'row {index + 1} of the split "{split}" of {task.dataset}'
            examples.append(task.example(row, kind, where))
        return examples

    rows = _load(task, "train", cache_dir)
    indices: Sequence[int] = range(len(rows))
    if task.validation is None:
        heldout_indices = held_out(task, rows)
        validation = examples_of(rows, "train", sorted(heldout_indices))
        indices = [index for index in indices if index not in heldout_indices]
    else:
        validation_rows = _load(task, task.validation, cache_dir)
        validation = examples_of(validation_rows, task.validation, range(len(validation_rows)))
    indices = subset(indices, task.max_train_samples, "train")
    return examples_of(rows, "train", indices), validation


def held_out(task: CatalogTask, rows: Any) -> set[int]:
    """Return the indices of the rows that a task without a validation split holds out.

    There are `task.holdout` rows or a few more, since rows with the same value in the column
    `task.group` stay together. The groups with the lowest hashes are held out, so the choice
    depends only on the texts, not on a seed or on the order of the rows.

    Raises:
        UserError: the dataset lacks the column, or is too small.
    """
    if task.group not in rows.column_names:
        raise UserError(
            f'{task.dataset} has no column "{task.group}", only {", ".join(rows.column_names)}:'
            f" {OTHER_SET}."
        )
    groups: dict[str, list[int]] = {}  # indices of the rows with equal values
    for number, key in enumerate(rows[task.group]):
        groups.setdefault(str(key), []).append(number)
    heldout_indices: set[int] = set()
    # Sorted by hash, so that neither the alphabetical order nor the order of the rows matters.
    for key in sorted(groups, key=lambda key: digest_texts(["held out", key])):
        if len(heldout_indices) >= task.holdout:
            return heldout_indices
        heldout_indices.update(groups[key])
    raise UserError(
        f"{task.dataset} has {len(rows)} rows, too few to hold out {task.holdout} of them for"
        f" {task.name}: the download is incomplete; delete it and try again."
    )


def _load(task: CatalogTask, split: str, cache_dir: str | None) -> Any:
    """Load a split of a task's dataset, from its package or from the hub."""
    import datasets

    if task.package:
        return datasets.Dataset.from_list(packaged_rows(task, split))
    arguments: Any = {"split": split, "cache_dir": cache_dir}
    with as_user_error(
        f"the dataset {task.dataset} of the task {task.name} could not be loaded",
        "check the connection, log in with `hf auth login` if it is not public, or give a file with"
        " --train_file instead of --task",
    ):
        try:
            return datasets.load_dataset(task.dataset, task.config_name, **arguments)
        except RuntimeError as error:
            if "Dataset scripts are no longer supported" not in str(error):
                raise
        # For datasets with a script, the hub has Parquet files on a separate branch.
        branch = f"hf://datasets/{task.dataset}@refs%2Fconvert%2Fparquet"
        files = {split: f"{branch}/{task.config_name or 'default'}/{split}/*.parquet"}
        return datasets.load_dataset("parquet", data_files=files, **arguments)


def encode_rows(cfg: TextConfig, rows: Rows, text_model: TextModel) -> TextData:
    """Tokenize the rows; with ``--packing``, also pack the training rows."""
    train = encode(rows.train, cfg, text_model, rows.name)
    if cfg.packing:
        require_packable(text_model.model)
        packed = pack(train, cfg.max_length)
        logger.info("%d training rows are packed into %d", len(train), len(packed))
        train = packed
    validation = None
    if rows.validation:
        validation = encode(rows.validation, cfg, text_model, f"the held-out rows of {rows.name}")
    return TextData(rows, train, validation)
