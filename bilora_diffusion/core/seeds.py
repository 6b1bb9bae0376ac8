"""Seeds and hashes that are functions of a key or of content, never of what ran before.

Batches, crops, flips, noise and timesteps each come from ``generator(seed, "what", step, sample)``.
So two runs that differ only in their method see the same data and noise, a resumed run continues
exactly, and it does not matter how samples are shared among processes or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # elsewhere imported in functions, so that --help does not wait for torch
    import torch
    from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A seed in [0, 2**63) that is a function of ``key`` alone, the same on every machine."""
    hash_bytes = _hash(_encode(part) for part in key)
    return int.from_bytes(hash_bytes[:8], "big") >> 1  # 63 bits, as torch takes them


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator with the seed of a key, for example ``(seed, "noise", step, sample)``."""
    import torch

    return torch.Generator().manual_seed(seed_of(*key))


def digest(*tensors: Tensor) -> str:
    """Hash of tensors, of their dtypes, shapes and all bits of their values.

    Returns:
        32 hexadecimal digits.
    """
    import torch

    chunks = list[bytes]()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        chunks.append(_encode(f"{tensor.dtype} {tuple(tensor.shape)}"))
        if flat.numel():  # an empty tensor has no view as bytes
            chunks.append(flat.view(torch.uint8).numpy().tobytes())
    return _hash(chunks).hex()


def digest_texts(texts: Iterable[str]) -> str:
    """Hash of a sequence of strings, which depends on their order and borders.

    Returns:
        32 hexadecimal digits.
    """
    return _hash(_encode(text) for text in texts).hex()


def _encode(part: int | str) -> bytes:
    """Encode a part of a key with type and length, so that (1, 23), (12, 3), ("1", 23) differ."""
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
