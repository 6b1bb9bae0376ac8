"""integrations: a Trainer with Bi-LoRA takes the steps of the loop that one would write by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.integrations import trainer as integration
from bilora_diffusion.integrations import use_bilora
from tests.integrations.trainers import (
    CONFIG,
    arguments,
    attached,
    batches,
    by_hand,
    difference,
    losses,
    rows,
    tiny_llm,
)


@pytest.mark.slow
def test_the_package_needs_no_trl() -> None:
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import bilora_diffusion; assert 'transformers.trainer' not in sys.modules\n"
        "import bilora_diffusion.integrations"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({}, {}),
    "fused": ({"optim": "adamw_torch_fused"}, {}),
    "sgd": ({"optim": "sgd"}, {"kind": torch.optim.SGD}),
    "schedule": (
        {"lr_scheduler_type": "cosine", "warmup_steps": 4},
        {"schedule": "cosine", "warmup": 4},
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 4, "max_steps": 5},
        {"accumulate": 4},
    ),
    "clipping": ({"max_grad_norm": 0.05}, {"clip": 0.05}),
    "decay": ({"weight_decay": 0.3}, {"decay": 0.3}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_trainer_takes_the_steps_of_a_loop(variant: str, tmp_path: Path) -> None:
    given, asked = VARIANTS[variant]
    bilora = attached(tiny_llm())
    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(tmp_path, **given),
        train_dataset=rows(),
    )
    assert use_bilora(trainer, bilora) is bilora
    trainer.train()
    reference = attached(tiny_llm())
    expected = by_hand(reference, batches(rows()), **asked)
    assert trainer.state.global_step == len(expected)
    assert losses(trainer) == pytest.approx(expected, abs=1e-5)
    assert difference(bilora, reference) < 1e-5
    assert difference(bilora, attached(tiny_llm())) > 1e-3
    assert 0 < bilora.auxiliary_norm() <= CONFIG.rho * (1 + 1e-6)


def test_clipping_all_parameters_jointly_would_differ(tmp_path: Path) -> None:
    """What the variant "clipping" guards against makes a difference that it would see."""
    reference, joint = attached(tiny_llm()), attached(tiny_llm())
    by_hand(reference, batches(rows()), clip=0.05, kind=torch.optim.SGD)
    joint.clip_parameters = lambda: list(joint.model.parameters())  # type: ignore[method-assign]
    by_hand(joint, batches(rows()), clip=0.05, kind=torch.optim.SGD)
    assert difference(reference, joint) > 1e-4


def test_the_config_alone_is_enough_and_the_seed_decides_the_adapters(tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        torch.rand(1)
        model = tiny_llm()
        trainer = Trainer(model=model, args=arguments(tmp_path, seed=3), train_dataset=rows())
        bilora = use_bilora(trainer, CONFIG)
        trainer.train()
        weights.append(bilora)
    assert difference(*weights) == 0


def test_the_log_tells_of_the_primary_and_the_ball(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(tmp_path, max_steps=2, max_grad_norm=0.01),
        train_dataset=rows(),
    )
    use_bilora(trainer, bilora)
    seen: list[float] = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(
                float(torch.stack([p.grad.norm() for p in primary if p.grad is not None]).norm())
            )

    primary = bilora.clip_parameters()
    trainer.add_callback(Norm())
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["auxiliary_norm"] <= CONFIG.rho * (1 + 1e-6) for line in lines)
    assert lines[0]["auxiliary_norm_before"] > CONFIG.rho
    assert all(line["grad_norm"] > 0.01 for line in lines)
    assert seen == pytest.approx([0.01, 0.01], rel=1e-3)


def test_evaluation_and_prediction_see_the_exported_adapter(tmp_path: Path) -> None:
    bilora = attached(tiny_llm(), replace(CONFIG, rho=0.5))
    seen: list[tuple[tuple[str, ...], str]] = []

    class Look(TrainerCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append((adapters.active(bilora.model), "step"))

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            seen.append((adapters.active(bilora.model), "end"))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert adapters.active(bilora.model) == (PRIMARY, AUXILIARY)

    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=10),
        train_dataset=rows(),
        eval_dataset=rows(8, seed=1),
        callbacks=[Look()],
    )
    use_bilora(trainer, bilora)
    trainer.train()
    assert {kind for _, kind in seen} == {"step", "end"}
    assert {names for names, _ in seen} == {(PRIMARY,)}
    inside = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]

    trainer.save_model(str(tmp_path / "adapter"))
    exported = PeftModel.from_pretrained(tiny_llm(), str(tmp_path / "adapter"))
    plain = Trainer(
        model=exported,  # type: ignore[arg-type]
        args=arguments(tmp_path / "plain"),
        eval_dataset=rows(8, seed=1),
    )
    expected = plain.evaluate()["eval_loss"]
    assert inside[-1] == expected
    assert trainer.evaluate()["eval_loss"] == expected
    logits = trainer.predict(rows(8, seed=1)).predictions  # type: ignore[arg-type]
    assert (logits == plain.predict(rows(8, seed=1)).predictions).all()  # type: ignore[arg-type]
    batch = batches(rows(4, seed=1))[0]
    with torch.no_grad():  # and so does what comes after training
        own = bilora.model.eval()(**batch).loss
        adapters.activate(bilora.model, (PRIMARY, AUXILIARY))
        assert abs(float(bilora.model(**batch).loss - own)) > 1e-4
        assert float(exported.eval()(**batch).loss) == float(own)


@pytest.mark.parametrize("brings", ["plain", "peft"])
def test_every_folder_holds_a_plain_adapter(brings: str, tmp_path: Path) -> None:
    model: Any = tiny_llm()
    if brings == "peft":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    bilora = attached(model)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
        train_dataset=rows(),
    )
    use_bilora(trainer, bilora)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
        assert "model.safetensors" not in names
        assert not (folder / AUXILIARY).exists()
        assert ("bilora_state.safetensors" in names) == (folder != tmp_path)
        assert not any(AUXILIARY in key for key in load_file(folder / "adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(tiny_llm(), str(folder))
        assert list(loaded.peft_config) == [PRIMARY]
    state = load_file(tmp_path / "checkpoint-4" / "bilora_state.safetensors")
    assert {key.split("/")[1] for key in state} == {PRIMARY, AUXILIARY}


@pytest.mark.parametrize("only", [False, True])
def test_the_best_model_comes_back(only: bool, tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(
            tmp_path,
            learning_rate=3e-2,
            eval_strategy="steps",
            eval_steps=5,
            save_strategy="steps",
            save_steps=5,
            save_only_model=only,
            load_best_model_at_end=True,
        ),
        train_dataset=rows(4),  # so few that the loss on other rows rises
        eval_dataset=rows(8, seed=1),
    )
    use_bilora(trainer, bilora)
    trainer.train()
    scores = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert min(scores) < scores[-1]
    assert trainer.evaluate()["eval_loss"] == min(scores)
    best = load_file(Path(str(trainer.state.best_model_checkpoint)) / "adapter_model.safetensors")
    own = bilora.primary_state_dict()
    assert all(torch.equal(best[f"base_model.model.{key}"], value) for key, value in own.items())


def test_bf16(tmp_path: Path) -> None:
    model: Any = tiny_llm()
    bilora = attached(model.to(torch.bfloat16))
    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(tmp_path, bf16=True),
        train_dataset=rows(),
    )
    use_bilora(trainer, bilora)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in bilora.clip_parameters())
    assert 0 < bilora.auxiliary_norm() <= CONFIG.rho * (1 + 1e-6)
    assert difference(bilora, attached(tiny_llm())) > 1e-3


def test_a_second_training_goes_on(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(tmp_path, max_steps=2),
        train_dataset=rows(),
    )
    use_bilora(trainer, bilora)
    trainer.train()
    assert adapters.active(bilora.model) == (PRIMARY,)
    before = bilora.primary_state_dict()
    trainer.train()
    after = bilora.primary_state_dict()
    assert not any(torch.equal(before[key], after[key]) for key in before)
    assert bilora._method.taken == 4


def test_the_places_where_bilora_comes_in_exist() -> None:
    integration._check_version(Trainer)

    with pytest.raises(UserError, match="has no train"):
        integration._check_version(object)  # type: ignore[arg-type]


def test_a_classifier_trains_its_head_beside_the_adapters(tmp_path: Path) -> None:
    config = replace(CONFIG, modules_to_save=("score",))
    torch.manual_seed(0)
    llm = tiny_llm()
    model = AutoModelForSequenceClassification.from_config(llm.config)
    before = model.score.weight.detach().clone()
    tokens = rows()["input_ids"]
    examples = [{"input_ids": ids, "labels": n % 2} for n, ids in enumerate(tokens)]
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=examples)  # pyright: ignore
    bilora = use_bilora(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not torch.equal(model.score.weight, before)
    assert not any("score" in name for name, _ in adapters.layers(model))
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    torch.testing.assert_close(stored["base_model.model.score.weight"], model.score.weight.detach())
    assert bilora.auxiliary_norm() <= config.rho * (1 + 1e-6)
