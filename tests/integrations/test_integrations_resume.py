"""integrations: a Trainer that was stopped and goes on ends where an uninterrupted one ends."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from bilora_diffusion import BiLoRAConfig, adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.api import BiLoRA
from bilora_diffusion.errors import UserError
from bilora_diffusion.integrations import use_bilora
from bilora_diffusion.integrations.state import STATE
from tests.integrations.trainers import (
    CONFIG,
    arguments,
    attached,
    batches,
    difference,
    rows,
    tiny_llm,
)

STOP = 7


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == STOP


def make(
    folder: Path, config: BiLoRAConfig = CONFIG, seed: int = 7, **values: Any
) -> tuple[Trainer, BiLoRA]:
    """A trainer as a new process would make it; `seed` is of what the process did before."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for setter in (torch.manual_seed, random.seed, np.random.seed):
        setter(seed)
    bilora = attached(tiny_llm(), config, seed)
    chosen = {
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "save_strategy": "steps",
        "save_steps": STOP,
        **values,
    }
    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(folder, **chosen),
        train_dataset=rows(24),
    )
    use_bilora(trainer, bilora)
    return trainer, bilora


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, dropout=0.2),
        replace(CONFIG, use_dora=True),
        replace(CONFIG, init="pissa"),
        replace(CONFIG, auxiliary_rank=2, auxiliary_learning_rate=2e-3),
    ],
    ids=["dropout", "dora", "pissa", "auxiliary"],
)
def test_resumed_equals_uninterrupted(config: BiLoRAConfig, tmp_path: Path) -> None:
    whole, expected = make(tmp_path / "whole", config)
    whole.train()
    first, _ = make(tmp_path / "cut", config)
    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == STOP
    second, bilora = make(tmp_path / "cut", config, seed=99)
    assert difference(bilora, expected) > 1e-3
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step
    assert difference(bilora, expected) == 0
    assert bilora._method.taken == expected._method.taken == whole.state.global_step


def test_what_transformers_alone_would_make_of_it(tmp_path: Path) -> None:
    """The resumed auxiliary moves: both adapters act and are trained, and it has its values."""
    first, before = make(tmp_path)
    first.add_callback(Stop())
    first.train()
    saved = adapters.state_dict(before.model, AUXILIARY)
    second, bilora = make(tmp_path, seed=99)
    seen: list[tuple[str, ...]] = []

    class Look(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            own = adapters.state_dict(bilora.model, AUXILIARY)
            assert all(torch.equal(own[key], saved[key]) for key in saved)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append(adapters.active(bilora.model))
            trained = adapters.parameters(bilora.model, AUXILIARY)
            assert all(p.requires_grad for p in trained)

    second.add_callback(Look())
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert set(seen) == {(PRIMARY, AUXILIARY)}
    own = adapters.state_dict(bilora.model, AUXILIARY)
    assert not any(torch.equal(own[key], saved[key]) for key in saved)
    group = second.optimizer.param_groups[1]  # type: ignore[union-attr]
    assert group["maximize"]
    assert group["weight_decay"] == 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer, _ = make(tmp_path)
    trainer.add_callback(Stop())
    trainer.train()
    return tmp_path / f"checkpoint-{STOP}"


@pytest.mark.parametrize("name", [STATE, "optimizer.pt", "scheduler.pt"])
def test_a_missing_file(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    trainer, bilora = make(checkpoint.parent, seed=99)
    before = adapters.state_dict(bilora.model, PRIMARY)
    with pytest.raises(UserError, match=f"has no {name}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    after = adapters.state_dict(bilora.model, PRIMARY)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_truncated_file(checkpoint: Path) -> None:
    data = (checkpoint / STATE).read_bytes()
    for size in (0, 100, len(data) - 1):
        (checkpoint / STATE).write_bytes(data[:size])
        trainer, _ = make(checkpoint.parent)
        with pytest.raises(UserError, match="truncated or altered"):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_other_settings(checkpoint: Path) -> None:
    trainer, _ = make(checkpoint.parent, replace(CONFIG, rho=0.5))
    with pytest.raises(UserError, match=r"rho was 0\.02 and is 0\.5"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_other_first_values(tmp_path: Path) -> None:
    config = replace(CONFIG, init="lora-ga")
    folders = []
    for seed in (0, 1):
        AcceleratorState._reset_state(True)
        bilora = attached(tiny_llm(), config)
        trainer = Trainer(
            model=bilora.model,  # type: ignore[arg-type]
            args=arguments(tmp_path / "run", save_strategy="steps", save_steps=STOP),
            train_dataset=rows(),
        )
        use_bilora(trainer, bilora)
        with pytest.raises(UserError, match="initialise"):
            trainer.train()
        batch = batches(rows(4, seed))[0]
        bilora.initialise(lambda batch=batch, b=bilora: b.model(**batch).loss.backward())
        if folders:
            with pytest.raises(UserError, match="started the primary elsewhere"):
                trainer.train(resume_from_checkpoint=str(folders[0]))
        else:
            trainer.add_callback(Stop())
            trainer.train()
            folders.append(tmp_path / "run" / f"checkpoint-{STOP}")


def test_a_file_of_a_later_version(checkpoint: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(checkpoint / STATE)
    metadata = {"bilora": json.dumps({"schema_version": 2})}
    save_file(tensors, checkpoint / STATE, metadata=metadata)
    trainer, _ = make(checkpoint.parent)
    with pytest.raises(UserError, match="schema version 2"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
