"""Bi-LoRA in Transformers' `Trainer` and its subclasses: training steps, saving and evaluation.

A checkpoint of such a trainer contains the primary as a PEFT adapter and
`bilora_state.safetensors`, which has both adapters in their training form and, in its metadata,
their settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
from ..core import removed
from ..core.durable import readable_as, replacing
from ..core.errors import UserError, as_user_error, read_or_refuse
from ..core.lora_names import CONFIG, WEIGHTS
from ..run.checkpoint import load_tensors, separate
from ..run.settings import require_same_settings
from . import checks

STATE = "bilora_state.safetensors"
# Files of the trainer. Without them, it would resume with a new optimizer and no warning.
TRAINER_FILES = ("optimizer.pt", "scheduler.pt")

_VERSION = 2


def use_bilora(trainer: Trainer, bilora: BiLoRA | BiLoRAConfig | None = None) -> BiLoRA:
    """Set up a trainer of Transformers or TRL to train Bi-LoRA; call it once, before `train`.

    `learning_rate`, `weight_decay`, `max_grad_norm` and the logged `grad_norm` apply to the primary
    and to `modules_to_save`. The auxiliary has no weight decay and is not clipped, since the ball
    bounds it. Its learning rate is the same unless the config sets one. Both rates follow the
    schedule. Evaluation, prediction and everything after `train` use the primary alone. A callback
    that runs the model during training should do so within `bilora.evaluating()`.

    The trainer saves the primary as a plain PEFT LoRA adapter. A checkpoint also contains the
    auxiliary, in `bilora_state.safetensors`, so `resume_from_checkpoint` resumes exactly.

    Args:
        trainer: `Trainer`, `Seq2SeqTrainer`, `SFTTrainer`, `DPOTrainer` or your own subclass.
        bilora: configuration of the adapters, or the object that `attach` returned if the adapters
            must exist before the trainer (quantized models, your own optimizer).

    Returns:
        The object that `attach` returns. With init "lora-ga", call its `initialise` before `train`.

    Raises:
        UserError: the object is not a `Trainer` or already has Bi-LoRA, its engine shards or
            replaces parameters, it has `model_init` or a model other than the one with the
            adapters, its optimizer is not supported, or Transformers or TRL would not train both
            adapters.
    """
    checks.check_trainer(trainer)
    _check_version(type(trainer))
    if not isinstance(bilora, BiLoRA):
        bilora = attach(cast(nn.Module, trainer.model), bilora)
    checks.check_model(trainer, bilora)
    # TRL casts the adapters of a quantized model to bf16.
    for name in (PRIMARY, AUXILIARY):
        adapters.cast_adapter_dtype(bilora.model, name)
    # The trainer already exists, so replace its class with a subclass that has the mixin.
    trainer.__class__ = _with_bilora(type(trainer))
    cast(WithBiLoRA, trainer).bilora = bilora
    trainer.add_callback(_OptimizerWatch(bilora))
    return bilora


def _with_primary(name: str) -> Any:
    """Create a method that calls the trainer's method of this name with the auxiliary disabled."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return getattr(super(WithBiLoRA, self), name)(*args, **kwargs)

    return method


class WithBiLoRA(Trainer):
    """A mixin that `use_bilora` puts in front of a trainer's class."""

    bilora: BiLoRA
    _is_evaluating: bool = False  # whether the primary alone is active

    def train(self, *args: Any, **kwargs: Any) -> Any:
        checks.check_trainable(self.bilora)
        self._is_evaluating = False
        adapters.activate(self.bilora.model, (PRIMARY, AUXILIARY))
        try:
            return super().train(*args, **kwargs)
        finally:
            adapters.activate(self.bilora.model, (PRIMARY,))
            self._is_evaluating = True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create an optimizer for both adapters if there is none, and bind it."""
        if self.optimizer is None:
            class_and_options = self.optimizer_cls_and_kwargs
            if class_and_options is None:
                class_and_options = self.get_optimizer_cls_and_kwargs(
                    self.args, cast(Any, self.bilora.model)
                )
            optimizer_class, options = class_and_options
            # `optimizer_cls_and_kwargs` may name a factory, which creates its own groups.
            is_class = isinstance(optimizer_class, type)
            if not is_class or not issubclass(optimizer_class, torch.optim.Optimizer):
                raise UserError(
                    f"optimizer_cls_and_kwargs names {optimizer_class!r}, which creates"
                    " groups of its own; pass a subclass of torch.optim.Optimizer."
                )
            # Each group has its own learning rate, since the auxiliary's may differ.
            rate = options.get("lr", self.args.learning_rate)
            groups = self.bilora.param_groups(lr=rate, weight_decay=self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        if not checks.is_bound(self.optimizer, self.bilora):
            self.bilora.bind(self.optimizer)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(
            self.bilora.clip_parameters(), self.args.max_grad_norm
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            return grad_norm
        # With an infinite bound the call clips nothing and only returns the norm.
        return self.accelerator.clip_grad_norm_(self.bilora.clip_parameters(), float("inf"))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Disable the auxiliary within the context. Contexts can be nested."""
        if self._is_evaluating:
            yield
            return
        self._is_evaluating = True
        try:
            with self.bilora.evaluating():
                yield
        finally:
            self._is_evaluating = False

    evaluate = _with_primary("evaluate")
    predict = _with_primary("predict")
    evaluation_loop = _with_primary("evaluation_loop")

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
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


