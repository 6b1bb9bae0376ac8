"""Seeds and hashes that depend only on a key or on content, never on earlier random numbers.

Each kind of random choice has its own `generator`, whose key contains the run's seed and a name:
the order of the samples (for each epoch), the crop and flip, the caption, and the noise and noise
level (for each step and sample). Therefore two runs that differ only in their method get the same
data and noise, a resumed run continues exactly, and results do not depend on how samples are
distributed over processes or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time, imported in functions, so that --help does not wait for torch
    import torch
    from torch import Tensor


def seed_of(*key: int | str) -> int:
    """Return a seed in [0, 2**63) that depends only on ``key``; it is equal on all machines."""
    hash_bytes = _hash(_encode(part) for part in key)
    return int.from_bytes(hash_bytes[:8], "big") >> 1  # 63 bits, the non-negative numbers of int64


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator that is seeded by a key, such as (seed, "noise", step, sample)."""
    import torch

    return torch.Generator().manual_seed(seed_of(*key))


def digest(*tensors: Tensor) -> str:
    """Return a hash of the dtypes, shapes and exact values of tensors.

    Returns:
        32 hexadecimal digits.
    """
    import torch

    chunks = list[bytes]()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        chunks.append(_encode(f"{tensor.dtype} {tuple(tensor.shape)}"))
        if flat.numel():  # not every empty tensor can be viewed as bytes
            chunks.append(flat.view(torch.uint8).numpy().tobytes())
    return _hash(chunks).hex()


def digest_texts(texts: Iterable[str]) -> str:
    """Return a hash of a sequence of strings, which depends on their order and boundaries.

    Returns:
        32 hexadecimal digits.
    """
    return _hash(_encode(text) for text in texts).hex()


def _encode(part: int | str) -> bytes:
    """Encode a key's part with type and length, so that (1, 23), (12, 3) and ("1", 23) differ."""
    if isinstance(part, bool) or not isinstance(part, int | str):
        raise TypeError(f"a key holds ints and strings, not {type(part).__name__}: {part!r}")
    kind = "i" if isinstance(part, int) else "s"
    text = str(part).encode()
    return f"{kind}{len(text)}:".encode() + text


def _hash(chunks: Iterable[bytes]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
    return state.digest()
