"""integrations: a trainer with Bi-LoRA takes the steps of the loop that one would write by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from bilora_diffusion import BiLoRAConfig, adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.methods.bilora import radius
from tests.contract.models import tiny_llm, tiny_t5
from tests.integrations import trainers

PEFT = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
FOUR = {"gradient_accumulation_steps": 4, "max_steps": 5, "max_grad_norm": 0.05}
FOUR_BY_HAND = {"accumulate": 4, "clip": 0.05}
NUMBERS = [(7 * row) % 11 for row in range(trainers.STEPS * trainers.BATCH)]
AUTO = BiLoRAConfig(rank=4, alpha=8, rho="auto", loss_rise=0.2)
SEVERAL = replace(trainers.CONFIG, auxiliaries=6)


def peft_llm():
    return get_peft_model(tiny_llm(), PEFT)


@pytest.mark.parametrize(
    ("kind", "make", "config", "arguments", "loop_options"),
    [
        (
            "trainer",
            tiny_llm,
            trainers.CONFIG,
            FOUR | {"weight_decay": 0.3, "lr_scheduler_type": "cosine", "warmup_steps": 2},
            FOUR_BY_HAND | {"decay": 0.3, "schedule": "cosine", "warmup": 2},
        ),
        ("seq2seq", tiny_t5, trainers.CONFIG, {"max_steps": 8}, {"shifts": False}),
        ("sft", peft_llm, trainers.CONFIG, {"gradient_checkpointing": True, "max_steps": 8}, {}),
        # a radius that sets itself goes by the loss of the whole step
        ("sft", tiny_llm, AUTO, FOUR | {"max_grad_norm": 0.0}, {"accumulate": 4}),
        # each sample has its own auxiliary by a column
        ("sft", tiny_llm, SEVERAL, {"max_steps": 6}, {"samples": NUMBERS}),
    ],
)
def test_a_trainer_takes_the_steps_of_a_loop(
    kind, make, config, arguments, loop_options, tmp_path, monkeypatch
):
    if config is AUTO:  # the weights of so small a model are small, too
        monkeypatch.setattr(radius, "LARGEST_SHARE", 10.0)
    bilora, reference, untrained = (trainers.attached(make(), config) for _ in range(3))
    data: Any = trainers.rows()
    if config.auxiliaries != 1:
        data = data.add_column("sample_id", NUMBERS)
    trainer = trainers.with_bilora(
        tmp_path, bilora, kind, data=data, optim="adamw_torch_fused", **arguments
    )
    trainer.train()
    loop_batches = trainers.batches(trainers.rows())[
        : arguments["max_steps"] * loop_options.get("accumulate", 1)
    ]
    expected = trainers.by_hand(reference, loop_batches, **loop_options)
    assert trainer.state.global_step == len(expected)
    assert trainers.losses(trainer) == pytest.approx(
        expected, abs=2e-4 if "samples" in loop_options else 1e-5
    )
    assert trainers.difference(bilora, reference) < 1e-5
    assert trainers.difference(bilora, untrained) > 1e-3
    radii = trainers.losses(trainer, "rho") if config is AUTO else [trainers.RHO]
    assert len(set(radii)) == len(radii)
    assert 0 < bilora.auxiliary_norm() <= radii[-1] * (1 + 1e-4)


@pytest.mark.parametrize(
    ("kind", "make"), [("trainer", peft_llm), pytest.param("sft", tiny_llm, marks=pytest.mark.slow)]
)
def test_what_is_evaluated_and_saved_is_the_primary_alone(kind, make, tmp_path):
    bilora = trainers.attached(make(), replace(trainers.CONFIG, rho=0.5))
    held_out = trainers.rows(8, seed=1)
    observations: list[tuple[tuple[str, ...], str]] = []

    class Look(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            observations.append((adapters.active(bilora.model), "step"))

        def on_evaluate(self, *args, **kwargs):
            observations.append((adapters.active(bilora.model), "end"))

        def on_step_end(self, *args, **kwargs):
            assert adapters.active(bilora.model) == (PRIMARY, AUXILIARY)

    values = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps"}
    values |= {"save_steps": 10, "eval_dataset": held_out, "callbacks": [Look()]}
    trainer = trainers.with_bilora(tmp_path, bilora, kind, **values)
    trainer.train()
    trainer.save_model()
    assert set(observations) == {((PRIMARY,), "step"), ((PRIMARY,), "end")}
    for folder in (tmp_path, tmp_path / "checkpoint-10", tmp_path / "checkpoint-20"):
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files
        assert "model.safetensors" not in files
        assert not (folder / AUXILIARY).exists()
        assert ("bilora_state.safetensors" in files) == (folder != tmp_path)
        assert not any(AUXILIARY in key for key in load_file(folder / "adapter_model.safetensors"))
    state = load_file(tmp_path / "checkpoint-20" / "bilora_state.safetensors")
    assert {key.split("/")[1] for key in state} == {PRIMARY, AUXILIARY}

    exported = PeftModel.from_pretrained(tiny_llm(), str(tmp_path / "checkpoint-20"))
    assert list(exported.peft_config) == [PRIMARY]
    plain_trainer = trainers.plain(tmp_path / "plain", exported, kind, eval_dataset=held_out)
    expected = plain_trainer.evaluate()["eval_loss"]
    assert trainers.losses(trainer, "eval_loss")[-1] == expected
    assert trainer.evaluate()["eval_loss"] == expected
    if kind == "trainer":
        logits = trainer.predict(held_out).predictions
        assert (logits == plain_trainer.predict(held_out).predictions).all()
    batch = trainers.batches(trainers.rows(4, seed=1))[0]
    with torch.no_grad():  # and so does what comes after training
        primary_loss = bilora.model.eval()(**batch).loss
        adapters.activate(bilora.model, (PRIMARY, AUXILIARY))
        assert abs(float(bilora.model(**batch).loss - primary_loss)) > 1e-4
        assert float(exported.eval()(**batch).loss) == float(primary_loss)


def test_the_best_model_comes_back(tmp_path):
    bilora = trainers.attached(tiny_llm())
    values: dict[str, Any] = {"learning_rate": 3e-2, "load_best_model_at_end": True}
    values |= {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    values |= {"data": trainers.rows(4), "eval_dataset": trainers.rows(8, seed=1)}  # its loss rises
    trainer = trainers.with_bilora(tmp_path, bilora, **values)
    trainer.train()
    scores = trainers.losses(trainer, "eval_loss")
    assert min(scores) < scores[-1]
    assert trainer.evaluate()["eval_loss"] == min(scores)
    best = load_file(Path(str(trainer.state.best_model_checkpoint)) / "adapter_model.safetensors")
    primary = bilora.primary_state_dict()
    assert all(
        torch.equal(best[f"base_model.model.{key}"], value) for key, value in primary.items()
    )


def test_a_classifier_trains_its_head_beside_the_adapters(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_llm().config)
    before = model.score.weight.detach().clone()
    tokens = trainers.rows()["input_ids"]
    examples = [{"input_ids": ids, "labels": n % 2} for n, ids in enumerate(tokens)]
    bilora = trainers.attached(model, replace(trainers.CONFIG, modules_to_save=("score",)))
    trainer = trainers.with_bilora(tmp_path, bilora, data=examples, max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not torch.equal(model.score.weight, before)
    assert not any("score" in name for name, _ in adapters.layers(model))
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    torch.testing.assert_close(stored["base_model.model.score.weight"], model.score.weight.detach())
    assert bilora.auxiliary_norm() <= trainers.RHO * (1 + 1e-6)
