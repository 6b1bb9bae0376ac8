"""Checks of a loaded model, for images and text: each refuses a fault in one sentence.

Libraries replace missing parts and only warn, or fail in the first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import PICKLED, UserError, read_or_refuse

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_safetensors(part: str, folder: Path) -> None:
    """Refuse a folder with weights in pickles, by the names of its files or by its index.

    Args:
        part: the weights in the user's words.
        folder: folder of the model.

    Raises:
        UserError: the weights are pickles, or the index can't be read.
    """
    names = sorted(path.name for path in folder.glob("*"))
    # Of a folder with both kinds, as many on the hub, the libraries read the safetensors.
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
    """Refuse incomplete weights; libraries would leave the missing ones empty or random."""
    names = sorted(missing)
    if names:
        remainder = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"{part} lacks weights ({names[0]}{remainder}): download or write it again, or give"
            " another model."
        )


def require_words(part: str, tokenizer: Any, rows: int | None, fix: str) -> None:
    """Refuse a tokenizer without words, or with more tokens than its model has embeddings for.

    Args:
        part: the tokenizer in the user's words.
        tokenizer: tokenizer of Transformers.
        rows: number of embeddings of the model; None if not known.
        fix: end of the sentence, without a period.

    Raises:
        UserError: it has no words, or too many tokens.
    """
    vocabulary = tokenizer.get_vocab()
    # Without its files Transformers makes an empty tokenizer of some types, and does not warn. T5's
    # has the mark of a space even then.
    words = set(vocabulary) - {"▁"} - set(tokenizer.all_special_tokens)
    if not words:
        raise UserError(f"{part} knows no words: {fix}.")
    if rows is None:
        return
    # Some models have added tokens without embeddings, which no text uses; padding, EOS and BOS are
    # used.
    used_tokens = set(vocabulary) - set(tokenizer.get_added_vocab())
    used_tokens |= {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token} & set(vocabulary)
    largest = max((vocabulary[token] for token in used_tokens), default=0)
    if largest >= rows:
        raise UserError(
            f"{part} has numbers up to {largest}, and the model knows {rows} tokens only: {fix}."
        )
