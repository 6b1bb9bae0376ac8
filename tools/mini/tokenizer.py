"""The miniature's tokenizer: byte-level BPE in CLIP's form, learned from the icons' labels and
tags.

Every byte has a token, so it takes any string. "tok" (CLIP lower-cases "TOK") is one token that no
pretraining caption contains: the rare token to which DreamBooth binds the new style.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any, cast

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

RARE_WORD = "tok"
LENGTH = 32
MERGES = 3600
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(texts: list[str], merges: int = MERGES) -> CLIPTokenizer:
    """Learn ``merges`` merge rules from ``texts``, and those that make ``RARE_WORD`` one token.

    The vocabulary is, as CLIP's: 256 bytes, 256 bytes that end a word, one token per merge, start
    and end.
    """
    rules = learn_merges(texts, merges)
    while len(pieces := _make(rules).tokenize(RARE_WORD)) > 1:
        rules.append(
            (pieces[0], pieces[1])
        )  # last in rank: no other split of a word takes precedence from an older rule
    return _make(rules)


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Byte pair encoding: the most frequent pair of neighbours, ``count`` times; ties go to the
    smaller pair.

    Each distinct text counts its words once per occurrence. Stops early when no pair is left.
    """
    splitter = _make([]).backend_tokenizer
    frequency: Counter[str] = Counter()
    for text in texts:
        normal = splitter.normalizer.normalize_str(text)
        frequency.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    words = [([*word[:-1], word[-1] + "</w>"], times) for word, times in sorted(frequency.items())]
    rules: list[tuple[str, str]] = []
    while len(rules) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, times in words:
            for pair in pairwise(symbols):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        rules.append(best)
        for symbols, _ in words:
            _merge(symbols, best)
    return rules


def _merge(symbols: list[str], pair: tuple[str, str]) -> None:
    """Join every occurrence of ``pair`` in place, left to right."""
    at = 0
    while at < len(symbols) - 1:
        if symbols[at] == pair[0] and symbols[at + 1] == pair[1]:
            symbols[at : at + 2] = [pair[0] + pair[1]]
        at += 1


def _make(rules: list[tuple[str, str]]) -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(a + b for a, b in rules),
        START,
        END,
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, rules), model_max_length=LENGTH)
