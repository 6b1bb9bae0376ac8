"""Fine-tuning of text models (paper, Sections 5.2 and 5.3), and an estimate of a step's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters import AdapterSpec, target_layers
from ..adapters.quantize import held_bytes
from ..adapters.saving import PEFT_PREFIX
from ..config.lora_sources import LoraSource
from ..core.errors import as_user_error
from ..core.files import counted
from ..core.seeds import digest, digest_texts
from ..export.lora_checks import require_same_form, require_same_layers, warn_of_other_base
from ..export.peft_config import adapter_config
from ..methods import Target
from ..run.data import SampleContent
from ..run.record import validation_folder
from ..train.dry_run import NUMBER_BYTES, STEP, PhaseMemory
from ..train.task import LengthGroupedOrder, MicroBatch, SampleOrder
from .config import TextConfig
from .evaluation import Evaluation
from .examples import Example
from .models import TextModel
from .module import TextModule, collate
from .rows import TextData

NAME = "model"
# Measured coefficients of `memory_by_phase` (results/dry_run_memory).
#
# Values that a layer stores per token and hidden dimension, by kind of model.
HIDDEN_COUNTS = {"causal": 10.5, "seq2seq": 13.0, "classification": 4.0}
# Values that a layer stores per token and inner dimension of its feed-forward part.
INNER_COUNT = 3.6
# Values that a layer stores per attention score; for seq2seq models and classifiers only.
SCORE_COUNT = 2.8
# Bytes for logits and loss, per target token and vocabulary entry.
LOGIT_BYTES = 12


class TextTask:
    """The rows of text and the model that is trained on them; see `train.task.Task`."""

    def __init__(self, cfg: TextConfig, text_model: TextModel, data: TextData) -> None:
        self.cfg = cfg
        self.text_model = text_model
        self.data = data
        self.module = TextModule(text_model.model, text_model.kind)
        self.models: dict[str, nn.Module] = {NAME: text_model.model}
        if cfg.gradient_checkpointing:
            # Reentrant checkpointing needs inputs that require gradients, but the outputs of frozen
            # embeddings do not require them.
            text_model.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        self.num_samples = len(data.train)
        self.evaluation = (
            Evaluation(cfg, text_model, self.module, data) if data.validation else None
        )
        self.has_heldout = self.evaluation is not None

    def data_summary(self) -> str:
        """Describe the training set in a few words."""
        rows = counted(f"{self.num_samples:,}", "row")
        return f"{rows} of at most {self.cfg.max_length} tokens"

    def targets(self) -> list[Target]:
        """Return the model as the only target; a classifier's head and new layers train in full."""
        cfg = self.cfg
        whole_modules = self.text_model.whole_modules
        spec = AdapterSpec.from_options(
            cfg, target_modules=cfg.targets, modules_to_save=whole_modules
        )
        model = self.text_model.model
        start = None
        source = cfg.lora_sources.get("init_from")
        if source is not None:
            start = read_start(source, model, spec, cfg.base_model)
        rate, weight_decay = cfg.learning_rate, cfg.adam_weight_decay
        return [Target(NAME, model, spec, rate, weight_decay, start=start)]

    def training_content(self) -> list[SampleContent]:
        """Return names and hashes of the training rows, before they are packed."""
        return _contents(self.data.rows.train)

    def heldout_content(self) -> list[SampleContent]:
        """Return names and hashes of the held-out rows."""
        return _contents(self.data.rows.validation or [])

    def with_config(self, cfg: TextConfig) -> TextTask:
        """Return a task with the same model and rows for another configuration; see `Task`."""
        return TextTask(cfg, self.text_model, self.data)

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        """Yield micro-batches in the schedule's order."""
        train = self.data.train
        pad_token_id = self.text_model.tokenizer.pad_token_id
        if self.cfg.group_by_length:
            # Rows are grouped by step, so all micro-batches of a step have similar lengths.
            order = LengthGroupedOrder(train.lengths, self.cfg.seed, step_size)
        else:
            order = SampleOrder(len(train), self.cfg.seed)
        for step, slots in schedule:
            step_samples = [order.sample(step * step_size + slot) for slot in range(step_size)]
            samples = tuple(step_samples[slot] for slot in slots)
            rows = [train.row(sample) for sample in samples]
            inputs = collate(rows, self.text_model.kind, pad_token_id)
            # The weights depend on the target tokens of the whole step (see `TextModule`).
            target_tokens = sum(train.target_tokens[sample] for sample in step_samples)
            inputs["weights"] = torch.full((len(slots),), step_size / target_tokens)
            names = []
            digests = []
            for sample, row in zip(samples, rows, strict=True):
                names.append(train.name(sample))
                digests.append(_digest(sample, row))
            yield MicroBatch(slots, tuple(names), tuple(digests), inputs)

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """Measure the values of `Evaluation.measure`; {} without held-out rows."""
        if self.evaluation is None:
            return {}
        with evaluating:
            return self.evaluation.measure()

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """Write and score answers (`Evaluation.answer`); {} without held-out rows."""
        if self.evaluation is None:
            return {}
        with evaluating:
            return self.evaluation.answer(validation_folder(folder, step))


