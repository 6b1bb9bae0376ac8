"""integrations: what would be silently wrong under a trainer is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.api import BiLoRA
from bilora_diffusion.errors import UserError
from bilora_diffusion.integrations import trainer as integration
from bilora_diffusion.integrations import use_bilora
from tests.contract.models import tiny_llm
from tests.integrations.trainers import CONFIG, RATE, RHO, attached, plain, rows, with_bilora

TARGETS = LoraConfig(target_modules=["q_proj"])


def test_a_trainer_that_would_be_wrong(tmp_path: Path) -> None:
    for attribute, value, engine in (
        ("is_deepspeed_enabled", True, "DeepSpeed"),
        ("is_fsdp_enabled", True, "FSDP"),
        ("model_init", lambda: tiny_llm(), "model_init.*model="),
    ):
        trainer = plain(tmp_path, tiny_llm())
        setattr(trainer, attribute, value)
        with pytest.raises(UserError, match=engine):
            use_bilora(trainer, CONFIG)
    with pytest.raises(UserError, match="galore_adamw"):  # it has weights of its own
        use_bilora(plain(tmp_path, tiny_llm(), optim="galore_adamw"), CONFIG)


def test_what_is_no_trainer_has_it_already_or_has_another_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got a dict"):
        use_bilora({}, CONFIG)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no train"):
        integration._check_version(object)  # type: ignore[arg-type]
    bilora = attached(tiny_llm())
    with pytest.raises(UserError, match="already"):
        use_bilora(with_bilora(tmp_path, bilora), bilora)
    with pytest.raises(UserError, match="gave to attach"):
        use_bilora(plain(tmp_path, tiny_llm()), bilora)
    with pytest.raises(UserError, match="peft_config"):
        use_bilora(plain(tmp_path, bilora.model, "sft", peft_config=TARGETS), bilora)
    around = get_peft_model(bilora.model, TARGETS)  # type: ignore
    with pytest.raises(UserError, match="peft_config"):
        use_bilora(plain(tmp_path, around), bilora)
    with pytest.raises(UserError, match="target_modules"):  # which TRL would pass by
        use_bilora(
            plain(tmp_path, tiny_llm(), "sft"), BiLoRAConfig(target_modules=("q_proj", "lm_head"))
        )


def everything(bilora: BiLoRA) -> list[dict[str, Any]]:
    return [{"params": [p for p in bilora.model.parameters() if p.requires_grad]}]


def descending(bilora: BiLoRA) -> list[dict[str, Any]]:
    return [{**group, "maximize": False} for group in bilora.param_groups(lr=RATE)]


@pytest.mark.parametrize("groups", [everything, descending])
def test_a_wrong_optimizer(groups: Any, tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    optimizer = torch.optim.AdamW(groups(bilora), lr=RATE, weight_decay=0.0)
    trainer = with_bilora(tmp_path, bilora, optimizers=(optimizer, None))
    with pytest.raises(UserError, match="param_groups"):
        trainer.train()


@pytest.mark.parametrize("binds", [False, True])
def test_an_optimizer_of_ones_own(binds: bool, tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=RATE))
    if binds:
        bilora.bind(optimizer)
    with_bilora(tmp_path, bilora, optimizers=(optimizer, None), max_steps=2).train()
    assert 0 < bilora.auxiliary_norm() <= RHO * (1 + 1e-6)
    assert bilora._method.taken == 2


def descends(trainer: Any) -> None:
    trainer.create_optimizer().param_groups[1]["maximize"] = False


def unhooks(trainer: Any) -> None:
    trainer.create_optimizer()._optimizer_step_post_hooks.clear()


def unfreezes(trainer: Any) -> None:
    trainer.model.lm_head.weight.requires_grad_(True)


def rounds(trainer: Any) -> None:
    trainer.evaluate(rows(4))


@pytest.mark.parametrize(
    ("spoil", "word", "values"),
    [
        (descends, "maximize=False", {}),
        (unhooks, "not projected", {}),
        (unfreezes, r"lm_head\.weight", {}),
        (rounds, "bfloat16", {"bf16_full_eval": True}),
        (lambda _: None, "groups of its own", {"optimizer_cls_and_kwargs": (lambda: None, {})}),
    ],
)
def test_what_was_spoiled_after_use_bilora(
    spoil: Callable[[Any], None], word: str, values: dict[str, Any], tmp_path: Path
) -> None:
    trainer = with_bilora(tmp_path, attached(tiny_llm()), max_steps=1, **values)
    spoil(trainer)
    with pytest.raises(UserError, match=word):
        trainer.train()
