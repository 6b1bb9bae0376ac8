"""Tiny random language models and classifiers in folders, files of rows, and short runs on them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bilora_diffusion.run import runlog
from bilora_diffusion.text.encode import Encoded, encode
from bilora_diffusion.text.evaluation import Evaluation
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.models import TextModel, load_text_model
from bilora_diffusion.text.module import TextModule
from bilora_diffusion.text.rows import encode_rows, open_rows
from bilora_diffusion.train.running import DTYPES
from tests.text.text_tokenizers import (
    bert_tokenizer,
    chat_tokenizer,
    plain_tokenizer,
    t5_tokenizer,
)

WORDS = [
    *("what", "is", "the", "colour", "of", "this", "apple", "it", "red"),
    *("and", "that", "green", "say", "hello", "to", "me", "there"),
]
NUMBERS = ["one", "two", "three", "four", "five"]
KINDS = ("seq2seq", "causal", "classification")
ADAPTER = "adapter_model.safetensors"


def save_t5(folder: Path, **settings: Any) -> Path:
    """A T5 without dropout that reads words."""
    tokenizer = t5_tokenizer()
    config = T5Config(
        **{
            **{"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 64},
            **{"num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
            **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
            **settings,
        }
    )
    return _save(folder, T5ForConditionalGeneration, config, tokenizer)


def save_llama(folder: Path, *, chat: bool = False, **settings: Any) -> Path:
    """A Llama that reads pieces of words, with a chat template or without."""
    tokenizer = chat_tokenizer() if chat else plain_tokenizer()
    config = LlamaConfig(
        **{
            **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512},
            **{"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
            **settings,
        }
    )
    return _save(folder, LlamaForCausalLM, config, tokenizer)


def save_gpt2(folder: Path, **settings: Any) -> Path:
    """A GPT-2 without dropout, whose positions are learned and few."""
    tokenizer = plain_tokenizer()
    config = GPT2Config(
        **{
            **{"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4},
            **{"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            **{"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id},
            **settings,
        }
    )
    return _save(folder, GPT2LMHeadModel, config, tokenizer)


def save_bert(folder: Path, architecture: Any = BertForSequenceClassification, **more: Any) -> Path:
    """A BERT without dropout of two classes, or another model of its configuration."""
    return _save(folder, architecture, bert_config(**more), bert_tokenizer())


def bert_config(**settings: Any) -> BertConfig:
    """Of a BERT without dropout that reads words."""
    return BertConfig(
        **{
            **{"vocab_size": len(bert_tokenizer()), "hidden_size": 32, "intermediate_size": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64},
            **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            **settings,
        }
    )


SAVERS: dict[str, Any] = {"seq2seq": save_t5, "causal": save_llama, "classification": save_bert}


def _save(folder: Path, architecture: Any, config: Any, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    architecture(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_for(kind: str, count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows whose answers a model can learn, of different lengths; all prompts differ."""
    rows = []
    for n in range(first, first + count):
        words = [WORDS[(n // 17**place) % 17] for place in range(2)] + WORDS[: n % 5]
        answer = f"{NUMBERS[n % 5]} {NUMBERS[n // 5 % 5]}"[: None if n % 3 else 4].strip()
        label = "positive" if n % 2 else "negative"
        rows.append(
            {"prompt": " ".join(words), "answer": label if kind == "classification" else answer}
        )
    return rows


def encoded(
    examples: list[Example],
    tokenizer: Any,
    kind: str = "causal",
    max_tokens: int | None = None,
    **settings: Any,
) -> Encoded:
    """Examples as a run with these settings tokenizes them."""
    cfg: dict[str, Any] = {"max_length": 512, "max_target_length": 8, "template": "auto"}
    cfg |= {"preprocessing_num_workers": None, "overwrite_cache": False, "cache_dir": None}
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, kind=kind, max_tokens=max_tokens)
    return encode(examples, SimpleNamespace(**cfg | settings), loaded, "the set")


def material(folder: Path, kind: str) -> dict[str, Any]:
    """A base model and rows to learn, for ``text_flags``."""
    return {
        "model_name_or_path": SAVERS[kind](folder / "base"),
        "train_file": write_rows(folder / "rows.jsonl", rows_for(kind, 24)),
        "template": "plain",
        "train_batch_size": 4,
    }


def text_flags(folder: Path, **values: Any) -> list[str]:
    """A command line; True is a bare flag, None leaves an option out."""
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
    argv: list[str] = []
    for name, value in settings.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def train_text(folder: Path, **values: Any) -> Path:
    """A run in this process; returns its folder."""
    from bilora_diffusion.text.script import main

    # accelerate keeps one precision for a whole process; each run here is to choose its own.
    AcceleratorState._reset_state()
    main(text_flags(folder, **values))
    return folder


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run left: of its adapter, or of the whole model."""
    whole = folder / "model" / "model.safetensors"
    return load_file(whole if whole.exists() else folder / ADAPTER)


def text_difference(a: Path, b: Path) -> float:
    """The largest difference between two runs' weights."""
    left, right = exported(a), exported(b)
    assert left.keys() == right.keys()
    return max((left[key] - right[key]).abs().max().item() for key in left)


def loaded_run(base: Path, folder: Path, **settings: Any) -> TextModel:
    """The base with a run's adapter as PEFT loads it, or the whole model that the run left."""
    if (folder / "model").exists():
        return load_text_model(str(folder / "model"), **settings)
    from peft import PeftModel

    loaded = load_text_model(str(base), **settings)
    model = PeftModel.from_pretrained(loaded.model, str(folder))
    return TextModel(model.eval(), loaded.tokenizer, loaded.kind)


def heldout_of(base: Path, folder: Path) -> dict[str, float]:
    """A run's held-out figures, measured anew on what it exported."""
    cfg = SimpleNamespace(**runlog.read_run(folder)["config"])
    rows = open_rows(cfg)
    classes = rows.label_words if cfg.task_type == "classification" else None
    dtype = DTYPES["no" if cfg.method == "full" else cfg.mixed_precision]
    loaded = loaded_run(base, folder, task_type=cfg.task_type, labels=classes, dtype=dtype)
    data = encode_rows(cfg, rows, loaded)
    return Evaluation(cfg, loaded, TextModule(loaded.model, loaded.kind), data).measure()
