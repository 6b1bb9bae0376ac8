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
from bilora_diffusion.run.checkpoint import load_tensors
from bilora_diffusion.seeds import seed_of
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.module import collate
from bilora_diffusion.text.script import build_task
from bilora_diffusion.train.loop import fit
from bilora_diffusion.train.order import SampleOrder
from bilora_diffusion.train.trainer import Trainer as Loop
from tests.integrations.trainers import losses, settings, tiny_llm
from tests.text.text_builders import WORDS

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
    rows = [{"input": WORDS[: 2 + n % 7], "target": WORDS[n % 9 : 14]} for n in range(30)]
    lines = [json.dumps({key: " ".join(value) for key, value in row.items()}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


class OurRun:
    """One run of our loop over the folder's rows, and what a trainer needs to repeat it."""

    def __init__(self, folder: Path, method: str) -> None:
        AcceleratorState._reset_state(True)
        model, rows = folder / "model", folder / "rows.jsonl"
        argv = f"""--model_name_or_path {model} --task_type causal --max_length 64
            --train_file {rows} --method {method} --rank 4 --lora_alpha 8 --learning_rate {RATE}
            --train_batch_size 2 --gradient_accumulation_steps 2 --max_train_steps {STEPS}
            --lr_scheduler cosine --lr_warmup_steps 3 --max_grad_norm 0.5
            --output_dir {folder / method} --report_to none"""
        cfg = resolve_text(argv.split())
        accelerator = Accelerator(mixed_precision="no")
        task = build_task(cfg, accelerator)
        self.kind, self.pad = task.loaded.kind, task.loaded.tokenizer.pad_token_id
        self.tokenizer = task.loaded.tokenizer
        self.model: Any = task.loaded.model
        order = SampleOrder(len(task.data.train), cfg.seed)
        rows = [task.data.train.row(order.sample(n)) for n in range(STEPS * BATCH)]
        self.rows = Dataset.from_list([{k: list(v) for k, v in row.items()} for row in rows])
        loop = Loop(task, for_run(vars(cfg), STEPS), task.cfg, accelerator)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bi-LoRA, Trainer", "Bi-LoRA, SFTTrainer", "LoRA, Trainer"])
def test_a_trainer_takes_our_steps(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(folder)
    plain, sft = (Trainer, TrainingArguments), (SFTTrainer, SFTConfig)
    kinds: tuple[Any, Any] = sft if "SFT" in name else plain
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    if name.startswith("LoRA"):
        ours = OurRun(folder, "lora")
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        first = {adapters.peft_path(key): value for key, value in ours.first[PRIMARY].items()}
        load_tensors(adapters.named_parameters(model, PRIMARY), first)
        trainer = ours.trainer(*kinds, model)
    else:
        ours = OurRun(folder, "bilora")
        torch.manual_seed(ours.seed)
        bilora = attach(model, BiLoRAConfig(rank=4, alpha=8, rho=ours.rho))
        for adapter, first in ours.first.items():
            own = adapters.state_dict(model, adapter)
            assert all(torch.equal(first[key], value) for key, value in own.items())
        trainer = ours.trainer(*kinds, model)
        use_bilora(trainer, bilora)
    trainer.train()
    assert losses(trainer) == pytest.approx(ours.losses, abs=1e-5)
    if name.startswith("Bi-LoRA"):
        assert list(ours.first) == [PRIMARY, AUXILIARY]
        for adapter, first in ours.first.items():
            left, right = (adapters.state_dict(m, adapter) for m in (ours.model, model))
            assert max((left[key] - right[key]).abs().max().item() for key in left) < 1e-5
            assert max((left[key] - first[key]).abs().max().item() for key in left) > 1e-3
