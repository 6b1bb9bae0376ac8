"""Our own loop, Trainer and SFTTrainer take the same steps from the same adapters and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.integrations import use_bilora
from bilora_diffusion.methods import for_run
from bilora_diffusion.run import runlog
from bilora_diffusion.seeds import seed_of
from bilora_diffusion.text.config import parse_text
from bilora_diffusion.text.module import collate
from bilora_diffusion.text.script import build_task
from bilora_diffusion.train.loop import fit
from bilora_diffusion.train.order import SampleOrder
from bilora_diffusion.train.trainer import Trainer as Loop
from tests.integrations.trainers import losses, settings, tiny_llm

pytest.importorskip("trl")

STEPS, BATCH, RATE = 20, 4, 1e-2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and a file of rows of different lengths."""
    from tests.text.text_tokenizers import plain_tokenizer

    tokenizer = plain_tokenizer()
    model = tiny_llm()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [
        "what",
        "is",
        "the",
        "colour",
        "of",
        "this",
        "apple",
        "it",
        "is",
        "red",
        "and",
        "that",
        "one",
        "green",
    ]
    rows = [{"input": words[: 2 + n % 7], "target": words[n % 9 :]} for n in range(30)]
    lines = [json.dumps({key: " ".join(value) for key, value in row.items()}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


class OurRun:
    """One run of our loop over the folder's rows, and what a trainer needs to repeat it."""

    def __init__(self, folder: Path, method: str) -> None:
        AcceleratorState._reset_state(True)
        cfg = parse_text(
            [
                *("--model_name_or_path", str(folder / "model"), "--task_type", "causal"),
                *("--max_length", "64"),
                *("--train_file", str(folder / "rows.jsonl"), "--method", method),
                *("--rank", "4", "--lora_alpha", "8", "--learning_rate", str(RATE)),
                *("--train_batch_size", "2", "--gradient_accumulation_steps", "2"),
                *("--max_train_steps", str(STEPS), "--lr_scheduler", "cosine"),
                *("--lr_warmup_steps", "3", "--max_grad_norm", "0.5"),
                *("--output_dir", str(folder / method), "--report_to", "none"),
            ]
        )
        accelerator = Accelerator(mixed_precision="no")
        task = build_task(cfg, accelerator)
        self.kind, self.pad = task.loaded.kind, task.loaded.tokenizer.pad_token_id
        self.tokenizer = task.loaded.tokenizer
        self.model: Any = task.loaded.model
        order = SampleOrder(len(task.data.train), cfg.seed)
        rows = [task.data.train.row(order.sample(n)) for n in range(STEPS * BATCH)]
        self.rows = Dataset.from_list([{k: list(v) for k, v in row.items()} for row in rows])
        loop = Loop(task, for_run(task.cfg, STEPS), task.cfg, accelerator)
        self.first = {
            name: adapters.state_dict(self.model, name) for name in adapters.names(self.model)
        }
        log = runlog.RunLog(folder / method, accelerator.device)
        log.start(cfg.to_dict(), method, cfg.seed, None, num_steps=STEPS)
        fit(loop, folder / method, log)
        self.seed = seed_of(cfg.seed, "adapters")
        self.rho: Any = cfg.rho
        self.losses = [row["loss"] for row in runlog.read_metrics(folder / method) if "loss" in row]

    def collator(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate(rows, self.kind, self.pad)

    def trainer(self, kind: type[Trainer], args: type[TrainingArguments], model: Any) -> Any:
        AcceleratorState._reset_state(True)
        given = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": RATE,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "max_grad_norm": 0.5,
            "optim": "adamw_torch_fused",
        }
        if kind is not Trainer:
            given |= {"bf16": False, "gradient_checkpointing": False}
        return kind(
            model=model,
            args=args(**settings(Path("unused"), **given)),
            train_dataset=self.rows,  # type: ignore[arg-type]
            data_collator=self.collator,  # type: ignore[arg-type]
            processing_class=self.tokenizer,
        )


def fresh(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
def test_bilora_is_the_same_through_a_trainer(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(folder)
    ours = OurRun(folder, "bilora")
    model = fresh(folder)
    torch.manual_seed(ours.seed)
    bilora = attach(model, BiLoRAConfig(rank=4, alpha=8, rho=ours.rho))
    for adapter in (PRIMARY, AUXILIARY):
        own = adapters.state_dict(model, adapter)
        first = ours.first[adapter]
        assert all(torch.equal(first[key], value) for key, value in own.items())
    kinds: dict[str, Any] = {
        "Trainer": (Trainer, TrainingArguments),
        "SFTTrainer": (SFTTrainer, SFTConfig),
    }
    kind, args = kinds[name]
    trainer = ours.trainer(kind, args, model)
    use_bilora(trainer, bilora)
    trainer.train()
    assert losses(trainer) == pytest.approx(ours.losses, abs=1e-5)
    for adapter in (PRIMARY, AUXILIARY):
        left, right = (adapters.state_dict(m, adapter) for m in (ours.model, model))
        worst = max((left[key] - right[key]).abs().max().item() for key in left)
        assert worst < 1e-5, adapter
        moved = max((left[key] - ours.first[adapter][key]).abs().max().item() for key in left)
        assert moved > 1e-3


@pytest.mark.slow
def test_lora_is_the_same_through_peft_and_a_trainer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    ours = OurRun(folder, "lora")
    model = get_peft_model(
        fresh(folder), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    adapters.load_state_dict(
        model,
        PRIMARY,
        {adapters.peft_path(key): value for key, value in ours.first[PRIMARY].items()},
    )
    trainer = ours.trainer(Trainer, TrainingArguments, model)
    trainer.train()
    assert losses(trainer) == pytest.approx(ours.losses, abs=1e-5)
