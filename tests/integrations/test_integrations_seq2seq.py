"""integrations: Seq2SeqTrainer trains T5 as a loop does, and generates by the primary alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.integrations import use_bilora
from tests.integrations.trainers import (
    STEPS,
    attached,
    batches,
    by_hand,
    difference,
    losses,
    rows,
    settings,
    tiny_t5,
    tiny_tokenizer,
)


def test_a_trainer_takes_the_steps_of_a_loop(tmp_path: Path) -> None:
    bilora = attached(tiny_t5())
    trainer = Seq2SeqTrainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=Seq2SeqTrainingArguments(**settings(tmp_path)),
        train_dataset=rows(),
    )
    use_bilora(trainer, bilora)
    trainer.train()
    reference = attached(tiny_t5())
    expected = by_hand(reference, batches(rows()), shifts=False)
    assert losses(trainer) == pytest.approx(expected, abs=1e-5)
    assert difference(bilora, reference) < 1e-5


def test_what_is_generated_is_the_exported_adapters(tmp_path: Path) -> None:
    bilora = attached(tiny_t5())
    args = Seq2SeqTrainingArguments(
        **settings(tmp_path, predict_with_generate=True, generation_max_length=12)
    )
    held_out = rows(16, seed=1)
    seen: list[Any] = []

    class Predict(TrainerCallback):
        """Predicts in the middle of training, with an auxiliary that nobody could overlook."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step < STEPS:
                return
            for parameter in adapters.parameters(bilora.model, AUXILIARY):
                parameter.data.mul_(50)
            seen.append(trainer.predict(held_out))  # type: ignore[arg-type]
            assert adapters.active(bilora.model) == (PRIMARY, AUXILIARY)
            tokens = torch.tensor(held_out["input_ids"][:])
            seen.append(bilora.model.generate(tokens, max_length=12).numpy())  # type: ignore

    trainer = Seq2SeqTrainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=args,
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=[Predict()],
    )
    use_bilora(trainer, bilora)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "tokenizer.json").is_file()
    exported = PeftModel.from_pretrained(tiny_t5(), str(tmp_path))
    plain = Seq2SeqTrainer(model=exported, args=args, processing_class=tiny_tokenizer())  # type: ignore
    expected: Any = plain.predict(held_out)  # type: ignore[arg-type]
    result, perturbed = seen
    assert (result.predictions == expected.predictions).all()
    assert result.metrics["test_loss"] == expected.metrics["test_loss"]  # type: ignore[index]
    width = min(perturbed.shape[1], expected.predictions.shape[1])
    assert (perturbed[:, :width] != expected.predictions[:, :width]).any()
