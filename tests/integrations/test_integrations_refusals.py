"""integrations: what would be silently wrong under a trainer is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from bilora_diffusion.api import BiLoRA
from bilora_diffusion.errors import UserError
from bilora_diffusion.integrations import use_bilora
from tests.integrations.trainers import CONFIG, RATE, arguments, attached, rows, tiny_llm


def make(folder: Path, model: Any = None, **values: Any) -> Trainer:
    given = {key: values.pop(key) for key in ("optimizers", "model_init") if key in values}
    return Trainer(model=model, args=arguments(folder, **values), train_dataset=rows(), **given)


@pytest.mark.parametrize(
    ("attribute", "value", "engine"),
    [
        ("is_deepspeed_enabled", True, "DeepSpeed"),
        ("is_fsdp_enabled", True, "FSDP"),
        ("is_distributed_loading_by_transformers", True, "distributed_config"),
        ("accelerator", SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM), "MEGATRON"),
        ("model_init", lambda: tiny_llm(), "model_init.*model="),
    ],
)
def test_a_trainer_that_would_be_wrong(
    attribute: str, value: Any, engine: str, tmp_path: Path
) -> None:
    trainer = make(tmp_path, tiny_llm())
    setattr(trainer, attribute, value)
    with pytest.raises(UserError, match=engine):
        use_bilora(trainer, CONFIG)


def test_what_is_no_trainer_and_what_has_it_already(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got a dict"):
        use_bilora({}, CONFIG)  # type: ignore[arg-type]
    trainer = make(tmp_path, tiny_llm())
    use_bilora(trainer, CONFIG)
    with pytest.raises(UserError, match="already"):
        use_bilora(trainer, CONFIG)


@pytest.mark.parametrize("optim", ["lomo", "schedule_free_adamw", "galore_adamw", "apollo_adamw"])
def test_optimizers_with_weights_of_their_own(optim: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=optim):
        use_bilora(make(tmp_path, tiny_llm(), optim=optim), CONFIG)


def test_another_model(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    with pytest.raises(UserError, match="the model that you gave to attach"):
        use_bilora(make(tmp_path, tiny_llm()), bilora)
    around = get_peft_model(bilora.model, LoraConfig(target_modules=["q_proj"]))  # type: ignore
    with pytest.raises(UserError, match="leave peft_config out"):
        use_bilora(make(tmp_path, around), bilora)


def everything(bilora: BiLoRA) -> list[dict[str, Any]]:
    return [{"params": [p for p in bilora.model.parameters() if p.requires_grad]}]


def descending(bilora: BiLoRA) -> list[dict[str, Any]]:
    return [{**group, "maximize": False} for group in bilora.param_groups(lr=RATE)]


def decaying(bilora: BiLoRA) -> list[dict[str, Any]]:
    return [{**group, "weight_decay": 0.1} for group in bilora.param_groups(lr=RATE)]


def the_primary(bilora: BiLoRA) -> list[dict[str, Any]]:
    return bilora.param_groups(lr=RATE)[:1]


@pytest.mark.parametrize("groups", [everything, descending, decaying, the_primary])
def test_a_wrong_optimizer(groups: Any, tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    optimizer = torch.optim.AdamW(groups(bilora), lr=RATE, weight_decay=0.0)
    trainer = make(tmp_path, bilora.model, optimizers=(optimizer, None))
    use_bilora(trainer, bilora)
    with pytest.raises(UserError, match="param_groups"):
        trainer.train()


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    for binds in (False, True):
        bilora = attached(tiny_llm())
        optimizer = torch.optim.AdamW(bilora.param_groups(lr=RATE))
        if binds:
            bilora.bind(optimizer)
        trainer = make(tmp_path, bilora.model, optimizers=(optimizer, None), max_steps=2)
        use_bilora(trainer, bilora)
        trainer.train()
        assert 0 < bilora.auxiliary_norm() <= CONFIG.rho * (1 + 1e-6)
        assert bilora._method.taken == 2


def test_a_trainer_that_makes_its_optimizer_otherwise(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            raise AssertionError("not called by train")

    trainer = Own(model=tiny_llm(), args=arguments(tmp_path), train_dataset=rows())
    trainer.create_optimizer()  # before use_bilora: of all parameters
    use_bilora(trainer, CONFIG)
    with pytest.raises(UserError, match="lacks"):
        trainer.train()


def test_a_factory_of_optimizers(tmp_path: Path) -> None:
    trainer = Trainer(
        model=tiny_llm(),
        args=arguments(tmp_path),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(lambda: None, {}),  # type: ignore[arg-type]
    )
    use_bilora(trainer, CONFIG)
    with pytest.raises(UserError, match="parameter groups of its own"):
        trainer.train()


def test_groups_that_change_after_binding(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = make(tmp_path, bilora.model, max_steps=1)
    use_bilora(trainer, bilora)
    trainer.create_optimizer()
    optimizer: Any = trainer.optimizer
    optimizer.param_groups[1]["maximize"] = False
    with pytest.raises(UserError, match="maximize=False"):
        trainer.train()


def test_steps_that_pass_by_the_projection(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = make(tmp_path, bilora.model, max_steps=1)
    use_bilora(trainer, bilora)
    optimizer = trainer.create_optimizer()
    optimizer._optimizer_step_post_hooks.clear()
    with pytest.raises(UserError, match="not projected"):
        trainer.train()


def test_parameters_that_somebody_has_unfrozen(tmp_path: Path) -> None:
    trainer = make(tmp_path, tiny_llm())
    use_bilora(trainer, CONFIG)
    trainer.model.lm_head.weight.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"lm_head\.weight is trainable"):
        trainer.train()


def test_adapters_that_were_cast(tmp_path: Path) -> None:
    bilora = attached(tiny_llm())
    trainer = Trainer(
        model=bilora.model,  # type: ignore[arg-type]
        args=arguments(tmp_path, bf16_full_eval=True),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )
    use_bilora(trainer, bilora)
    trainer.evaluate()
    with pytest.raises(UserError, match="bfloat16"):
        trainer.train()
