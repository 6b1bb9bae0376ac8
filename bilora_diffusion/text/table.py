"""A batch of examples as columns, and the columns that tokenization makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .examples import Example
from .tokenizing import (
    IGNORED,
    Row,
    causal_rows,
    classification_rows,
    seq2seq_rows,
    tokenizer_digest,
)

if TYPE_CHECKING:
    import datasets

FORMAT = "2"
"""Raise it when tokenization changes, so that older caches are not taken."""

INPUT_COLUMNS = ("prompt", "answer", "label", "pair", "turns", "input", "number")


def table(examples: Sequence[Example]) -> datasets.Dataset:
    """The examples as a table of ``INPUT_COLUMNS``."""
    import datasets
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    types = (text, text, number, text, pyarrow.list_(pyarrow.list_(text)), text, number)
    values = (
        [example.prompt for example in examples],
        [example.answer for example in examples],
        [example.label for example in examples],
        [example.pair for example in examples],
        [example.turns for example in examples],
        [example.input for example in examples],
        range(len(examples)),
    )
    arrays = [pyarrow.array(v, kind) for v, kind in zip(values, types, strict=True)]
    # A fixed fingerprint spares hashing the table: `map` is told the fingerprint of its result.
    return datasets.Dataset(pyarrow.table(arrays, INPUT_COLUMNS), fingerprint="examples")


def features_of(kind: str, token_types: bool) -> datasets.Features:
    """The types of the columns that ``Tokenize`` makes."""
    import datasets

    number = datasets.Value("int64")
    ids = datasets.List(datasets.Value("int32"))
    features: dict[str, Any] = {
        "input_ids": ids,
        "labels": number if kind == "classification" else ids,
        "sources": datasets.List(number),
        "length": number,
        "target_tokens": number,
        "truncated": number,
    }
    return datasets.Features(features | ({"token_type_ids": ids} if token_types else {}))


@dataclass
class Tokenize:
    """Columns of examples to columns of rows; picklable, so that several processes can run it."""

    tokenizer: Any
    kind: str
    name: str
    template: str
    max_length: int
    max_target_length: int

    def key(self) -> list[str]:
        """What the tokens depend on, besides the texts."""
        lengths = f"{self.max_length} {self.max_target_length if self.kind == 'seq2seq' else ''}"
        template = self.template if self.kind == "causal" else ""
        return [FORMAT, self.kind, template, lengths, tokenizer_digest(self.tokenizer)]

    def makes_token_types(self) -> bool:
        """Whether the tokenizer tells two sentences apart."""
        return self.kind == "classification" and "token_type_ids" in self.tokenizer("a", "b")

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = [batch[name] for name in INPUT_COLUMNS]
        kept = [row for row in zip(*columns, strict=True) if row[1].strip()]
        examples = [
            Example(prompt, answer, label, pair, tuple((role, text) for role, text in turns), more)
            for prompt, answer, label, pair, turns, more, _ in kept
        ]
        numbers = [row[-1] for row in kept]
        rows = self._rows(examples, numbers) if examples else []
        return self._columns(rows, numbers)

    def _rows(self, examples: list[Example], numbers: list[int]) -> list[Row]:
        if self.kind == "seq2seq":
            return seq2seq_rows(examples, self.tokenizer, self.max_length, self.max_target_length)
        names = [f"row {number + 1} of {self.name}" for number in numbers]
        if self.kind == "classification":
            return classification_rows(examples, names, self.tokenizer, self.max_length)
        return causal_rows(examples, names, self.tokenizer, self.template, self.max_length)

    def _columns(self, rows: list[Row], numbers: list[int]) -> dict[str, list[Any]]:
        pairs = [(row, n) for row, n in zip(rows, numbers, strict=True) if self._targets(row)]
        lengths = [
            max(len(row.input_ids), len(row.labels) if isinstance(row.labels, list) else 1)
            for row, _ in pairs
        ]
        columns: dict[str, list[Any]] = {
            "input_ids": [row.input_ids for row, _ in pairs],
            "labels": [row.labels for row, _ in pairs],
            "sources": [[number] for _, number in pairs],
            "length": lengths,
            "target_tokens": [self._targets(row) for row, _ in pairs],
            "truncated": [int(row.truncated) for row, _ in pairs],
        }
        if self.makes_token_types():
            columns["token_type_ids"] = [row.token_type_ids for row, _ in pairs]
        return columns

    def _targets(self, row: Row) -> int:
        """Tokens with a loss; a causal model has none for the first, which nothing precedes."""
        if not isinstance(row.labels, list):
            return 1
        labels = row.labels[1:] if self.kind == "causal" else row.labels
        return sum(label != IGNORED for label in labels)
