"""Tokenized sets, kept on disk so that a second run or process need not tokenize again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import config

from ..errors import UserError
from ..seeds import digest_texts
from .config import TextConfig
from .examples import Example
from .models import TextModel
from .templates import settle_template
from .tokenizing import Row, causal_rows, classification_rows, seq2seq_rows, tokenizer_digest

FORMAT = "3"
"""Raise it when tokenization changes, so that older caches are not taken."""
MODEL_COLUMNS = ("input_ids", "labels", "token_type_ids", "position_ids", "segment_ids")
WRITE_ROWS = 1000
NO_LIMIT = 10**9
"""Tokenizers without a limit name a far larger number."""
logger = logging.getLogger(__name__)


class Encoded:
    """A tokenized set. Made by ``encode`` and ``pack``.

    Args:
        data: its rows: some of ``MODEL_COLUMNS``, and ``sources`` (numbers of the examples in it),
            ``length``, ``target_tokens``, ``truncated`` (how many of its examples were cut).
        kind: "seq2seq", "causal" or "classification".
        examples: those it was made from.
    """

    def __init__(self, data: datasets.Dataset, kind: str, examples: Sequence[Example]) -> None:
        self.data, self.kind, self.examples = data, kind, examples
        self.columns = [name for name in MODEL_COLUMNS if name in data.column_names]
        self._rows = data.select_columns(self.columns)
        figures: Any = data.with_format("arrow")[:]  # much faster than row by row
        self.sources: list[list[int]] = figures["sources"].to_pylist()
        self.lengths: list[int] = figures["length"].to_pylist()
        self.target_tokens: list[int] = figures["target_tokens"].to_pylist()
        self.truncated = sum(figures["truncated"].to_pylist())
        """How many examples were cut to fit."""
        self.dropped = len(examples) - sum(map(len, self.sources))
        """How many examples were left out because no token of theirs would have a loss."""

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> dict[str, Any]:
        """Lists for ``collate``: ``input_ids``, ``labels`` and what else the model takes."""
        return dict(self._rows[i])

    def name(self, i: int) -> str:
        """What row ``i`` is called: "line 17 of train.jsonl"; of a packed row all that is in it."""
        return " and ".join(self.examples[source].where for source in self.sources[i])

    def example(self, i: int) -> Example:
        """What row ``i``, which is not packed, was made from."""
        (source,) = self.sources[i]
        return self.examples[source]


def encode(examples: Sequence[Example], cfg: TextConfig, loaded: TextModel, name: str) -> Encoded:
    """Tokenize a set, or take it from the cache if texts, tokenizer and lengths are the same.

    Examples with a blank answer are left out (``Encoded.dropped``), long ones are cut
    (``Encoded.truncated``; ``tokenizing`` says which end); both are told.

    Args:
        cfg: a run's configuration: lengths, template, and how and where to keep the tokens.
        loaded: tokenizer, kind and the model's most tokens.
        name: what to call the set in messages.

    Raises:
        UserError: a length that the model does not allow, or an example that can't be tokenized;
            the message names it.
    """
    tokenizer, kind, template = loaded.tokenizer, loaded.kind, cfg.template
    _check_length("max_length", cfg, loaded)
    if kind == "seq2seq":
        _check_length("max_target_length", cfg, loaded)
    if kind == "causal":
        template = settle_template(template, tokenizer)
    work = _Tokenize(tokenizer, kind, template, cfg.max_length, cfg.max_target_length)
    fingerprint = digest_texts([*work.key(), *map(repr, examples)])
    folder = Path(cfg.cache_dir or config.HF_DATASETS_CACHE) / "bilora_text"
    folder.mkdir(parents=True, exist_ok=True)
    workers = min(cfg.preprocessing_num_workers or 1, len(examples))
    table = pyarrow.Table.from_pylist(
        [{**vars(example), "number": number} for number, example in enumerate(examples)]
    )
    # A fixed fingerprint spares hashing the table: `map` is told the fingerprint of its result.
    source = datasets.Dataset(table, fingerprint="examples")
    data = source.map(
        work,
        batched=True,
        remove_columns=source.column_names,
        features=work.features(),
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        load_from_cache_file=not cfg.overwrite_cache,
        new_fingerprint=fingerprint,
        num_proc=workers if workers > 1 else None,
        writer_batch_size=WRITE_ROWS,
    )
    if not len(data):
        raise UserError(
            f"no row of {name} has an answer to learn from: fill its answers, or name their column"
            " by --target_column."
        )
    encoded = Encoded(data, kind, examples)
    for count, what in ((encoded.truncated, "cut to --max_length"), (encoded.dropped, "left out")):
        if count:
            logger.warning("%s: %d of %d rows are %s", name, count, len(examples), what)
    return encoded


@dataclass
class _Tokenize:
    """Columns of examples to columns of rows; picklable, so that several processes can run it."""

    tokenizer: Any
    kind: str
    template: str
    max_length: int
    max_target_length: int

    def key(self) -> list[str]:
        """What the tokens depend on, besides the texts."""
        lengths = f"{self.max_length} {self.max_target_length if self.kind == 'seq2seq' else ''}"
        template = self.template if self.kind == "causal" else ""
        return [FORMAT, self.kind, template, lengths, tokenizer_digest(self.tokenizer)]

    def features(self) -> datasets.Features:
        """The types of the columns."""
        number, ids = datasets.Value("int64"), datasets.List(datasets.Value("int32"))
        features: dict[str, Any] = {
            "input_ids": ids,
            "labels": number if self.kind == "classification" else ids,
            "sources": datasets.List(number),
            "length": number,
            "target_tokens": number,
            "truncated": datasets.Value("bool"),
        }
        return datasets.Features(features | ({"token_type_ids": ids} if self._pairs() else {}))

    def _pairs(self) -> bool:
        """Whether the tokenizer tells two sentences apart."""
        return self.kind == "classification" and "token_type_ids" in self.tokenizer("a", "b")

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        table = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        kept = [row for row in table if row["answer"].strip()]
        numbers = [row.pop("number") for row in kept]
        rows = self._rows([Example(**row) for row in kept]) if kept else []
        pairs = [(row, n) for row, n in zip(rows, numbers, strict=True) if row.target_tokens]
        columns = {
            name: [getattr(row, name) for row, _ in pairs]
            for name in self.features()
            if name != "sources"
        }
        return columns | {"sources": [[n] for _, n in pairs]}

    def _rows(self, examples: list[Example]) -> list[Row]:
        if self.kind == "seq2seq":
            return seq2seq_rows(examples, self.tokenizer, self.max_length, self.max_target_length)
        if self.kind == "classification":
            return classification_rows(examples, self.tokenizer, self.max_length)
        return causal_rows(examples, self.tokenizer, self.template, self.max_length)


def _check_length(option: str, cfg: TextConfig, loaded: TextModel) -> None:
    length = getattr(cfg, option)
    limits = {"tokenizer": loaded.tokenizer.model_max_length, "model": loaded.max_tokens}
    for owner, limit in limits.items():
        if limit is not None and limit < NO_LIMIT and length > limit:
            raise UserError(
                f"--{option} {length} is more than the {limit} tokens that the {owner} allows: give"
                f" --{option} {limit} or less."
            )
