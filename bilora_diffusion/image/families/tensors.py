"""Helpers for a denoiser's conditions, padded sequences, and latents as tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# A denoiser's inputs other than noisy latents and noise levels, for n rows: tensors (n, ...), or
# lists of n tensors if the rows differ in length.
Conditions = dict[str, Any]


def split_rows(conditions: Conditions) -> list[Conditions]:
    """Split the conditions of n rows into n conditions of one row each, on the CPU."""
    on_cpu = move(conditions, torch.device("cpu"), None)
    count = len(next(iter(on_cpu.values())))
    rows = []
    for i in range(count):
        # A slice instead of an index keeps the batch dimension, or a list of one item.
        rows.append({name: values[i : i + 1] for name, values in on_cpu.items()})
    return rows


def join_rows(parts: Sequence[Conditions]) -> Conditions:
    """Join conditions along their rows, the reverse of `split_rows`."""
    joint: Conditions = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, Tensor):
            joint[name] = torch.cat(values)
        else:
            joint[name] = list(itertools.chain(*values))
    return joint


def move(conditions: Conditions, device: torch.device, dtype: torch.dtype | None) -> Conditions:
    """Move conditions to a device, and cast floating-point values unless ``dtype`` is None."""

    def move(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return value.to(device, dtype)
        return value.to(device)

    result: Conditions = {}
    for name, values in conditions.items():
        if isinstance(values, Tensor):
            result[name] = move(values)
        else:
            result[name] = [move(value) for value in values]
    return result


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad n sequences, (length, ...) each, with zeros at their ends.

    Returns:
        The padded sequences, (n, longest, ...), and their mask of ones and zeros, (n, longest).
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded, (positions < lengths[:, None]).long()


def pad_if_needed(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pad like `pad`, with a boolean mask.

    The mask is None if all lengths are equal, since attention is faster without a mask.
    """
    padded, mask = pad(sequences)
    if all(len(sequence) == len(sequences[0]) for sequence in sequences):
        return padded, None
    return padded, mask.bool()


def unpad(sequences: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the tokens of each sequence that its mask keeps, (count, ...) each.

    Args:
        sequences: (n, length, ...).
        mask: (n, length).
    """
    return [row[mask_row.bool()] for row, mask_row in zip(sequences, mask, strict=True)]


def pack(latents: Tensor) -> Tensor:
    """Turn patches of 2 x 2 latents, (n, c, h, w), into tokens, (n, h/2 w/2, 4 c)."""
    patches = nn.functional.pixel_unshuffle(latents, 2)  # (n, 4 c, h/2, w/2)
    return patches.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Turn tokens into latents of this height and width, (n, c, h, w): the reverse of `pack`."""
    patches = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(patches, 2)
