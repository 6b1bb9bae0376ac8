"""Our own loop and Trainer take the same steps from the same adapters and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.integrations import use_bilora
from bilora_diffusion.run.checkpoint import ADAPTERS
from bilora_diffusion.seeds import seed_of
from bilora_diffusion.text.config import resolve
from bilora_diffusion.text.module import collate
from bilora_diffusion.text.script import build_task
from bilora_diffusion.train.order import SampleOrder
from tests.integrations.trainers import losses, settings
from tests.scripts.runs import column
from tests.text.text_builders import WORDS, save_llama, text_flags, train_text, write_rows

STEPS, BATCH, RATE = 20, 4, 1e-2


@pytest.mark.slow
def test_a_trainer_takes_our_steps(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    rows = [{"input": WORDS[: 2 + n % 7], "target": WORDS[n % 9 : 14]} for n in range(30)]
    joined = [{key: " ".join(value) for key, value in row.items()} for row in rows]
    given = {
        **{"model_name_or_path": base, "task_type": "causal", "max_length": 64},
        **{"train_file": write_rows(tmp_path / "rows.jsonl", joined), "rank": 4, "lora_alpha": 8},
        **{
            "learning_rate": RATE,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 3,
            "warmup_ratio": None,
        },
        **{"max_grad_norm": 0.5, "train_batch_size": 2, "gradient_accumulation_steps": 2},
        **{"max_train_steps": STEPS, "checkpointing_steps": STEPS},
    }
    run = train_text(tmp_path / "run", **given)

    AcceleratorState._reset_state(True)
    cfg: Any = resolve(text_flags(tmp_path / "other", **given))
    task = build_task(cfg, Accelerator(mixed_precision="no"))
    order, tokenizer = SampleOrder(len(task.data.train), cfg.seed), task.loaded.tokenizer
    seen = [task.data.train.row(order.sample(n)) for n in range(STEPS * BATCH)]
    data: Any = Dataset.from_list([{k: list(v) for k, v in row.items()} for row in seen])
    AcceleratorState._reset_state(True)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed_of(cfg.seed, "adapters"))
    bilora = attach(model, BiLoRAConfig(rank=4, alpha=8, rho=cfg.rho))
    values = {
        **{"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        **{"learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        **{"max_grad_norm": 0.5, "optim": "adamw_torch_fused"},
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings(tmp_path / "unused", **values)),
        train_dataset=data,
        data_collator=lambda rows: collate(rows, task.loaded.kind, tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    use_bilora(trainer, bilora)
    trainer.train()
    assert losses(trainer) == pytest.approx(column(run, "loss"), abs=1e-5)
    saved = load_file(run / "checkpoints" / f"step-{STEPS}" / ADAPTERS)
    for adapter in (PRIMARY, AUXILIARY):
        own = adapters.state_dict(model, adapter)
        assert all((saved[f"model/{adapter}/{k}"] - v).abs().max() < 1e-5 for k, v in own.items())
