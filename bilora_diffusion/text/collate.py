"""Rows of different lengths to the tensors of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tokenizing import IGNORED

PADDING_SEGMENT = -1
HIDDEN = torch.finfo(torch.bfloat16).min
"""Added to the score of a token that must not be seen; finite as bfloat16 and as float32."""


def collate(
    rows: Sequence[Mapping[str, Any]],
    kind: str,
    pad_token_id: int,
    *,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest row.

    Args:
        rows: as ``Encoded.row`` gives them, all of one set.
        kind: "seq2seq", "causal" or "classification".
        pad_token_id: fills ``input_ids``; padding is masked, so its value does not matter.
        pad_to_multiple_of: round the width up, for tensor cores.

    Returns:
        ``input_ids`` (batch, width) int64; ``labels``, -100 where there is no loss: (batch, target
        width), or (batch,) for a classifier; ``attention_mask``: 1 for tokens and 0 for padding,
        (batch, width). ``token_type_ids`` where the tokenizer makes them. A packed batch has
        ``position_ids`` (batch, width), and its ``attention_mask`` is ``block_mask``'s.
    """
    pad = pad_to_multiple_of or 1
    batch = {"input_ids": _padded(rows, "input_ids", pad_token_id, pad)}
    if kind == "classification":
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
    else:
        batch["labels"] = _padded(rows, "labels", IGNORED, pad)
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = _padded(rows, "token_type_ids", 0, pad)
    if "segment_ids" in rows[0]:
        batch["position_ids"] = _padded(rows, "position_ids", 0, pad)
        batch["attention_mask"] = block_mask(_padded(rows, "segment_ids", PADDING_SEGMENT, pad))
    else:
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        width = batch["input_ids"].shape[1]
        batch["attention_mask"] = (torch.arange(width) < lengths).long()
    return batch


def block_mask(segments: Tensor) -> Tensor:
    """What is added to attention scores so that no token sees another segment, or a later token.

    A mask of four dimensions is used by Transformers as it is. The other way, restarting
    ``position_ids`` without any mask, is overlooked as soon as the model keeps a cache, as most
    configurations ask for. Numbers instead of booleans, because eager attention adds what it gets.
    Padding sees the padding before it, so that no row of scores is empty.

    Args:
        segments: (batch, width), the segment of each token.

    Returns:
        (batch, 1, width, width), rows are queries: 0, or ``HIDDEN`` where it must not look;
        float32. A model in half precision outside of autocast wants it in its own type.
    """
    width = segments.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    seen = same & torch.ones(width, width, dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill_(~seen, HIDDEN)


def _padded(rows: Sequence[Mapping[str, Any]], key: str, value: int, multiple: int) -> Tensor:
    width = max(len(row[key]) for row in rows)
    width += -width % multiple
    table = torch.full((len(rows), width), value, dtype=torch.long)
    for number, row in enumerate(rows):
        table[number, : len(row[key])] = torch.as_tensor(row[key], dtype=torch.long)
    return table
