"""Fine-tuning of language models and classifiers on text (paper, Sections 5.2 and 5.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import AdapterSpec
from ..methods import Target
from ..seeds import digest, digest_texts
from ..train.order import LengthGroupedOrder, SampleOrder
from ..train.task import MicroBatch, precision
from .collate import collate
from .encode import Encoded
from .evaluation import Evaluation
from .models import TextModel
from .tokenizing import IGNORED

NAME = "model"


class TextModule(nn.Module):
    """The trained model and its loss.

    ``forward`` takes a micro-batch's inputs: what ``collate`` gives, and ``weights`` (slots,). It
    returns one loss per slot, the sum over its target tokens times its weight, in float32. With
    weight (slots of the step) / (target tokens of the step), the mean over all slots of a step is
    the mean over all its tokens, as in Transformers' Trainer, however the step is cut and shared.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """One weighted loss per slot, (slots,)."""
        return self.losses(self.logits(inputs), inputs["labels"]) * inputs["weights"]

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of each row's target tokens, (slots,), in float32."""
        if self.kind == "classification":
            return F.cross_entropy(logits.float(), labels, reduction="none")
        if self.kind == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        wanted = labels != IGNORED
        # Only where there is a loss: a vocabulary in fp32 for every padded token takes gigabytes.
        losses = F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none")
        rows = wanted.nonzero()[:, 0]
        return losses.new_zeros(len(labels)).index_add(0, rows, losses)

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """(slots, tokens, vocabulary), or (slots, classes) of a classifier."""
        model: Any = self.model
        given = {k: v for k, v in inputs.items() if k not in ("labels", "weights")}
        if given["attention_mask"].is_floating_point():  # of packed rows; added to the scores
            given["attention_mask"] = given["attention_mask"].to(precision(self.model))
        if self.kind == "seq2seq":
            labels = inputs["labels"]
            given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        if self.kind != "classification":
            given["use_cache"] = False
            return model(**given).logits
        kept = precision(self.model)  # its head is in fp32, whatever the layers before it are in
        with torch.autocast(given["input_ids"].device.type, kept, enabled=kept != torch.float32):
            return model(**given).logits


@dataclass(frozen=True)
class TextData:
    """What is learned from, and what is held out.

    Args:
        train: tokenized training rows.
        validation: held-out rows, or None.
        metrics: names for ``data.text.metrics.score``.
        label_words: the answers that there are; empty for free text.
        answer_marker: what stands before the answer proper, such as "####".
    """

    train: Encoded
    validation: Encoded | None = None
    metrics: tuple[str, ...] = ()
    label_words: tuple[str, ...] = ()
    answer_marker: str | None = None


class TextTask:
    """Rows of text and the model that learns from them.

    Args:
        cfg: the command line's configuration.
        loaded: the model, its tokenizer and its kind.
        data: tokenized training and held-out rows.
    """

    def __init__(self, cfg: Any, loaded: TextModel, data: TextData) -> None:
        self.cfg, self.loaded, self.data = cfg, loaded, data
        self.module = TextModule(loaded.model, loaded.kind)
        self.models: dict[str, nn.Module] = {NAME: loaded.model}
        if cfg.gradient_checkpointing:
            # Reentrant checkpoints need inputs that require gradients, which frozen ones don't.
            loaded.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        self.num_samples = len(data.train)
        self.evaluation = Evaluation(cfg, loaded, self.module, data) if data.validation else None

    def data_summary(self) -> str:
        """What it is trained on, in a few words."""
        return f"{self.num_samples:,} rows of at most {self.cfg.max_length} tokens"

    def targets(self) -> list[Target]:
        """The one model; what a classifier has of new layers is trained whole beside adapters."""
        cfg = self.cfg
        spec = AdapterSpec(
            rank=cfg.rank,
            alpha=cfg.lora_alpha,
            dropout=cfg.lora_dropout,
            init=cfg.init_lora_weights,
            use_dora=cfg.use_dora,
            target_modules=cfg.targets,
            modules_to_save=self.loaded.whole_modules,
        )
        return [Target(NAME, self.loaded.model, spec, cfg.learning_rate, cfg.adam_weight_decay)]

    def to_device(self, device: torch.device) -> None:
        """Move the model."""
        self.module.to(device)

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        """Micro-batches in the schedule's order."""
        train, seed = self.data.train, self.cfg.seed
        order = (
            LengthGroupedOrder(train.lengths, seed, step_size)
            if self.cfg.group_by_length
            else SampleOrder(len(train), seed)
        )
        for step, slots in schedule:
            whole = [order.sample(step * step_size + slot) for slot in range(step_size)]
            yield self._micro_batch(slots, whole)

    def _micro_batch(self, slots: tuple[int, ...], whole: Sequence[int]) -> MicroBatch:
        """Some slots of a step whose samples are ``whole``."""
        train = self.data.train
        mine = [whole[slot] for slot in slots]
        rows = [train.row(sample) for sample in mine]
        weight = len(whole) / sum(train.target_tokens[sample] for sample in whole)
        inputs = {
            **collate(rows, self.loaded.kind, self.loaded.tokenizer.pad_token_id),
            "weights": torch.full((len(slots),), weight),
        }
        digests = tuple(self._digest(sample, row) for sample, row in zip(mine, rows, strict=True))
        return MicroBatch(slots, tuple(train.name(s) for s in mine), digests, inputs)

    def _digest(self, sample: int, row: dict[str, Any]) -> str:
        tokens = {name: torch.as_tensor(values) for name, values in sorted(row.items())}
        return digest_texts([str(sample), *tokens, digest(*tokens.values())])

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """Mean loss per target token of the held-out rows, and a classifier's metrics."""
        if self.evaluation is None:
            return {}
        with evaluating:
            return self.evaluation.measure()

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """The model's answers to the held-out rows, as ``validation/step-N/predictions.jsonl``, and
        the metrics of generated ones.
        """
        if self.evaluation is None:
            return {}
        with evaluating:
            return self.evaluation.answer(folder / "validation" / f"step-{step}")
