"""integrations: TRL's SFTTrainer trains what the loop trains, on a plain model and a PEFT one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.adapters import AUXILIARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.integrations import use_bilora
from tests.integrations.trainers import (
    CONFIG,
    attached,
    batches,
    by_hand,
    difference,
    losses,
    rows,
    settings,
    tiny_llm,
    tiny_tokenizer,
)

pytest.importorskip("trl")

from trl import SFTConfig, SFTTrainer

PEFT = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)


def make(folder: Path, model: Any, peft_config: LoraConfig | None = None, **values: Any) -> Any:
    given = settings(folder, **values)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{"bf16": False, "gradient_checkpointing": False, **given}),
        train_dataset=rows(),
        eval_dataset=rows(8, seed=1),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("brings", ["plain", "peft", "checkpointing", "accumulation"])
def test_a_trainer_takes_the_steps_of_a_loop(brings: str, tmp_path: Path) -> None:
    models: list[Any] = [tiny_llm(), tiny_llm()]
    if brings == "peft":
        torch.manual_seed(5)
        models[0] = get_peft_model(models[0], PEFT)
        torch.manual_seed(5)
        models[1] = get_peft_model(models[1], PEFT)
    values: dict[str, Any] = {}
    if brings == "checkpointing":
        values = {"gradient_checkpointing": True}
    if brings == "accumulation":
        values = {"gradient_accumulation_steps": 4, "max_steps": 5, "max_grad_norm": 0.05}
    bilora, reference = attached(models[0]), attached(models[1])
    trainer = make(tmp_path, models[0], **values)
    use_bilora(trainer, bilora)
    trainer.train()
    several = brings == "accumulation"
    expected = by_hand(
        reference,
        batches(rows()),
        accumulate=4 if several else 1,
        clip=0.05 if several else 0.0,
    )
    assert losses(trainer) == pytest.approx(expected, abs=1e-5)
    assert difference(bilora, reference) < 1e-5


def test_evaluation_and_checkpoints_are_the_primarys(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        tiny_llm(),
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
    )
    use_bilora(trainer, BiLoRAConfig(rank=4, alpha=8, rho=0.5))
    trainer.train()
    inside = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    folder = tmp_path / "checkpoint-20"
    assert not (folder / AUXILIARY).exists()
    exported = PeftModel.from_pretrained(tiny_llm(), str(folder))
    plain = make(tmp_path / "plain", exported)
    assert inside[-1] == plain.evaluate()["eval_loss"]


def test_a_run_in_bf16_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ends = []
    for cut in (None, 10):
        bilora = attached(tiny_llm())
        trainer = make(
            tmp_path / str(cut), bilora.model, bf16=True, save_strategy="steps", save_steps=10
        )
        use_bilora(trainer, bilora)
        trainer.train()
        ends.append(bilora)
    again = attached(tiny_llm(), seed=99)
    trainer = make(tmp_path / "10", again.model, bf16=True)
    use_bilora(trainer, again)
    trainer.train(resume_from_checkpoint=str(tmp_path / "10" / "checkpoint-10"))
    assert difference(again, ends[0]) == 0


def test_adapters_twice(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = make(tmp_path, bilora.model, PEFT)
    with pytest.raises(UserError, match="leave peft_config out"):
        use_bilora(trainer, bilora)


def test_an_adapter_that_the_trainer_would_pass_by(tmp_path: Path) -> None:
    trainer = make(tmp_path, tiny_llm())
    with pytest.raises(UserError, match="take it out of target_modules"):
        use_bilora(trainer, BiLoRAConfig(target_modules=("q_proj", "lm_head")))


def test_adapters_that_the_trainer_rounded_are_trained_in_fp32(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = make(tmp_path, bilora.model, max_steps=1)
    for parameter in bilora.model.parameters():
        if parameter.requires_grad:  # what TRL does to a quantized model
            parameter.data = parameter.data.to(torch.bfloat16)
    use_bilora(trainer, bilora)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in bilora.clip_parameters())
    assert CONFIG.rho * (1 + 1e-6) >= bilora.auxiliary_norm() > 0
