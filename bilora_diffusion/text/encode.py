"""Tokenized sets, kept on disk so that a second run or process need not tokenize again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import KINDS
from ..errors import UserError
from ..seeds import digest_texts
from .examples import Example
from .table import INPUT_COLUMNS, Tokenize, features_of, table
from .templates import settle_template
from .tokenizing import generation_prompt, require_eos

if TYPE_CHECKING:
    import datasets

__all__ = ["Encoded", "encode", "generation_prompt"]

MODEL_COLUMNS = ("input_ids", "labels", "token_type_ids", "position_ids", "segment_ids")
WRITE_ROWS = 1000
NO_LIMIT = 10**9
"""Tokenizers without a limit name a far larger number."""


class Encoded:
    """A tokenized set. Made by ``encode`` and ``pack``.

    Args:
        data: its rows: some of ``MODEL_COLUMNS``, and ``sources`` (numbers of the examples in it),
            ``length``, ``target_tokens``, ``truncated`` (how many of its examples were cut).
        kind: "seq2seq", "causal" or "classification".
        label: what the set is called in messages.
        examples: those it was made from.
    """

    def __init__(
        self, data: datasets.Dataset, kind: str, label: str, examples: Sequence[Example]
    ) -> None:
        self.data, self.kind, self.label, self.examples = data, kind, label, examples
        self.columns = [name for name in MODEL_COLUMNS if name in data.column_names]
        self._rows = data.select_columns(self.columns)
        self.lengths: list[int] = self._column("length")
        self.target_tokens: list[int] = self._column("target_tokens")

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> dict[str, Any]:
        """Lists for ``collate``: ``input_ids``, ``labels`` and what else the model takes."""
        return dict(self._rows[i])

    def name(self, i: int) -> str:
        """What row ``i`` is called: 'row 17 of train.jsonl', counted from 1."""
        numbers = [str(source + 1) for source in self.data[i]["sources"]]
        if len(numbers) == 1:
            return f"row {numbers[0]} of {self.label}"
        return f"rows {', '.join(numbers)} of {self.label}"

    def example(self, i: int) -> Example:
        """What row ``i`` was made from.

        Raises:
            ValueError: the row packs several examples.
        """
        sources = self.data[i]["sources"]
        if len(sources) != 1:
            raise ValueError(f"{self.name(i)} are one packed row, not one example")
        return self.examples[sources[0]]

    @property
    def truncated(self) -> int:
        """How many examples were cut to fit."""
        return sum(self._column("truncated"))

    @property
    def dropped(self) -> int:
        """How many examples were left out because no token of theirs would have a loss."""
        return len(self.examples) - sum(map(len, self._column("sources")))

    def _column(self, name: str) -> list[Any]:
        table: Any = self.data.with_format("arrow")[:]  # much faster than row by row
        return table[name].to_pylist()

    def fingerprint(self) -> str:
        """Identifies the tokens and their order."""
        return str(self.data._fingerprint)


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    kind: str,
    *,
    name: str,
    max_length: int,
    max_target_length: int = 64,
    template: str = "auto",
    num_workers: int | None = None,
    overwrite_cache: bool = False,
    model_limit: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Encoded:
    """Tokenize a set, or take it from the cache if texts, tokenizer and lengths are the same.

    Examples with a blank answer are left out (``Encoded.dropped``), long ones are cut
    (``Encoded.truncated``; ``tokenizing`` says which end).

    Args:
        name: what to call the set in messages.
        max_length: most tokens of a row; for "seq2seq", of its input.
        max_target_length: for "seq2seq", most tokens of the target.
        template: for "causal": "auto", "chat", "alpaca" or "plain".
        num_workers: processes that tokenize.
        overwrite_cache: tokenize even if the cache has it.
        model_limit: positions that the model has; None if there is no limit but the tokenizer's.
        cache_dir: parent folder of the cache; None: the ``datasets`` library's.

    Raises:
        UserError: no examples, a length that the model does not allow, or an example that can't be
            tokenized; the message names it.
    """
    from datasets import config

    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind}")
    if not examples:
        raise UserError(f"{name} has no examples: give a set that has some.")
    _check_length(max_length, "--max_length", tokenizer, model_limit)
    if kind == "seq2seq":
        _check_length(max_target_length, "--max_target_length", tokenizer, model_limit)
    if kind == "causal":
        template = settle_template(template, tokenizer)
        require_eos(tokenizer)
    work = Tokenize(tokenizer, kind, name, template, max_length, max_target_length)
    fingerprint = digest_texts([*work.key(), *map(repr, examples)])
    folder = Path(cache_dir or config.HF_DATASETS_CACHE) / "bilora_text"
    folder.mkdir(parents=True, exist_ok=True)
    workers = min(num_workers or 1, len(examples))
    with quiet_datasets():
        data = table(examples).map(
            work,
            batched=True,
            remove_columns=list(INPUT_COLUMNS),
            features=features_of(kind, work.makes_token_types()),
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=not overwrite_cache,
            new_fingerprint=fingerprint,
            num_proc=workers if workers > 1 else None,
            writer_batch_size=WRITE_ROWS,
        )
    if not len(data):
        raise UserError(
            f"no row of {name} has an answer to learn from: fill its answers, or name their column"
            " by --target_column."
        )
    return Encoded(data, kind, name, examples)


def _check_length(length: int, flag: str, tokenizer: Any, model_limit: int | None) -> None:
    if length < 1:
        raise UserError(f"{flag} is {length}: give at least 1.")
    limits = {"tokenizer": tokenizer.model_max_length, "model": model_limit}
    for owner, limit in limits.items():
        if limit is not None and limit < NO_LIMIT and length > limit:
            raise UserError(
                f"{flag} {length} is more than the {limit} tokens that the {owner} allows: give"
                f" {flag} {limit} or less."
            )


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep the progress bars of ``datasets`` away, and leave its setting as it was."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
