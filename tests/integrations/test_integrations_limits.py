"""integrations: resumes are exact, and what would be silently wrong is refused in a sentence."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from bilora_diffusion import BiLoRAConfig, adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.integrations import trainer as integration
from bilora_diffusion.integrations import use_bilora
from bilora_diffusion.integrations.trainer import STATE
from tests.contract.models import tiny_llm
from tests.integrations import trainers

STOP = 4


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == STOP


def make(folder, config=trainers.CONFIG, kind="trainer", seed=7, **values):
    """A trainer as a new process would make it; `seed` is of what the process did before."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for setter in (torch.manual_seed, random.seed, np.random.seed):
        setter(seed)
    model: Any = tiny_llm()
    bilora = trainers.attached(model.bfloat16() if values.get("bf16") else model, config, seed)
    chosen = {
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "save_strategy": "steps",
        "save_steps": STOP,
        "max_steps": 9,
        "data": trainers.rows(24),
    }
    return trainers.with_bilora(folder, bilora, kind, **(chosen | values)), bilora


AUXILIARY_OPTIONS = {"init": "pissa", "auxiliary_rank": 2, "auxiliary_learning_rate": 2e-3}


@pytest.mark.parametrize(
    ("kind", "changes", "values"),
    [
        pytest.param("trainer", AUXILIARY_OPTIONS, {}, marks=pytest.mark.slow),
        ("sft", {}, {"bf16": True}),
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted(kind, changes, values, tmp_path):
    """Transformers alone would leave the auxiliary as it was made, and frozen."""
    config = replace(trainers.CONFIG, **changes)
    uninterrupted, expected = make(tmp_path / "whole", config, kind, **values)
    uninterrupted.train()
    first, before = make(tmp_path / "cut", config, kind, **values)
    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == STOP
    second, bilora = make(tmp_path / "cut", config, kind, seed=99, **values)
    assert trainers.difference(bilora, expected) > 1e-3
    active_adapters: list[tuple[str, ...]] = []

    class Look(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            assert trainers.difference(bilora, before) == 0

        def on_step_begin(self, *args, **kwargs):
            active_adapters.append(adapters.active(bilora.model))
            assert all(p.requires_grad for p in adapters.parameters(bilora.model, AUXILIARY))

    second.add_callback(Look())
    second.train(resume_from_checkpoint=True)
    assert set(active_adapters) == {(PRIMARY, AUXILIARY)}
    assert second.state.global_step == uninterrupted.state.global_step
    assert trainers.difference(bilora, expected) == 0
    assert (
        bilora._method.steps_taken
        == expected._method.steps_taken
        == uninterrupted.state.global_step
    )
    group = second.optimizer.param_groups[1]
    assert (group["maximize"], group["weight_decay"]) == (True, 0)
    assert all(p.dtype == torch.float32 for p in bilora.clip_parameters())
    assert 0 < bilora.auxiliary_norm() <= trainers.RHO * (1 + 1e-6)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    trainer, _ = make(folder)
    trainer.add_callback(Stop())
    trainer.train()
    return folder / f"checkpoint-{STOP}"


@pytest.mark.parametrize(
    ("damaged", "word", "rho"),
    [
        ("optimizer.pt", "optimizer.pt", trainers.RHO),
        (STATE, "truncated or altered", trainers.RHO),
        (None, r"rho was 0\.02 and is 0\.5", 0.5),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    damaged, word, rho, stopped, tmp_path
):
    checkpoint = Path(shutil.copytree(stopped, tmp_path / stopped.name))
    if damaged == STATE:
        (checkpoint / STATE).write_bytes((checkpoint / STATE).read_bytes()[:-1])
    elif damaged:
        (checkpoint / damaged).unlink()
    trainer, bilora = make(tmp_path, replace(trainers.CONFIG, rho=rho), seed=99)
    before = adapters.state_dict(bilora.model, PRIMARY)
    with pytest.raises(UserError, match=word):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    after = adapters.state_dict(bilora.model, PRIMARY)
    assert all(torch.equal(before[key], after[key]) for key in before)


TARGETS = LoraConfig(target_modules=["q_proj"])
HEAD = BiLoRAConfig(target_modules=("q_proj", "lm_head"))  # which TRL would pass by


def changed(name, value):
    def make(folder, _):
        trainer = trainers.plain(folder, tiny_llm())
        setattr(trainer, name, value)
        return trainer

    return make


USES: list[tuple[Callable[[Path, Any], Any], BiLoRAConfig | None, str]] = [
    (changed("is_deepspeed_enabled", True), trainers.CONFIG, "DeepSpeed"),
    (changed("is_fsdp_enabled", True), trainers.CONFIG, "FSDP"),
    (changed("model_init", tiny_llm), trainers.CONFIG, "model_init.*model="),
    # it has weights of its own
    (lambda f, b: trainers.plain(f, tiny_llm(), optim="galore_adamw"), trainers.CONFIG, "galore"),
    (lambda f, b: {}, None, "got a dict"),
    (lambda f, b: trainers.with_bilora(f, b), None, "already"),
    (lambda f, b: trainers.plain(f, tiny_llm()), None, "gave to attach"),
    (lambda f, b: trainers.plain(f, b.model, "sft", peft_config=TARGETS), None, "peft_config"),
    (lambda f, b: trainers.plain(f, get_peft_model(b.model, TARGETS)), None, "peft_config"),
    (lambda f, b: trainers.plain(f, tiny_llm(), "sft"), HEAD, "target_modules"),
]


@pytest.mark.parametrize(("make", "config", "word"), USES)
def test_a_trainer_that_would_be_wrong(make, config, word, tmp_path):
    bilora = trainers.attached(tiny_llm())
    trainer = make(tmp_path, bilora)
    with pytest.raises(UserError, match=word):
        use_bilora(trainer, config or bilora)
    with pytest.raises(UserError, match="has no train"):
        integration._check_version(object)  # type: ignore[arg-type]


@pytest.mark.parametrize("descends", [False, True])
def test_a_wrong_optimizer(descends, tmp_path):
    bilora = trainers.attached(tiny_llm())
    groups: Any = [{"params": [p for p in bilora.model.parameters() if p.requires_grad]}]
    if descends:
        groups = [{**group, "maximize": False} for group in bilora.param_groups(lr=trainers.RATE)]
    optimizer = torch.optim.AdamW(groups, lr=trainers.RATE, weight_decay=0.0)
    trainer = trainers.with_bilora(tmp_path, bilora, optimizers=(optimizer, None))
    with pytest.raises(UserError, match="param_groups"):
        trainer.train()


@pytest.mark.parametrize("binds", [False, True])
def test_an_optimizer_of_ones_own(binds, tmp_path):
    bilora = trainers.attached(tiny_llm())
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=trainers.RATE))
    if binds:
        bilora.bind(optimizer)
    trainers.with_bilora(tmp_path, bilora, optimizers=(optimizer, None), max_steps=2).train()
    assert 0 < bilora.auxiliary_norm() <= trainers.RHO * (1 + 1e-6)
    assert bilora._method.steps_taken == 2


SPOILS: list[tuple[Callable[[Any], object], str, dict[str, Any]]] = [
    (lambda t: t.create_optimizer().param_groups[1].update(maximize=False), "maximize=False", {}),
    (lambda t: t.create_optimizer()._optimizer_step_post_hooks.clear(), "not projected", {}),
    (lambda t: t.model.lm_head.weight.requires_grad_(True), r"lm_head\.weight", {}),
    (lambda t: t.evaluate(trainers.rows(4)), "bfloat16", {"bf16_full_eval": True}),
    (lambda t: None, "groups of its own", {"optimizer_cls_and_kwargs": (lambda: None, {})}),
]


@pytest.mark.parametrize(("spoil", "word", "values"), SPOILS)
def test_what_was_spoiled_after_use_bilora(spoil, word, values, tmp_path):
    trainer = trainers.with_bilora(tmp_path, trainers.attached(tiny_llm()), max_steps=1, **values)
    spoil(trainer)
    with pytest.raises(UserError, match=word):
        trainer.train()
