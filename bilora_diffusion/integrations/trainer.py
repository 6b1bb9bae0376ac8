"""Transformers' `Trainer`, and what is made of it, with Bi-LoRA in the places where it matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback

from .. import adapters
from ..adapters import AUXILIARY, PRIMARY
from ..api import BiLoRA, BiLoRAConfig, attach
from ..core.errors import UserError
from . import checks, state

SAMPLES = "sample_id"
"""The column with the numbers of the samples."""


def use_bilora(trainer: Trainer, bilora: BiLoRA | BiLoRAConfig | None = None) -> BiLoRA:
    """Have a trainer of Transformers or TRL train Bi-LoRA; to be called once, before `train`.

    `learning_rate` and `weight_decay` are the primary's; the auxiliary has the same rate (or the
    config's) and no decay; both follow the schedule. `max_grad_norm` and the logged `grad_norm` are
    of the primary alone, as the ball bounds the auxiliary. Evaluation and prediction see the
    primary alone, and so does everything after `train`; a callback of your own that runs the model
    in the middle of training should do so within `bilora.evaluating()`. With several auxiliaries
    the training set has a column "sample_id", the number of each row's sample.

    What the trainer saves is a plain PEFT LoRA adapter, the primary. A checkpoint has the auxiliary
    in `bilora_state.safetensors`, from which `resume_from_checkpoint` goes on exactly.

    Args:
        trainer: a `Trainer`, `Seq2SeqTrainer`, `SFTTrainer` or a subclass of yours.
        bilora: what to put on the trainer's model; or, where the adapters have to be there before
            the trainer (quantized models, an optimizer of your own), what `attach` returned.

    Returns:
        The handle, with `initialise`, which init "lora-ga" needs before `train`.

    Raises:
        UserError: an engine that shards parameters; `model_init`; a model that is not the one with
            the adapters; an optimizer that can't climb on the auxiliary.
    """
    checks.check_trainer(trainer)
    _check_version(type(trainer))
    if not isinstance(bilora, BiLoRA):
        bilora = attach(cast(nn.Module, trainer.model), bilora)
    checks.check_model(trainer, bilora)
    for name in (PRIMARY, AUXILIARY):  # TRL rounds those of a quantized model to bf16
        adapters.cast_adapter_dtype(bilora.model, name)
    trainer.__class__ = _with_bilora(type(trainer))
    cast(WithBiLoRA, trainer).bilora = bilora
    if bilora.config.auxiliaries > 1:
        trainer.data_collator = _WithSamples(trainer.data_collator)
    trainer.add_callback(_Watch(bilora, cast(WithBiLoRA, trainer)))
    return bilora


def _of_the_primary(name: str) -> Any:
    """A method of the trainer that sees the primary alone."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._primary_alone():
            return getattr(super(WithBiLoRA, self), name)(*args, **kwargs)

    return method


