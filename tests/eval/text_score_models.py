"""A small language model, adapters on it, run folders and harness tasks, for tests of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from bilora_diffusion.run.runlog import RunLog

LETTERS = ("A", "B")


def save_base(folder: Path, seed: int = 0) -> Path:
    """A random Llama of two layers that reads bytes, with its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Fast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, scale: float = 1.0, seed: int = 0) -> Path:
    """A LoRA adapter on the base model's attention; ``scale`` 0 makes one that does nothing."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(scale)
    model.save_pretrained(str(folder))
    return folder


def save_run(
    base: Path,
    folder: Path,
    *,
    method: str = "lora",
    seed: int = 0,
    scale: float = 1.0,
    **config: Any,
) -> Path:
    """A run folder as training leaves it: adapter, record, recorded figures."""
    log = RunLog(folder)
    options = {
        "model_name_or_path": str(base),
        "task_type": "causal",
        "task": "toy",
        "template": "plain",
        "method": method,
        "seed": seed,
        "rank": 2,
    }
    log.start(options | config, method=method, seed=seed, resume_step=None)
    log.metric(1, loss=2.0)
    log.metric(5, heldout_loss=1.5 + seed / 10, heldout_accuracy=0.5)
    log.metric(10, heldout_loss=1.0 + seed / 10, heldout_accuracy=0.75 + seed / 100)
    log.finish()
    save_adapter(base, folder, scale, seed=100 * seed + len(method))
    return folder


def save_tasks(folder: Path) -> Path:
    """Two local harness tasks of twelve items: ``toy_choice`` and ``toy_text``."""
    folder.mkdir()
    rows = [
        {
            "question": f"Letter number {n}?",
            "choices": list(LETTERS),
            "gold": n % 2,
            "answer": str(n),
        }
        for n in range(12)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n    train: {data}\n"
        "test_split: test\ntraining_split: train\n"
        'doc_to_text: "{{question}}"\n'
    )
    choice = (
        f"task: toy_choice\n{shared}output_type: multiple_choice\n"
        "doc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        "metadata:\n  version: 1.0\n"
    )
    text = (
        f'task: toy_text\n{shared}output_type: generate_until\ndoc_to_target: "{{{{answer}}}}"\n'
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 4\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
        "filter_list:\n  - name: digits\n    filter:\n      - function: regex\n"
        "        regex_pattern: '(\\d+)'\n      - function: take_first\n"
        "metadata:\n  version: 1.0\n"
    )
    (folder / "toy_choice.yaml").write_text(choice, encoding="utf-8")
    (folder / "toy_text.yaml").write_text(text, encoding="utf-8")
    return folder
