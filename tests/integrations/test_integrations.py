"""A trainer with Bi-LoRA takes the same steps as a loop written by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.integrations import use_bilora
from bilora_diffusion.run.checkpoint import load_tensors
from tests.contract.models import tiny_llm, tiny_t5
from tests.integrations import trainers

ACCUMULATED = {"gradient_accumulation_steps": 4, "max_steps": 5}


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def peft_llm():
    return get_peft_model(tiny_llm(), LORA)


def save_every(steps):
    """Return training arguments that evaluate and save at an interval of `steps`."""
    strategies = dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    return {**strategies, "eval_steps": steps, "save_steps": steps}


@pytest.mark.parametrize(
    ("kind", "make", "config", "arguments", "loop_options"),
    [
        (
            "trainer",
            tiny_llm,
            trainers.CONFIG,
            ACCUMULATED
            | {"max_grad_norm": 0.05, "weight_decay": 0.3}
            | {"lr_scheduler_type": "cosine", "warmup_steps": 2},
            {"accumulate": 4, "clip": 0.05, "decay": 0.3, "schedule": "cosine", "warmup": 2},
        ),
        ("seq2seq", tiny_t5, trainers.CONFIG, {"max_steps": 8}, {"shifts": False}),
        ("sft", peft_llm, trainers.CONFIG, {"gradient_checkpointing": True, "max_steps": 8}, {}),
        ("sft", tiny_llm, trainers.CONFIG, ACCUMULATED, {"accumulate": 4}),
    ],
)
def test_a_trainer_takes_the_same_steps_as_a_manual_loop(
    kind, make, config, arguments, loop_options, tmp_path
):
    bilora, reference, untrained = [trainers.attached(make(), config) for _ in range(3)]
    trainer = trainers.with_bilora(tmp_path, bilora, kind, optim="adamw_torch_fused", **arguments)
    trainer.train()
    num_batches = arguments["max_steps"] * loop_options.get("accumulate", 1)
    loop_batches = trainers.batches(trainers.rows())[:num_batches]
    expected = trainers.by_hand(reference, loop_batches, **loop_options)
    assert trainer.state.global_step == len(expected)
    assert trainers.losses(trainer) == pytest.approx(expected, abs=1e-5)
    assert trainers.difference(bilora, reference) < 1e-5
    assert trainers.difference(bilora, untrained) > 1e-3
    assert 0 < bilora.auxiliary_norm() <= trainers.RHO * (1 + 1e-4)


def preference_loss(model, reference, batch, beta=0.1):
    """Return DPO's loss (Eq. 7 of https://arxiv.org/abs/2305.18290).

    The preferred answers are the first half of the batch.
    """

    def answer_log_probabilities(network):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        predicted = network(**inputs).logits[:, :-1].log_softmax(-1)
        tokens = batch["input_ids"][:, 1:, None]
        return (predicted.gather(2, tokens)[..., 0] * batch["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad():
        expected = answer_log_probabilities(reference)
    chosen, rejected = (answer_log_probabilities(model) - expected).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


@pytest.mark.parametrize(("make", "arguments"), [(tiny_llm, {}), (peft_llm, {"peft_config": LORA})])
def test_trls_preference_trainer_takes_the_same_steps_as_a_manual_loop(make, arguments, tmp_path):
    """The reference is a separate model, or the trained model without its adapters."""
    trainer = trainers.plain(tmp_path, tiny_llm(), "dpo", max_steps=6, **arguments)
    bilora = use_bilora(trainer, trainers.CONFIG)
    reference = trainers.attached(make())
    load_tensors(reference._method.tensors(), bilora._method.tensors())
    rows = list(trainer.train_dataset)[: 6 * trainers.BATCH]
    batches = []
    for start in range(0, len(rows), trainers.BATCH):
        batches.append(trainer.data_collator(rows[start : start + trainers.BATCH]))
    trainer.train()

    optimizer = torch.optim.AdamW(reference.param_groups(lr=trainers.RATE))
    reference.bind(optimizer)
    base = tiny_llm()
    expected = []
    for batch in batches:
        loss = preference_loss(reference.model.train(), base, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert trainers.losses(trainer) == pytest.approx(expected, abs=1e-5)
    # At first, the model equals the reference.
    assert expected[0] == pytest.approx(math.log(2))
    assert abs(expected[-1] - expected[0]) > 1e-3
    # The adapters move by up to 6 * RATE; rounding errors depend on the processor.
    assert trainers.difference(bilora, reference) < 1e-3 * 6 * trainers.RATE
    assert 0 < bilora.auxiliary_norm() <= trainers.RHO * (1 + 1e-4)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("trainer", peft_llm),
        pytest.param("sft", tiny_llm, marks=pytest.mark.slow),
        pytest.param("dpo", tiny_llm, marks=pytest.mark.slow),
    ],
)
def test_only_the_primary_is_evaluated_and_saved(kind, make, tmp_path):
    bilora = trainers.attached(make(), replace(trainers.CONFIG, rho=0.5))
    heldout = trainers.preferences(8, seed=1) if kind == "dpo" else trainers.rows(8, seed=1)
    events = set()

    class CheckActive(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            events.add("prediction")
            assert adapters.active(bilora.model) == (PRIMARY,)

        def on_evaluate(self, *args, **kwargs):
            events.add("evaluation")
            assert adapters.active(bilora.model) == (PRIMARY,)

        def on_step_end(self, *args, **kwargs):
            assert adapters.active(bilora.model) == (PRIMARY, AUXILIARY)

    trainer = trainers.with_bilora(
        tmp_path, bilora, kind, eval_dataset=heldout, callbacks=[CheckActive()], **save_every(10)
    )
    trainer.train()
    trainer.save_model()
    assert events == {"prediction", "evaluation"}
    for folder in (tmp_path, tmp_path / "checkpoint-10", tmp_path / "checkpoint-20"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
        # PEFT would save a second adapter in a folder with its name.
        assert names.isdisjoint({"model.safetensors", AUXILIARY})
        assert ("bilora_state.safetensors" in names) == (folder != tmp_path)
        assert not any(AUXILIARY in key for key in load_file(folder / "adapter_model.safetensors"))
    state = load_file(tmp_path / "checkpoint-20" / "bilora_state.safetensors")
    assert {key.split("/")[1] for key in state} == {PRIMARY, AUXILIARY}

    exported = PeftModel.from_pretrained(tiny_llm(), str(tmp_path / "checkpoint-20"))
    assert list(exported.peft_config) == [PRIMARY]
    plain_trainer = trainers.plain(tmp_path / "plain", exported, kind, eval_dataset=heldout)
    expected = plain_trainer.evaluate()["eval_loss"]
    assert trainers.losses(trainer, "eval_loss")[-1] == expected
    assert trainer.evaluate()["eval_loss"] == expected
    if kind == "trainer":
        logits = trainer.predict(heldout).predictions
        assert (logits == plain_trainer.predict(heldout).predictions).all()
    (batch,) = trainers.batches(trainers.rows(4, seed=1))
    with torch.no_grad():  # after training, only the primary is active
        primary_loss = float(bilora.model.eval()(**batch).loss)
        assert float(exported.eval()(**batch).loss) == primary_loss
        adapters.activate(bilora.model, (PRIMARY, AUXILIARY))
        assert abs(float(bilora.model(**batch).loss) - primary_loss) > 1e-4


def test_the_best_model_is_restored_at_the_end(tmp_path):
    bilora = trainers.attached(tiny_llm())
    trainer = trainers.with_bilora(
        tmp_path,
        bilora,
        data=trainers.rows(4),  # few rows, so the held-out loss rises
        eval_dataset=trainers.rows(8, seed=1),
        learning_rate=3e-2,
        load_best_model_at_end=True,
        **save_every(5),
    )
    trainer.train()
    heldout_losses = trainers.losses(trainer, "eval_loss")
    assert min(heldout_losses) < heldout_losses[-1]
    assert trainer.evaluate()["eval_loss"] == min(heldout_losses)
    best = load_file(Path(str(trainer.state.best_model_checkpoint)) / "adapter_model.safetensors")
    for key, tensor in bilora.primary_state_dict().items():
        assert torch.equal(best[f"base_model.model.{key}"], tensor)


def test_a_classifier_trains_its_head_together_with_the_adapters(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_llm().config)
    initial_head = model.score.weight.detach().clone()
    examples = []
    for number, tokens in enumerate(trainers.rows()["input_ids"]):
        examples.append({"input_ids": tokens, "labels": number % 2})
    bilora = trainers.attached(model, replace(trainers.CONFIG, modules_to_save=("score",)))
    trainer = trainers.with_bilora(tmp_path, bilora, data=examples, max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not torch.equal(model.score.weight, initial_head)
    assert not any("score" in name for name, _ in adapters.layers(model))
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    torch.testing.assert_close(stored["base_model.model.score.weight"], model.score.weight.detach())
    assert bilora.auxiliary_norm() <= trainers.RHO * (1 + 1e-6)
