"""Tokenized sets, kept on disk so that a second run or process need not tokenize again; and packed
ones: several short examples in one row, for causal models.

Each packed example keeps its own positions, by which Transformers keeps it from seeing its
neighbours; its first token has no loss, because nothing of its own precedes it. So the loss of
every token is what it is in a row of its own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from accelerate.utils import send_to_device
from datasets import config
from torch import Tensor

from ..core.errors import UserError
from ..core.seeds import digest_texts
from ..train.task import inference
from .config import TextConfig
from .examples import Example
from .models import TextModel
from .module import collate
from .tokenizing import IGNORED, ROWS, resolve_template, tokenizer_hash

FORMAT = "4"
"""Raise it when tokenization changes, so that older caches are not taken."""
MODEL_COLUMNS = ("input_ids", "labels", "token_type_ids", "position_ids")
SUMMED = ("length", "target_tokens", "truncated")
WRITE_ROWS = 1000
NO_LIMIT = 10**9
"""Tokenizers without a limit name a far larger number."""
ATTENTION = ("sdpa", "eager")
"""Attention that is given a mask made of the positions, whatever the batch size."""
logger = logging.getLogger(__name__)


class Encoded:
    """A tokenized set. Made by ``encode`` and ``pack``.

    Args:
        data: its rows: some of ``MODEL_COLUMNS``, ``sources`` (numbers of the examples in it) and
            ``SUMMED``; ``truncated`` is how many of its examples were cut.
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
        self.truncated = sum(figures["truncated"].to_pylist())  # examples that were cut to fit
        # Examples that were left out because no token of theirs would have a loss.
        self.dropped = len(examples) - sum(map(len, self.sources))

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> dict[str, Any]:
        """Lists for ``collate``: ``input_ids``, ``labels`` and what else the model takes."""
        return dict(self._rows[i])

    def name(self, i: int) -> str:
        """Name of row ``i``, "line 17 of train.jsonl"; of a packed row all that is in it."""
        return " and ".join(self.examples[source].where for source in self.sources[i])

    def example(self, i: int) -> Example:
        """Example of row ``i``, which is not packed."""
        (source,) = self.sources[i]
        return self.examples[source]


def encode(examples: Sequence[Example], cfg: TextConfig, loaded: TextModel, name: str) -> Encoded:
    """Tokenize a set, or take it from the cache if texts, tokenizer and lengths are the same.

    Examples with a blank answer are left out, long ones are cut; both are logged.

    Args:
        name: what to call the set in messages.

    Raises:
        UserError: a length that the model does not allow, or an example that can't be tokenized.
    """
    tokenizer, kind = loaded.tokenizer, loaded.kind
    settings: dict[str, Any] = {"max_length": cfg.max_length}
    if kind == "seq2seq":
        settings["max_target_length"] = cfg.max_target_length
    for option, length in settings.items():
        _check_length(option, length, loaded)
    if kind == "causal":
        settings["template"] = resolve_template(cfg.template, tokenizer)
    key = [FORMAT, kind, repr(settings), tokenizer_hash(tokenizer)]
    hashed = digest_texts([*key, *map(repr, examples)])
    pairs = kind == "classification" and "token_type_ids" in tokenizer("a", "b")
    features = _features(kind, pairs)
    folder = Path(cfg.cache_dir or config.HF_DATASETS_CACHE) / "bilora_text"
    folder.mkdir(parents=True, exist_ok=True)
    workers = min(cfg.preprocessing_num_workers or 1, len(examples))
    table = pyarrow.Table.from_pylist(
        [{**vars(example), "number": number} for number, example in enumerate(examples)]
    )
    # A fixed fingerprint spares hashing the table: `map` is told the fingerprint of its result.
    source = datasets.Dataset(table, fingerprint="examples")
    data = source.map(
        _tokenize,
        batched=True,
        remove_columns=source.column_names,
        features=features,
        fn_kwargs={
            "rows_of": partial(ROWS[kind], tokenizer=tokenizer, **settings),
            "columns": features.keys() - {"sources"},
        },
        cache_file_name=str(folder / f"{hashed}.arrow"),
        load_from_cache_file=not cfg.overwrite_cache,
        new_fingerprint=hashed,
        num_proc=workers if workers > 1 else None,
        writer_batch_size=WRITE_ROWS,
    )
    if not len(data):
        raise UserError(
            f"no row of {name} has an answer to learn from: fill its answers, or name their column"
            " by --target_column."
        )
    encoded = Encoded(data, kind, examples)
    for count, outcome in (
        (encoded.truncated, "cut to --max_length"),
        (encoded.dropped, "left out"),
    ):
        if count:
            logger.warning("%s: %d of %d rows are %s", name, count, len(examples), outcome)
    return encoded


def _features(kind: str, pairs: bool) -> datasets.Features:
    """The types of the columns; ``pairs``: the tokenizer tells two sentences apart."""
    number, ids = datasets.Value("int64"), datasets.List(datasets.Value("int32"))
    features: dict[str, Any] = {
        "input_ids": ids,
        "labels": number if kind == "classification" else ids,
        "sources": datasets.List(number),
        **dict.fromkeys(SUMMED, number),
    }
    return datasets.Features(features | ({"token_type_ids": ids} if pairs else {}))


