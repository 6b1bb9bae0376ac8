"""Trainers with Bi-LoRA resume exactly, and refuse setups that would be silently wrong."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, set_seed

from bilora_diffusion import BiLoRAConfig, adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.integrations import use_bilora
from bilora_diffusion.integrations.trainer import STATE
from tests.contract.models import tiny_llm
from tests.integrations import trainers

STOP = 4


class Stop(TrainerCallback):
    """Callback that stops training after `STOP` steps, as a signal would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == STOP


def make(folder, config=trainers.CONFIG, kind="trainer", seed=7, **values):
    """Return a trainer and its handle as a new process would create them.

    Args:
        seed: seed of the process's random state and of the initial adapters.
    """
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    # A resumed run must depend on its checkpoint, not on the process's random state.
    set_seed(seed)
    model: Any = tiny_llm()
    if values.get("bf16"):
        model = model.bfloat16()
    bilora = trainers.attached(model, config, seed)
    trainer = trainers.with_bilora(
        folder,
        bilora,
        kind,
        train_sampling_strategy="random",
        lr_scheduler_type="cosine",
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        save_strategy="steps",
        save_steps=STOP,
        max_steps=9,
        data=trainers.preferences(24) if kind == "dpo" else trainers.rows(24),
        **values,
    )
    return trainer, bilora


AUXILIARY_OPTIONS = {"init": "pissa", "auxiliary_rank": 2, "auxiliary_learning_rate": 2e-3}