class WithBiLoRA(Trainer):
    """Comes before a trainer's own class; `use_bilora` puts it there."""

    bilora: BiLoRA
    _is_primary_alone: bool = False
    _loss: torch.Tensor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        checks.check_trainable(self.bilora)
        self._is_primary_alone = False
        adapters.activate(self.bilora.model, (PRIMARY, AUXILIARY))
        try:
            return super().train(*args, **kwargs)
        finally:
            adapters.activate(self.bilora.model, (PRIMARY,))
            self._is_primary_alone = True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Two groups from `learning_rate` and `weight_decay`; an optimizer that was given is
        checked instead.
        """
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, cast(Any, self.bilora.model)
            )
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
                raise UserError(
                    f"optimizer_cls_and_kwargs names {kind!r}, which makes parameter groups of its"
                    " own; give a subclass of torch.optim.Optimizer."
                )
            groups = self.bilora.param_groups(
                lr=options.get("lr", self.args.learning_rate), weight_decay=self.args.weight_decay
            )
            self.optimizer = kind(groups, **options)
        if not checks.is_bound(self.optimizer, self.bilora):
            self.bilora.bind(self.optimizer)
        return self.optimizer

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(Any, self._signature_columns)
        if columns is not None and SAMPLES not in columns:
            columns.append(SAMPLES)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        numbers = inputs.pop(SAMPLES, ())
        with self.bilora.samples(numbers) if len(numbers) else nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.bilora.config.rho == "auto":
            self._loss = loss + (0 if self._loss is None else self._loss)
        return loss

    def step_loss(self) -> torch.Tensor:
        """The loss of the step that is about to be taken, of all its micro-batches and processes;
        once a step.
        """
        loss, self._loss = self._loss, None
        return self.accelerator.reduce(loss, reduction="mean")  # pyright: ignore

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(
            self.bilora.clip_parameters(), self.args.max_grad_norm
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            return grad_norm
        return self.accelerator.clip_grad_norm_(self.bilora.clip_parameters(), float("inf"))

    @contextmanager
    def _primary_alone(self) -> Iterator[None]:
        if self._is_primary_alone:
            yield
            return
        self._is_primary_alone = True
        try:
            with self.bilora.evaluating():
                yield
        finally:
            self._is_primary_alone = False

    evaluate = _of_the_primary("evaluate")
    predict = _of_the_primary("predict")
    evaluation_loop = _of_the_primary("evaluation_loop")

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop(SAMPLES, None)
        with self._primary_alone():
            return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.bilora._method.metrics())
        super().log(logs, *args, **kwargs)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or cast(str, self.args.output_dir))
        self.bilora.save_pretrained(folder)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            cast(Any, tokenizer).save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state.write(Path(output_dir), self.bilora)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state.restore(Path(resume_from_checkpoint), self.bilora)

    def _load_best_model(self) -> None:
        state.load_primary(Path(cast(str, self.state.best_model_checkpoint)), self.bilora)


class _WithSamples:
    """Collates a batch with the numbers of its samples, which no collator need know."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        numbers = [row[SAMPLES] for row in rows if SAMPLES in row]
        plain_rows = [{key: value for key, value in row.items() if key != SAMPLES} for row in rows]
        batch = self._collate(plain_rows)
        if numbers:
            batch[SAMPLES] = torch.tensor(numbers)
        return batch


class _Watch(TrainerCallback):
    """Sees to it that the optimizer that trains is the one that climbs and projects."""

    def __init__(self, bilora: BiLoRA, trainer: WithBiLoRA) -> None:
        self.bilora, self.trainer = bilora, trainer
        self.steps_before = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        checks.check_optimizer(kwargs["optimizer"], self.bilora)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps_before = self.bilora._method.steps_taken
        if self.bilora.config.rho == "auto":
            self.bilora.observe(self.trainer.step_loss())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        skipped = getattr(kwargs["optimizer"], "step_was_skipped", False)
        for parameter in self.bilora._method.loose_parameters if skipped else ():
            parameter.grad = None  # the trainer forgets those of the model's parameters alone
        if self.bilora._method.steps_taken == self.steps_before and not skipped:
            raise UserError(
                f"{type(kwargs['optimizer']).__name__} took a step after which the auxiliary was "
                "not projected; use an optimizer of torch.optim."
            )


@cache
def _with_bilora(kind: type[Trainer]) -> type[Trainer]:
    return type(f"BiLoRA{kind.__name__}", (WithBiLoRA, kind), {"__module__": __name__})


def _check_version(kind: type[Trainer]) -> None:
    """Refuse a Transformers that would pass by what `WithBiLoRA` does otherwise."""
    for name, value in vars(WithBiLoRA).items():
        is_added = name in ("_primary_alone", "step_loss") or not callable(value)
        if not is_added and not hasattr(kind, name):
            raise UserError(
                f"The trainer of Transformers {transformers.__version__} has no {name}, where "
                "Bi-LoRA comes in; install Transformers 5.24."
            )
