"""integrations: what would be silently wrong under a trainer is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.integrations import trainer as integration
from bilora_diffusion.integrations import use_bilora
from tests.contract.models import tiny_llm
from tests.integrations.trainers import CONFIG, RATE, RHO, attached, plain, rows, with_bilora

TARGETS = LoraConfig(target_modules=["q_proj"])
HEAD = BiLoRAConfig(target_modules=("q_proj", "lm_head"))  # which TRL would pass by


def changed(folder: Path, name: str, value: Any) -> Any:
    trainer = plain(folder, tiny_llm())
    setattr(trainer, name, value)
    return trainer


USES: list[tuple[Callable[[Path, Any], object], str]] = [
    (lambda f, b: use_bilora(changed(f, "is_deepspeed_enabled", True), CONFIG), "DeepSpeed"),
    (lambda f, b: use_bilora(changed(f, "is_fsdp_enabled", True), CONFIG), "FSDP"),
    (lambda f, b: use_bilora(changed(f, "model_init", tiny_llm), CONFIG), "model_init.*model="),
    # it has weights of its own
    (lambda f, b: use_bilora(plain(f, tiny_llm(), optim="galore_adamw"), CONFIG), "galore_adamw"),
    (lambda f, b: use_bilora({}, CONFIG), "got a dict"),  # type: ignore[arg-type]
    (lambda f, b: integration._check_version(object), "has no train"),  # type: ignore[arg-type]
    (lambda f, b: use_bilora(with_bilora(f, b), b), "already"),
    (lambda f, b: use_bilora(plain(f, tiny_llm()), b), "gave to attach"),
    (lambda f, b: use_bilora(plain(f, b.model, "sft", peft_config=TARGETS), b), "peft_config"),
    (lambda f, b: use_bilora(plain(f, get_peft_model(b.model, TARGETS)), b), "peft_config"),
    (lambda f, b: use_bilora(plain(f, tiny_llm(), "sft"), HEAD), "target_modules"),
]


@pytest.mark.parametrize(("use", "word"), USES)
def test_a_trainer_that_would_be_wrong(use: Any, word: str, tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    with pytest.raises(UserError, match=word):
        use(tmp_path, bilora)


@pytest.mark.parametrize("descends", [False, True])
def test_a_wrong_optimizer(descends: bool, tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    groups: Any = [{"params": [p for p in bilora.model.parameters() if p.requires_grad]}]
    if descends:
        groups = [{**group, "maximize": False} for group in bilora.param_groups(lr=RATE)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)
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


SPOILS: list[tuple[Callable[[Any], object], str, dict[str, Any]]] = [
    (lambda t: t.create_optimizer().param_groups[1].update(maximize=False), "maximize=False", {}),
    (lambda t: t.create_optimizer()._optimizer_step_post_hooks.clear(), "not projected", {}),
    (lambda t: t.model.lm_head.weight.requires_grad_(True), r"lm_head\.weight", {}),
    (lambda t: t.evaluate(rows(4)), "bfloat16", {"bf16_full_eval": True}),
    (lambda t: None, "groups of its own", {"optimizer_cls_and_kwargs": (lambda: None, {})}),
]


@pytest.mark.parametrize(("spoil", "word", "values"), SPOILS)
def test_what_was_spoiled_after_use_bilora(
    spoil: Callable[[Any], None], word: str, values: dict[str, Any], tmp_path: Path
) -> None:
    trainer = with_bilora(tmp_path, attached(tiny_llm()), max_steps=1, **values)
    spoil(trainer)
    with pytest.raises(UserError, match=word):
        trainer.train()
