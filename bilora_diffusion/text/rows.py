"""From a task's name or files to tokenized rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import catalog
from .encode import Encoded, encode
from .examples import Example, label_words_of, subset, with_labels
from .models import TextModel
from .packing import pack, require_packable
from .sources import open_file, open_task
from .task import TextData

DRAW = 0
"""Seed of what is drawn from a set that is used in part: the same rows for every run's seed."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Examples before tokenization.

    Args:
        name: what the training set is called in messages.
        train, validation: the examples; validation may be None.
        metrics: names for ``data.text.metrics.score``.
        label_words: the answers that there are; empty for free text.
        answer_marker: what stands before the answer proper, such as "####".
        template: the task's own for causal models.
    """

    name: str
    train: list[Example]
    validation: list[Example] | None
    metrics: tuple[str, ...]
    label_words: tuple[str, ...] = ()
    answer_marker: str | None = None
    template: str = "auto"


def open_rows(cfg: Any) -> Rows:
    """The examples that a configuration names; ``cfg.task_type`` is decided.

    Raises:
        UserError: they can't be found or read, or don't suit the kind of model.
    """
    rows = _task_rows(cfg) if cfg.task else _file_rows(cfg)
    held = rows.validation
    return replace(
        rows,
        train=subset(rows.train, cfg.max_train_samples, DRAW, "train"),
        validation=held and subset(held, cfg.max_eval_samples, DRAW, "validation"),
    )


def _task_rows(cfg: Any) -> Rows:
    task = catalog.get(cfg.task)
    if cfg.task_type == "classification" and not task.label_words:
        raise UserError(
            f"{task.name} has free answers, and --task_type classification needs classes: use a"
            " causal or seq2seq model."
        )
    train, held = (
        open_task(task, split, kind=cfg.task_type, cache_dir=cfg.cache_dir, seed=DRAW)
        for split in ("train", "validation")
    )
    return Rows(
        task.name,
        train,
        held or None,
        task.metrics,
        task.label_words,
        task.answer_marker,
        task.default_template,
    )


def _file_rows(cfg: Any) -> Rows:
    train, held = (
        open_file(
            Path(file).expanduser(),
            input_column=cfg.input_column,
            target_column=cfg.target_column,
        )
        if file
        else None
        for file in (cfg.train_file, cfg.validation_file)
    )
    assert train is not None
    name = Path(cfg.train_file).name
    if cfg.task_type != "classification":
        return Rows(name, train, held, ("exact_match",))
    words = label_words_of(train)
    if len(words) < 2:
        raise UserError(
            f'{name} has only the label "{"".join(words)}", and a classifier needs two: correct'
            " --target_column or the file."
        )
    train = with_labels(train, words, name)
    if held is not None:
        held = with_labels(held, words, Path(cfg.validation_file).name)
    return Rows(name, train, held, ("accuracy", "f1"), words)


def encode_rows(cfg: Any, rows: Rows, loaded: TextModel) -> TextData:
    """Tokenize; says what was cut or left out.

    Raises:
        UserError: a length that the model does not allow, or a row that can't be tokenized.
    """
    train = _encode(cfg, rows.train, loaded, rows.name)
    if cfg.packing:
        require_packable(loaded.model, cfg.max_length)
        before, train = len(train), pack(train, cfg.max_length)
        logger.info("%d rows are packed into %d", before, len(train))
    held = None
    if rows.validation is not None:
        held = _encode(cfg, rows.validation, loaded, f"the held-out rows of {rows.name}")
    return TextData(train, held, rows.metrics, rows.label_words, rows.answer_marker)


def _encode(cfg: Any, examples: list[Example], loaded: TextModel, name: str) -> Encoded:
    made = encode(
        examples,
        loaded.tokenizer,
        loaded.kind,
        name=name,
        max_length=cfg.max_length,
        max_target_length=cfg.max_target_length,
        template=cfg.template,
        num_workers=cfg.preprocessing_num_workers,
        overwrite_cache=cfg.overwrite_cache,
        model_limit=loaded.max_tokens,
        cache_dir=cfg.cache_dir,
    )
    for count, what in ((made.truncated, "cut to --max_length"), (made.dropped, "left out")):
        if count:
            logger.warning("%s: %d of %d rows are %s", name, count, len(examples), what)
    return made
