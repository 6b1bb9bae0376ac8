"""Several short examples in one row, for causal models: less padding, the same losses.

Every example keeps its own positions and sees nothing of its neighbours (``module.block_mask``);
the first token of each has no loss, because nothing of its own precedes it. So the loss of every
token is what it is in a row of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from accelerate.utils import send_to_device
from torch import Tensor

from ..errors import UserError
from ..train.task import inference
from .encode import MODEL_COLUMNS, Encoded
from .module import collate
from .tokenizing import IGNORED

SUMMED = ("length", "target_tokens", "truncated")
ATTENTION = ("sdpa", "eager")
"""Attention that takes a mask of four dimensions as it is."""


def pack(encoded: Encoded, max_length: int) -> Encoded:
    """Put examples together into rows of at most ``max_length`` tokens.

    Best-fit decreasing: the longest first, each into the row where it leaves the least room. The
    result depends on the set alone. Rows additionally hold ``position_ids``, from 0 in each
    example, and ``segment_ids``, which number the examples of a row.

    Raises:
        UserError: an example is longer than a row.
        ValueError: the set is not for a causal model, or packed already.
    """
    if encoded.kind != "causal" or "segment_ids" in encoded.columns:
        raise ValueError("only single examples for a causal model can be packed")
    longest = max(range(len(encoded)), key=encoded.lengths.__getitem__)
    if encoded.lengths[longest] > max_length:
        raise UserError(
            f"{encoded.name(longest)} has {encoded.lengths[longest]} tokens, more than the"
            f" {max_length} of a packed row: tokenize with --max_length {max_length}."
        )
    rows = []
    for members in best_fit(encoded.lengths, max_length):
        parts = [encoded.data[i] for i in members]
        sums = {name: sum(part[name] for part in parts) for name in SUMMED}
        sources = [source for part in parts for source in part["sources"]]
        rows.append({**joined(parts), **sums, "sources": sources})
    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int64")
    features = {
        name: ids if name in MODEL_COLUMNS else number if name in SUMMED else datasets.List(number)
        for name in rows[0]
    }
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    return Encoded(data, encoded.kind, encoded.examples)


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The tokens of several examples as one row."""
    lengths = [len(part["input_ids"]) for part in parts]
    return {
        "input_ids": [token for part in parts for token in part["input_ids"]],
        "labels": [label for part in parts for label in [IGNORED, *part["labels"][1:]]],
        "position_ids": [place for length in lengths for place in range(length)],
        "segment_ids": [n for n, length in enumerate(lengths) for _ in range(length)],
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


def require_packable(model: Any, max_length: int) -> None:
    """Refuse a model whose packed examples would not be what they are alone.

    Configurations don't tell which models carry a state from token to token, so a few tokens are
    put through the model: packed behind two different neighbours, and alone.

    Args:
        model: a Transformers model for causal language modelling, with or without adapters.
        max_length: tokens of a packed row.

    Raises:
        UserError: it takes no positions, sees a window that is shorter than a row, has attention
            that takes no mask of four dimensions, or mixes packed examples.
    """
    config = model.config.get_text_config()
    whole = getattr(model, "get_base_model", lambda: model)()
    if "position_ids" not in inspect.signature(whole.forward).parameters:
        raise _unsuitable(
            config, "takes no position_ids, so positions would run on from one example to the next"
        )
    if config._attn_implementation not in ATTENTION:
        raise UserError(
            f'--packing needs the attention "sdpa" or "eager", and the model has'
            f' "{config._attn_implementation}": give --attn_implementation sdpa.'
        )
    for window in _windows(config):
        if window < max_length:
            raise _unsuitable(
                config, f"looks back only {window} tokens, fewer than a packed row of {max_length}"
            )
    try:
        alone, packed, other = _probe(model)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise _unsuitable(
            config, f"takes no mask of four dimensions ({str(error).splitlines()[0]:.80})"
        ) from error
    scale = float(alone.abs().max())
    if float((packed - other).abs().max()) > 1e-6 * scale:
        raise _unsuitable(config, "lets a token see the example before its own")
    if float((packed - alone).abs().max()) > 0.05 * scale:  # loose, for weights in half precision
        raise _unsuitable(config, "counts the positions of packed examples wrong")


def _unsuitable(config: Any, why: str) -> UserError:
    return UserError(
        f"--packing does not suit the model type {config.model_type}, which {why}: drop it."
    )


def _probe(model: Any) -> list[Tensor]:
    """Logits of three tokens: alone, and behind two neighbours that differ in their tokens."""
    most = model.config.get_text_config().vocab_size - 1
    asked = [5, 3, 4]
    logits = []
    with inference(model):
        for neighbours in ([], [[2, 6, 7, 8]], [[1, 0, 1, 0]]):
            tokens = [[min(token, most) for token in part] for part in (*neighbours, asked)]
            row = joined([{"input_ids": part, "labels": part} for part in tokens])
            batch = collate([row], "causal", 0)
            del batch["labels"]
            batch["attention_mask"] = batch["attention_mask"].to(model.dtype)
            given = send_to_device(batch, next(model.parameters()).device)
            logits.append(model(**given).logits[0, -len(asked) :].float())
    return logits


def _windows(config: Any) -> list[int]:
    """How far attention looks back, where that is limited."""
    if getattr(config, "use_sliding_window", True) is False:
        return []
    names = ("sliding_window", "attention_chunk_size", "window_size")
    values = [getattr(config, name, None) for name in names]
    return [value for value in values if isinstance(value, int)]