def _tokenize(
    batch: Mapping[str, list[Any]], rows_of: Any, columns: Collection[str]
) -> dict[str, list[Any]]:
    """Columns of examples to columns of rows."""
    table = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    answered = [row for row in table if row["answer"].strip()]
    numbers = [row.pop("number") for row in answered]
    rows = rows_of([Example(**row) for row in answered]) if answered else []
    pairs = [(row, n) for row, n in zip(rows, numbers, strict=True) if row.target_tokens]
    output = {name: [getattr(row, name) for row, _ in pairs] for name in columns}
    return output | {"sources": [[n] for _, n in pairs]}


def _check_length(option: str, length: int, loaded: TextModel) -> None:
    limits = {"tokenizer": loaded.tokenizer.model_max_length, "model": loaded.max_tokens}
    for owner, limit in limits.items():
        if limit is not None and limit < NO_LIMIT and length > limit:
            raise UserError(
                f"--{option} {length} is more than the {limit} tokens that the {owner} allows: give"
                f" --{option} {limit} or less."
            )


def pack(encoded: Encoded, max_length: int) -> Encoded:
    """Put examples together into rows of at most ``max_length`` tokens, which none exceeds.

    Best-fit decreasing: the longest first, each into the row where it leaves the least room. The
    result depends on the set alone. Rows additionally hold ``position_ids``, from 0 in each
    example.
    """
    rows = []
    for members in best_fit(encoded.lengths, max_length):
        parts = [encoded.data[i] for i in members]
        sums = {name: sum(part[name] for part in parts) for name in SUMMED}
        sources = [source for part in parts for source in part["sources"]]
        rows.append({**joined(parts), **sums, "sources": sources})
    columns = encoded.data.features
    features = datasets.Features({**columns, "position_ids": columns["input_ids"]})
    data = datasets.Dataset.from_list(rows, features=features)
    return Encoded(data, encoded.kind, encoded.examples)


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The tokens of several examples as one row."""
    return {
        "input_ids": [token for part in parts for token in part["input_ids"]],
        "labels": [label for part in parts for label in [IGNORED, *part["labels"][1:]]],
        "position_ids": [place for part in parts for place in range(len(part["input_ids"]))],
    }


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the examples of each row; rows in the order in which they were begun.

    Rows are found by the room they have left, so the work grows with the examples alone: the set
    bits of ``open_rooms`` are the rooms of which there is a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    open_rooms = 0
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[example]
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(example)
        by_room.setdefault(room - length, []).append(row)
        open_rooms |= 1 << (room - length)
    return rows


def require_packable(model: Any) -> None:
    """Refuse a model whose packed examples would not be what they are alone.

    Configurations don't tell which models carry a state from token to token, so a few tokens are
    put through the model: packed behind two different neighbours, and alone.

    Raises:
        UserError: it takes no positions, has attention of another kind, or mixes packed examples.
    """
    config = model.config.get_text_config()
    unsuited = f"--packing does not suit the model type {config.model_type}, which"
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's
    if "position_ids" not in inspect.signature(plain.forward).parameters:
        raise UserError(
            f"{unsuited} takes no position_ids, so positions would run on from one example to the"
            " next: drop it."
        )
    if config._attn_implementation not in ATTENTION:
        raise UserError(
            f'--packing needs the attention "sdpa" or "eager", and the model has'
            f' "{config._attn_implementation}": give --attn_implementation sdpa.'
        )
    if next(model.parameters()).is_meta:
        return  # a dry run has no values to compare
    single, packed_first, packed_second = _probe(model)
    scale = float(single.abs().max())
    if float((packed_first - packed_second).abs().max()) > 1e-6 * scale:
        raise UserError(f"{unsuited} lets a token see the example before its own: drop it.")
    # The bound is loose, for weights in half precision.
    if float((packed_first - single).abs().max()) > 0.05 * scale:
        raise UserError(f"{unsuited} counts the positions of packed examples wrong: drop it.")


def _probe(model: Any) -> list[Tensor]:
    """Logits of three tokens: alone, and behind two neighbours that differ in their tokens."""
    last_token = model.config.get_text_config().vocab_size - 1
    probe_tokens = [5, 3, 4]
    logits = []
    with inference(model):
        for neighbours in ([], [[2, 6, 7, 8]], [[1, 0, 1, 0]]):
            tokens = [
                [min(token, last_token) for token in part] for part in (*neighbours, probe_tokens)
            ]
            batch = collate([joined([{"input_ids": p, "labels": p} for p in tokens])], "causal", 0)
            inputs: Any = send_to_device(batch, next(model.parameters()).device)
            del inputs["labels"]
            logits.append(model(**inputs, use_cache=False).logits[0, -len(probe_tokens) :].float())
    return logits
