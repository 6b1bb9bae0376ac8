"""Fine-tuning of language models and classifiers on text (paper, Sections 5.2 and 5.3), and the
memory that a step takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterSpec
from ..adapters.quantize import held_bytes
from ..core.files import counted
from ..core.seeds import digest, digest_texts
from ..methods import Target
from ..run.content import SampleContent
from ..run.record import validation_folder
from ..train.dry_run import NUMBER_BYTES, STEP, PhaseMemory
from ..train.task import Fold, LengthGroupedOrder, MicroBatch, SampleOrder
from .config import TextConfig
from .evaluation import Evaluation
from .examples import Example
from .models import TextModel
from .module import TextModule, collate
from .rows import TextData, encode_rows

NAME = "model"
HIDDEN_COUNTS = {"causal": 10.5, "seq2seq": 13.0, "classification": 4.0}
"""Numbers that a layer stores for each hidden state of a token."""
INNER_COUNT = 3.6
"""Numbers that it stores for each inner state of its feed-forward part."""
SCORE_COUNT = 2.8
"""Numbers that it stores for each attention score, where attention is not fused."""
LOGIT_BYTES = 12
"""Bytes of the loss for each word of a predicted token."""


class TextTask:
    """Rows of text and the model that learns from them."""

    def __init__(self, cfg: TextConfig, loaded: TextModel, data: TextData) -> None:
        self.cfg, self.loaded, self.data = cfg, loaded, data
        self.module = TextModule(loaded.model, loaded.kind)
        self.models: dict[str, nn.Module] = {NAME: loaded.model}
        if cfg.gradient_checkpointing:
            # Reentrant checkpoints need inputs that require gradients, which frozen ones don't.
            loaded.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        self.num_samples = len(data.train)
        self.sample_names = [data.train.name(i) for i in range(len(data.train))]
        self.names = [example.where for example in data.rows.train]  # before packing
        self.evaluation = Evaluation(cfg, loaded, self.module, data) if data.validation else None
        self.has_heldout = self.evaluation is not None
        self._folds: dict[tuple[int, ...], TextData] = {}

    def data_summary(self) -> str:
        """The training set, in a few words."""
        rows = counted(f"{self.num_samples:,}", "row")
        return f"{rows} of at most {self.cfg.max_length} tokens"

    def targets(self) -> list[Target]:
        """The one model; what a classifier has of new layers is trained whole beside adapters."""
        cfg, modules_to_save = self.cfg, self.loaded.whole_modules
        spec = AdapterSpec.from_options(
            cfg, target_modules=cfg.targets, modules_to_save=modules_to_save
        )
        return [Target(NAME, self.loaded.model, spec, cfg.learning_rate, cfg.adam_weight_decay)]

    def training_content(self) -> list[SampleContent]:
        """Names and hashes of the training rows, before they are packed."""
        return _contents(self.data.rows.train)

    def heldout_content(self) -> list[SampleContent]:
        """Names and hashes of the held-out rows."""
        return _contents(self.data.rows.validation or [])

    def with_config(
        self, cfg: TextConfig, fold: Fold | None = None, is_trial: bool = False
    ) -> TextTask:
        """The same model and rows for a run of another configuration; see `Task`."""
        data = self.data
        if fold is not None:
            key = tuple(fold[1])
            if key not in self._folds:
                train, validation = ([data.rows.train[i] for i in part] for part in fold)
                rows = replace(data.rows, train=train, validation=validation)
                self._folds[key] = encode_rows(cfg, rows, self.loaded)
            data = self._folds[key]
        task = TextTask(cfg, self.loaded, data)
        if task.evaluation is not None:
            task.evaluation.by_row = is_trial
        return task

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
            samples = [order.sample(step * step_size + slot) for slot in range(step_size)]
            mine = tuple(samples[slot] for slot in slots)
            rows = [train.row(sample) for sample in mine]
            weight = step_size / sum(train.target_tokens[sample] for sample in samples)
            inputs = {
                **collate(rows, self.loaded.kind, self.loaded.tokenizer.pad_token_id),
                "weights": torch.full((len(slots),), weight),
            }
            hashes = tuple(_hash(sample, row) for sample, row in zip(mine, rows, strict=True))
            yield MicroBatch(slots, tuple(map(train.name, mine)), hashes, inputs, samples=mine)

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
            return self.evaluation.answer(validation_folder(folder, step))


def _contents(examples: Sequence[Example]) -> list[SampleContent]:
    return [
        SampleContent(example.where, {"text": digest_texts([repr(example)])})
        for example in examples
    ]


def _hash(sample: int, row: dict[str, Any]) -> str:
    tokens = {name: torch.as_tensor(values) for name, values in sorted(row.items())}
    return digest_texts([str(sample), *tokens, digest(*tokens.values())])


def memory_by_phase(task: Any, device: Any) -> PhaseMemory:
    """Memory of a task whose model is empty: the step of its longest rows."""
    cfg, loaded, train = task.cfg, task.loaded, task.data.train
    config = loaded.model.config.get_text_config()
    is_causal = loaded.kind == "causal"
    width, layers, tokens = config.hidden_size, config.num_hidden_layers, max(train.lengths)
    inner_width = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", 4 * width)
    numbers_of_layer = HIDDEN_COUNTS[loaded.kind] * width + INNER_COUNT * inner_width
    if not is_causal:
        numbers_of_layer += SCORE_COUNT * config.num_attention_heads * tokens
    if cfg.gradient_checkpointing:  # one hidden state for each layer, and all of one layer
        numbers = layers * width + numbers_of_layer
    else:
        numbers = layers * numbers_of_layer
    row_tokens = cfg.train_batch_size * tokens
    activations = int(row_tokens * NUMBER_BYTES[cfg.mixed_precision] * numbers)

    targets = cfg.train_batch_size * (tokens if is_causal else max(train.target_tokens))
    words = 0 if loaded.kind == "classification" else config.vocab_size
    weights = held_bytes(loaded.model, cfg.quantize, loaded.whole_modules)
    logits = targets * words * LOGIT_BYTES
    return {STEP: {"weights: model": weights, "activations": activations, "logits": logits}}
