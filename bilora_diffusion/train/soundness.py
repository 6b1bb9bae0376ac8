"""Checks of a model's files and of a loaded model. Each one reports a fault in one sentence.

Without these checks, libraries replace missing parts and only warn, or they fail in the first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import PICKLED, UserError, read_or_refuse

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_safetensors(part: str, folder: Path) -> None:
    """Check that a folder's weights are not pickles, by its file names and its index.

    Args:
        part: name of the weights for the user.
        folder: folder of the model.

    Raises:
        UserError: the weights are pickles, or the index can't be read.
    """
    names = sorted(path.name for path in folder.glob("*"))
    # Many folders on the hub have both kinds, of which libraries read the safetensors files.
    pickles = []
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLES)]
    for path in folder.glob("*.safetensors.index*.json"):
        files = read_or_refuse(
            part,
            "download or write it again",
            lambda path=path: json.loads(path.read_text(encoding="utf-8"))["weight_map"].values(),
        )
        pickles += [str(name) for name in files if not str(name).endswith(".safetensors")]
    if pickles:
        raise UserError(f"{part} can't be read, since {PICKLED.format(f' but {pickles[0]}')}.")


def require_whole(part: str, missing: Iterable[str]) -> None:
    """Check that no weights are missing; libraries would leave them empty or random."""
    names = sorted(missing)
    if names:
        remainder = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"{part} lacks weights ({names[0]}{remainder}): download or write it again, or give"
            " another model."
        )


def require_words(part: str, tokenizer: Any, rows: int | None, fix: str) -> None:
    """Check that a tokenizer has words, and that its model has an embedding for each used token.

    Args:
        part: name of the tokenizer for the user.
        tokenizer: tokenizer of Transformers.
        rows: number of the model's embeddings; None if unknown.
        fix: advice at the end of the message, without a period.

    Raises:
        UserError: the tokenizer has no words, or a used token has no embedding.
    """
    vocabulary = tokenizer.get_vocab()
    # If the files are missing, Transformers creates an empty tokenizer for some types without a
    # warning. T5's empty tokenizer still has the marker for a space.
    words = set(vocabulary) - {"▁"} - set(tokenizer.all_special_tokens)
    if not words:
        raise UserError(f"{part} has no words: {fix}.")
    if rows is None:
        return
    # Some models have added tokens without embeddings, which no text uses. Padding, EOS and BOS
    # tokens are used.
    used_tokens = set(vocabulary) - set(tokenizer.get_added_vocab())
    used_tokens |= {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token} & set(vocabulary)
    largest = max((vocabulary[token] for token in used_tokens), default=0)
    if largest >= rows:
        raise UserError(
            f"{part} has token ids up to {largest}, but the model has only {rows} embeddings:"
            f" {fix}."
        )