@pytest.mark.parametrize(
    ("kind", "changes", "values"),
    [
        pytest.param("trainer", AUXILIARY_OPTIONS, {}, marks=pytest.mark.slow),
        pytest.param("sft", {}, {"bf16": True}, marks=pytest.mark.slow),
        pytest.param("dpo", {}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_run(kind, changes, values, tmp_path):
    """Transformers alone would leave the auxiliary frozen at its initial values."""
    config = replace(trainers.CONFIG, **changes)
    uninterrupted, expected = make(tmp_path / "uninterrupted", config, kind, **values)
    uninterrupted.train()
    stopped, before = make(tmp_path / "stopped", config, kind, **values)
    stopped.add_callback(Stop())
    stopped.train()
    assert stopped.state.global_step == STOP
    resumed, bilora = make(tmp_path / "stopped", config, kind, seed=99, **values)
    assert trainers.difference(bilora, expected) > 1e-3

    class CheckAdapters(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            assert trainers.difference(bilora, before) == 0

        def on_step_begin(self, *args, **kwargs):
            assert adapters.active(bilora.model) == (PRIMARY, AUXILIARY)
            for parameter in adapters.parameters(bilora.model, AUXILIARY):
                assert parameter.requires_grad

    resumed.add_callback(CheckAdapters())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == uninterrupted.state.global_step == 9
    assert trainers.difference(bilora, expected) == 0
    assert bilora._method.steps_taken == expected._method.steps_taken == 9
    group = resumed.optimizer.param_groups[1]
    assert (group["maximize"], group["weight_decay"]) == (True, 0)
    assert {parameter.dtype for parameter in bilora.clip_parameters()} == {torch.float32}
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
def test_an_unusable_checkpoint_is_refused_and_changes_nothing(
    damaged, word, rho, stopped, tmp_path
):
    checkpoint = Path(shutil.copytree(stopped, tmp_path / stopped.name))
    if damaged == STATE:
        (checkpoint / STATE).write_bytes((checkpoint / STATE).read_bytes()[:-1])
    elif damaged:
        (checkpoint / damaged).unlink()
    trainer, bilora = make(tmp_path, replace(trainers.CONFIG, rho=rho), seed=99)
    state_before = adapters.state_dict(bilora.model, PRIMARY)
    with pytest.raises(UserError, match=word):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    state = adapters.state_dict(bilora.model, PRIMARY)
    torch.testing.assert_close(state, state_before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("attribute", "value", "word"),
    [
        ("is_deepspeed_enabled", True, "DeepSpeed"),
        ("is_fsdp_enabled", True, "FSDP"),
        ("model_init", tiny_llm, "model_init.*model="),
    ],
)
def test_a_trainer_that_would_not_train_the_adapters_is_refused(attribute, value, word, tmp_path):
    trainer = trainers.plain(tmp_path, tiny_llm())
    setattr(trainer, attribute, value)
    with pytest.raises(UserError, match=word):
        use_bilora(trainer, trainers.CONFIG)


def test_an_optimizer_with_weights_of_its_own_is_refused(tmp_path):
    trainer = trainers.plain(tmp_path, tiny_llm(), optim="galore_adamw")
    with pytest.raises(UserError, match="galore"):
        use_bilora(trainer, trainers.CONFIG)


def test_a_transformers_version_without_an_overridden_method_is_refused(tmp_path, monkeypatch):
    trainer = trainers.plain(tmp_path, tiny_llm())
    monkeypatch.delattr(Trainer, "prediction_step")
    with pytest.raises(UserError, match="has no prediction_step"):
        use_bilora(trainer, trainers.CONFIG)


def test_target_modules_that_trl_would_bypass_are_refused(tmp_path):
    trainer = trainers.plain(tmp_path, tiny_llm(), "sft")
    with pytest.raises(UserError, match="target_modules"):
        use_bilora(trainer, BiLoRAConfig(target_modules=("q_proj", "lm_head")))


TARGETS = LoraConfig(target_modules=["q_proj"])


def test_an_adapter_that_trl_copied_as_its_reference_is_refused(tmp_path):
    """After each pass with the copy, TRL would activate only the primary."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(tiny_llm(), config)
    trainer = trainers.plain(tmp_path, model, "dpo", ref_model=None)
    with pytest.raises(UserError, match="copied the model's adapter as its reference"):
        use_bilora(trainer, trainers.CONFIG)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda folder, bilora: {}, "got a dict"),
        (trainers.with_bilora, "already"),
        (lambda folder, bilora: trainers.plain(folder, tiny_llm()), "passed to attach"),
        (
            lambda folder, bilora: trainers.plain(folder, bilora.model, "sft", peft_config=TARGETS),
            "peft_config",
        ),
        (
            lambda folder, bilora: trainers.plain(folder, get_peft_model(bilora.model, TARGETS)),
            "peft_config",
        ),
    ],
)
def test_an_unsuitable_trainer_is_refused(make, word, tmp_path):
    bilora = trainers.attached(tiny_llm())
    trainer = make(tmp_path, bilora)
    with pytest.raises(UserError, match=word):
        use_bilora(trainer, bilora)


@pytest.mark.parametrize("descends", [False, True])
def test_an_optimizer_with_wrong_parameter_groups_is_refused(descends, tmp_path):
    bilora = trainers.attached(tiny_llm())
    # One group for all adapters, or an auxiliary that descends.
    groups: Any = [parameter for parameter in bilora.model.parameters() if parameter.requires_grad]
    if descends:
        groups = [{**group, "maximize": False} for group in bilora.param_groups(lr=trainers.RATE)]
    optimizer = torch.optim.AdamW(groups, lr=trainers.RATE, weight_decay=0.0)
    trainer = trainers.with_bilora(tmp_path, bilora, optimizers=(optimizer, None))
    with pytest.raises(UserError, match="param_groups"):
        trainer.train()


@pytest.mark.parametrize("binds", [False, True])
def test_a_custom_optimizer_works_whether_it_is_bound_before_or_not(binds, tmp_path):
    bilora = trainers.attached(tiny_llm())
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=trainers.RATE))
    if binds:
        bilora.bind(optimizer)
    trainers.with_bilora(tmp_path, bilora, optimizers=(optimizer, None), max_steps=2).train()
    assert 0 < bilora.auxiliary_norm() <= trainers.RHO * (1 + 1e-6)
    assert bilora._method.steps_taken == 2


def let_auxiliary_descend(trainer):
    trainer.create_optimizer().param_groups[1]["maximize"] = False


def drop_projection(trainer):
    trainer.create_optimizer()._optimizer_step_post_hooks.clear()


def train_head(trainer):
    trainer.model.lm_head.weight.requires_grad_(True)


def evaluate(trainer):
    trainer.evaluate(trainers.rows(4))


def change_nothing(trainer):
    pass


@pytest.mark.parametrize(
    ("spoil", "word", "values"),
    [
        (let_auxiliary_descend, "maximize=False", {}),
        (drop_projection, "not projected", {}),
        (train_head, r"lm_head\.weight", {}),
        (evaluate, "bfloat16", {"bf16_full_eval": True}),  # the evaluation leaves the model in bf16
        (change_nothing, "groups of its own", {"optimizer_cls_and_kwargs": (lambda: None, {})}),
    ],
)
def test_harmful_changes_after_use_bilora_are_refused(spoil, word, values, tmp_path):
    trainer = trainers.with_bilora(tmp_path, trainers.attached(tiny_llm()), max_steps=1, **values)
    spoil(trainer)
    with pytest.raises(UserError, match=word):
        trainer.train()
