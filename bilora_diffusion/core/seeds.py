"""Random generators and digests that depend on what they are for, never on what ran before.

Batches, crops, flips, noise and timesteps each come from ``generator(seed, "what", step, sample)``.
So two runs that differ only in their method see the same data and noise, a resumed run continues
exactly, and it does not matter how samples are shared among processes or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # in functions, so that --help does not wait for torch
    import torch
    from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A seed in [0, 2**63) that is a function of ``key`` alone; it is the same on every machine."""
    return int.from_bytes(_hash(_encode(part) for part in key)[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by ``key`` alone, for example ``(seed, "noise", step, sample)``."""
    import torch

    return torch.Generator().manual_seed(seed_of(*key))


def digest(*tensors: Tensor) -> str:
    """Identifies tensors by dtype, shape and every bit of their values; 32 hexadecimal digits."""
    return _hash(chunk for tensor in tensors for chunk in _tensor_parts(tensor)).hex()


def digest_texts(texts: Iterable[str]) -> str:
    """Identifies a sequence of strings, order and borders included; 32 hexadecimal digits."""
    return _hash(_encode(text) for text in texts).hex()


def parts(names: Iterable[str], count: int) -> list[list[int]]:
    """The positions of ``names`` dealt into ``count`` parts whose sizes differ by one at most.

    Which part a name falls into depends on the names and the count alone, not on their order or on
    a run's seed, so that all runs which are compared hold out the same.

    Raises:
        ValueError: fewer names than parts, or a name that stands twice.
    """
    listed = list(names)
    if not 0 < count <= len(listed):
        raise ValueError(f"{len(listed)} names can't be dealt into {count} parts.")
    if len(set(listed)) < len(listed):
        raise ValueError("A name stands twice.")
    order = sorted(range(len(listed)), key=lambda i: (seed_of("part", listed[i]), listed[i]))
    return [sorted(order[part::count]) for part in range(count)]


def _tensor_parts(tensor: Tensor) -> tuple[bytes, bytes]:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    values = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return _encode(f"{tensor.dtype} {tuple(tensor.shape)}"), values


def _encode(part: int | str) -> bytes:
    # The type and the length stand in front, so that (1, 23), (12, 3) and ("1", 23) differ.
    if isinstance(part, bool) or not isinstance(part, int | str):
        raise TypeError(f"a key holds ints and strings, not {type(part).__name__}: {part!r}")
    kind, text = ("i" if isinstance(part, int) else "s"), str(part).encode()
    return f"{kind}{len(text)}:".encode() + text


def _hash(chunks: Iterable[bytes]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
    return state.digest()
