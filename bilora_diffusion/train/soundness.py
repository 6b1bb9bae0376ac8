"""Faults of a model whose files are there, for images and text: one sentence each, before anything
is trained, where libraries fill in what is missing and only warn, or fail in the first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import PICKLED, UserError, reading

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_safetensors(part: str, folder: Path) -> None:
    """Refuse a folder whose weights are pickles, by their names or by its index of files."""
    names = sorted(path.name for path in folder.glob("*"))
    # A folder may hold both kinds, as many on the hub do: then the libraries read safetensors.
    pickles = []
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLES)]
    for path in folder.glob("*.safetensors.index*.json"):
        parts = reading(
            part,
            "download or write it again",
            lambda path=path: json.loads(path.read_text(encoding="utf-8"))["weight_map"].values(),
        )
        pickles += [str(name) for name in parts if not str(name).endswith(".safetensors")]
    if pickles:
        raise UserError(f"{part} can't be read, since {PICKLED.format(f' but {pickles[0]}')}.")


def require_whole(part: str, missing: Iterable[str]) -> None:
    """Refuse weights that lack some, which libraries would leave empty or draw at random."""
    names = sorted(missing)
    if names:
        remainder = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"{part} lacks weights ({names[0]}{remainder}): download or write it again, or give"
            " another model."
        )


def require_words(part: str, tokenizer: Any, rows: int | None, fix: str) -> None:
    """Refuse a tokenizer that knows no words, or makes numbers that its model does not know.

    Args:
        part: the tokenizer in the user's words.
        tokenizer: of Transformers.
        rows: how many tokens the model has embeddings for; None where it can't be told.
        fix: what to do, without a period.
    """
    vocabulary = tokenizer.get_vocab()
    # Without its files Transformers makes an empty one of some types, and says nothing; that of T5
    # knows the mark of a space.
    if not {word for word in vocabulary if word != "▁"} - set(tokenizer.all_special_tokens):
        raise UserError(f"{part} knows no words: {fix}.")
    if rows is None:
        return
    # Added tokens that nothing uses, as some models have, do no harm.
    words = set(vocabulary) - set(tokenizer.get_added_vocab())
    words |= {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token} & set(vocabulary)
    largest = max((vocabulary[word] for word in words), default=0)
    if largest >= rows:
        raise UserError(
            f"{part} has numbers up to {largest}, and the model knows {rows} tokens only: {fix}."
        )
