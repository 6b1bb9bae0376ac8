"""Small tokenizers of the same classes as the models' own, built in code."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

from bilora_diffusion.mini import pipeline_dir

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""Qwen-Image's text before a prompt: 34 tokens, both in Qwen's tokenizer and in this one."""

WORDS = " a icon in style TOK rabbit photo of"
STARTS = ["system", "Describe", "user", "assistant"]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def numbered(words: Sequence[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def qwen_tokenizer() -> Any:
    """Build a byte-level BPE tokenizer in which each word of the templates is one token.

    Its padding side (right) and its maximum length are those of Qwen's tokenizer.
    """
    vocab = numbered(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: Any = []
    words = re.findall("[A-Za-z]+", re.sub(r"<\|\w+\|>", " ", TEMPLATE) + WORDS)
    # Merges are applied in this order. Words after a space come first so that no other merge splits
    # them.
    spaced_words = [f"Ġ{word}" for word in words]
    for word in spaced_words + STARTS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=131072)
    marks: Any = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = CHAT
    assert len(tokenizer(TEMPLATE).input_ids) == 34
    return tokenizer


def t5_tokenizer() -> Any:
    """Build a unigram tokenizer of characters and a few words."""
    words = [f"▁{word}" for word in WORDS.split() + list(string.ascii_lowercase)]
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -4.0}
    scores |= dict.fromkeys(words, -2.0) | dict.fromkeys(sorted(CHARACTERS), -3.0)
    return T5Tokenizer(vocab=list(scores.items()), extra_ids=1, model_max_length=512)


def gemma_tokenizer() -> Any:
    """Build a tokenizer of single characters.

    Like Gemma's, it starts each text with a special token and has no maximum length.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    words = GemmaTokenizer(vocab=numbered(special + list(CHARACTERS)), add_bos_token=True)
    assert words("").input_ids == [words.bos_token_id]
    return words


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPTokenizer.from_pretrained(pipeline_dir() / "tokenizer"),
    "t5": t5_tokenizer,
    "qwen": qwen_tokenizer,
    "gemma": gemma_tokenizer,
}