def read_start(
    source: LoraSource, model: nn.Module, spec: AdapterSpec, base_model: str
) -> dict[str, Tensor]:
    """Read the primary's initial values from a PEFT adapter; return tensors by PEFT key.

    Raises:
        UserError: the adapter can't be read, its layers, rank, alpha or kind (LoRA or DoRA) differ
            from the primary's, or its layers have several ranks or alphas.
    """
    with as_user_error(f"--{source.option} {source.path} can't be read", "give a PEFT adapter"):
        tensors = load_file(source.path)
    config = adapter_config(source.path, {}, "peft")["model"]
    warn_of_other_base(source, config.base_model_name_or_path, base_model)
    start = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    layer_names, ranks, alphas = [], set(), set()
    for key, value in start.items():
        name, is_A, _ = key.partition(".lora_A.")
        if is_A:
            layer_names.append(name)
            ranks.add(len(value))
            alphas.add(config.scale(name, len(value)) * len(value))
    require_same_layers(source, layer_names, target_layers(model, spec), "target_modules")
    require_same_form(source, spec, ranks=ranks, alphas=alphas, use_dora=config.use_dora)
    return start


def _contents(examples: Sequence[Example]) -> list[SampleContent]:
    """Return names and hashes of examples."""
    contents = []
    for example in examples:
        hashes = {"text": digest_texts([repr(example)])}
        contents.append(SampleContent(example.where, hashes))
    return contents


def _digest(sample: int, row: dict[str, Any]) -> str:
    """Hash a row's number, columns and tokens."""
    columns = sorted(row)
    tensors = [torch.as_tensor(row[name]) for name in columns]
    return digest_texts([str(sample), *columns, digest(*tensors)])


def memory_by_phase(task: Any, device: Any) -> PhaseMemory:
    """Estimate the memory of a step with the longest rows.

    The task's model can be on the meta device.

    Returns:
        Bytes by part, for the phase `STEP` only; `dry_run.complete` adds the other parts.
    """
    cfg, text_model, train = task.cfg, task.text_model, task.data.train
    config = text_model.model.config.get_text_config()
    is_causal = text_model.kind == "causal"
    width = config.hidden_size
    layers = config.num_hidden_layers
    tokens = max(train.lengths)
    # T5 names this width "d_ff".
    inner_width = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", 4 * width)
    # Values that a layer stores per token.
    values_of_layer = HIDDEN_COUNTS[text_model.kind] * width + INNER_COUNT * inner_width
    if not is_causal:
        values_of_layer += SCORE_COUNT * config.num_attention_heads * tokens
    if cfg.gradient_checkpointing:  # one hidden state per layer, and all values of one layer
        values_per_token = layers * width + values_of_layer
    else:
        values_per_token = layers * values_of_layer
    batch_tokens = cfg.train_batch_size * tokens
    activations = int(batch_tokens * NUMBER_BYTES[cfg.mixed_precision] * values_per_token)

    target_tokens = tokens if is_causal else max(train.target_tokens)
    words = 0 if text_model.kind == "classification" else config.vocab_size
    logits = cfg.train_batch_size * target_tokens * words * LOGIT_BYTES
    weights = held_bytes(text_model.model, cfg.quantize, text_model.whole_modules)
    return {STEP: {"weights: model": weights, "activations": activations, "logits": logits}}