class _OptimizerWatch(TrainerCallback):
    """A callback that checks that the trainer's optimizer is bound and its steps project."""

    def __init__(self, bilora: BiLoRA) -> None:
        self.bilora = bilora
        self.steps_before = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        checks.check_optimizer(kwargs["optimizer"], self.bilora)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps_before = self.bilora._method.steps_taken

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # A gradient scaler skips steps whose gradients are not finite.
        is_skipped = getattr(kwargs["optimizer"], "step_was_skipped", False)
        if not is_skipped and self.bilora._method.steps_taken == self.steps_before:
            raise UserError(
                f"{type(kwargs['optimizer']).__name__} took a step after which the auxiliary was "
                "not projected; use an optimizer from torch.optim."
            )


@cache
def _with_bilora(trainer_class: type[Trainer]) -> type[Trainer]:
    """Create the subclass of a trainer's class that trains Bi-LoRA."""
    name = f"BiLoRA{trainer_class.__name__}"
    return type(name, (WithBiLoRA, trainer_class), {"__module__": __name__})


def _check_version(trainer_class: type[Trainer]) -> None:
    """Check that this version of Transformers has all methods that `WithBiLoRA` overrides."""
    for name, value in vars(WithBiLoRA).items():
        # All other functions of the mixin override a method of the trainer.
        is_added = name == "_evaluating" or not callable(value)
        if not is_added and not hasattr(trainer_class, name):
            raise UserError(
                f"The trainer of Transformers {transformers.__version__} has no {name}, which "
                "Bi-LoRA overrides; install Transformers 5.24."
            )


def write_state(folder: Path, bilora: BiLoRA) -> None:
    """Add both adapters and the method's state to a checkpoint.

    Raises:
        OSError, SafetensorError: the file can't be written.
    """
    settings = {
        "schema_version": _VERSION,
        "config": asdict(bilora.config),
        "method": bilora._method.state_dict(),
    }
    metadata = {"format": "pt", "bilora": json.dumps(settings)}
    with replacing(folder / STATE) as temporary_file:
        save_file(separate(bilora._method.tensors()), temporary_file, metadata=metadata)
        readable_as(folder / CONFIG, temporary_file)


def restore_state(folder: Path, bilora: BiLoRA) -> None:
    """Load a checkpoint's adapters and method state.

    Raises:
        UserError: the checkpoint lacks a file, is damaged, has other settings, or belongs to other
            base weights.
    """
    for name in (STATE, *TRAINER_FILES):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, so it can't be resumed exactly; resume from a "
                "checkpoint that was written with use_bilora and save_only_model=False."
            )
    settings, tensors = _read_state(folder / STATE)
    config = json.loads(json.dumps(asdict(bilora.config)))  # as in the file: lists, not tuples
    removed.require_neutral(settings["config"])
    require_same_settings(settings["config"], config, removed.OPTIONS.keys())
    current_tensors = bilora._method.tensors()
    for name, value in current_tensors.items():
        # A tensor that is missing from the file becomes an empty one, which never equals `value`.
        saved_value = tensors.get(name, value[:0])
        if f"/{INITIAL}/" in name and not torch.equal(value.cpu(), saved_value):
            raise UserError(
                f'init "{bilora.config.init}" gave the primary values that differ from those in '
                f"{folder}, so the base weights differ too; use the same model (and the same "
                "samples)."
            )
    load_tensors(current_tensors, tensors)
    bilora._method.load_state_dict(settings["method"])


def load_primary(folder: Path, bilora: BiLoRA) -> None:
    """Load the primary from a folder that `bilora.save_pretrained` wrote.

    Raises:
        UserError: the file can't be read, or belongs to another model.
    """
    path = folder / WEIGHTS
    saved = read_or_refuse(str(path), "keep this file until training ends", lambda: load_file(path))
    primary = {}
    for name, parameter in adapters.named_parameters(bilora.model, PRIMARY).items():
        primary[adapters.peft_key(name)] = parameter
    heads = adapters.head_parameters(bilora.model, PRIMARY)
    paths = {adapters.peft_path(key) for key in (*primary, *heads)}
    missing = sorted(paths - saved.keys())
    if missing:
        raise UserError(f"{missing[0]} is missing from {path}; the file belongs to another model.")
    saved_primary = {}
    for key, parameter in primary.items():
        # If the init changed the base weights, the file has [B, -B0] and [A; A0]; the primary is
        # the first part of each.
        first_part = tuple(slice(size) for size in parameter.shape)
        saved_primary[key] = saved[adapters.peft_path(key)][first_part]
    load_tensors(primary, saved_primary)
    load_tensors(heads, {key: saved[adapters.peft_path(key)] for key in heads})


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the settings and tensors of a state file."""
    with as_user_error(f"{path} is truncated or altered", "resume from another checkpoint"):
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["bilora"])
        if settings["schema_version"] != _VERSION:
            raise UserError(
                f"{path} has schema version {settings['schema_version']!r}, but this version of "
                f"bilora_diffusion reads {_VERSION}; resume with the version that wrote it."
            )
        return settings, load_file(path)
