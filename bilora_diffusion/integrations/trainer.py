"""Transformers' `Trainer`, and what is made of it, with Bi-LoRA in the places where it matters.

A checkpoint of it has a file beside the primary: `bilora_state.safetensors`, with both adapters as
they are trained and, as metadata, the settings that they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .. import adapters
from ..adapters import AUXILIARY, INITIAL, PRIMARY
from ..api import BiLoRA, BiLoRAConfig, attach
from ..core.durable import readable_as, replacing
from ..core.errors import UserError, reading, translated
from ..core.lora_names import CONFIG, WEIGHTS
from ..run.checkpoint import load_tensors, require_same_settings, separate
from . import checks

SAMPLES = "sample_id"
"""The column with the numbers of the samples."""
STATE = "bilora_state.safetensors"
TRAINER_FILES = ("optimizer.pt", "scheduler.pt")
"""The trainer's own files without which it would go on with a fresh optimizer and not say so."""

_VERSION = 2


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
            write_state(Path(output_dir), self.bilora)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_state(Path(resume_from_checkpoint), self.bilora)

    def _load_best_model(self) -> None:
        load_primary(Path(cast(str, self.state.best_model_checkpoint)), self.bilora)


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


def write_state(folder: Path, bilora: BiLoRA) -> None:
    """Write the adapters and the method's state into a checkpoint that holds the primary."""
    settings = {
        "schema_version": _VERSION,
        "config": asdict(bilora.config),
        "method": bilora._method.state_dict(),
    }
    metadata = {"format": "pt", "bilora": json.dumps(settings)}
    with replacing(folder / STATE) as aside:
        save_file(separate(bilora._method.tensors()), aside, metadata=metadata)
        readable_as(folder / CONFIG, aside)


def restore_state(folder: Path, bilora: BiLoRA) -> None:
    """Put a checkpoint's adapters and method state back, if it is whole and of these settings."""
    for name in (STATE, *TRAINER_FILES):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, so training can't go on from it exactly; resume from a "
                "checkpoint that was written with use_bilora and save_only_model=False."
            )
    settings, tensors = _read_state(folder / STATE)
    require_same_settings(settings["config"], json.loads(json.dumps(asdict(bilora.config))))
    current = bilora._method.tensors()
    for name, value in current.items():
        if f"/{INITIAL}/" in name and not torch.equal(value.cpu(), tensors.get(name, value[:0])):
            raise UserError(
                f'init "{bilora.config.init}" has started the primary elsewhere than in {folder}, '
                "so the base weights differ; start it from the same model (and samples)."
            )
    load_tensors(current, tensors)
    bilora._method.load_state_dict(settings["method"])


def load_primary(folder: Path, bilora: BiLoRA) -> None:
    """Put the primary of a folder back, which `bilora.save_pretrained` wrote, if it fits."""
    path = folder / WEIGHTS
    saved = reading(str(path), "keep it in place", lambda: load_file(path))
    parameters = adapters.named_parameters(bilora.model, PRIMARY)
    primary = {adapters.peft_key(key): value for key, value in parameters.items()}
    heads = adapters.head_parameters(bilora.model, PRIMARY)
    if missing := sorted({adapters.peft_path(key) for key in (*primary, *heads)} - saved.keys()):
        raise UserError(f"{missing[0]} is missing in {path}; it is of another model.")
    # of an init that changed the base weights the file has [B, -B0] and [A; A0]: the first part
    parts = {
        key: saved[adapters.peft_path(key)][tuple(slice(size) for size in value.shape)]
        for key, value in primary.items()
    }
    load_tensors(primary, parts)
    load_tensors(heads, {key: saved[adapters.peft_path(key)] for key in heads})


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with translated(f"{path} is truncated or altered", "resume from another checkpoint"):
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["bilora"])
        if settings["schema_version"] != _VERSION:
            raise UserError(
                f"{path} has schema version {settings['schema_version']!r}, but this version of "
                f"bilora_diffusion reads {_VERSION}; resume with the version that wrote it."
            )
        return settings, load_file(path)
