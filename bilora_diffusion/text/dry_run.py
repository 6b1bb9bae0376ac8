"""What a dry run of text goes through beside the shared steps: its longest rows, and answers."""

from __future__ import annotations

from typing import Any

from accelerate.utils import send_to_device

from ..train.dry_run import hold_weights
from ..train.memory import Ledger
from ..train.task import MicroBatch, inference
from ..train.trainer import Trainer
from .evaluation import Evaluation
from .module import collate
from .task import TextTask


class Rehearsal:
    """A task whose model has no weights, and whose rows are the real ones."""

    def __init__(self, task: TextTask, ledger: Ledger) -> None:
        self.task = task
        hold_weights(self.parts, ledger)

    @property
    def parts(self) -> dict[str, Any]:
        """The model alone."""
        return dict(self.task.models)

    def batches(self, trainer: Trainer, ledger: Ledger) -> list[MicroBatch]:
        """The longest rows, as many as a pass takes."""
        lengths = self.task.data.train.lengths
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        slots = trainer.schedule.slots()[0]
        return [self.task.micro_batch(slots, [longest[s % len(longest)] for s in slots])]

    def measured(self, trainer: Trainer, ledger: Ledger) -> None:
        """The held-out loss of the longest rows, and answers as long as they may be."""
        evaluation = self.task.evaluation
        if evaluation is None:
            return
        inputs = longest_of(evaluation)
        with trainer.evaluating(), inference(self.task.module):
            with ledger.phase("held-out loss"):
                logits = self.task.module.logits(inputs)
                self.task.module.losses(logits, inputs["labels"])
            del logits
            if evaluation.new_tokens and self.task.cfg.max_predictions != 0:
                with ledger.phase("answers"):
                    _answer(self.task.loaded.model, inputs, evaluation.new_tokens)


def longest_of(evaluation: Evaluation) -> dict[str, Any]:
    """The held-out batch of the longest rows, on the model's device."""
    rows, loaded = evaluation.rows, evaluation.loaded
    numbers = next(evaluation.batches(rows.lengths))
    batch = collate([rows.row(i) for i in numbers], loaded.kind, loaded.tokenizer.pad_token_id)
    moved: Any = send_to_device(batch, loaded.model.device)
    return moved


def _answer(model: Any, inputs: dict[str, Any], new_tokens: int) -> None:
    """One pass through prompts and answers with a cache of keys and values, of which only the last
    token's scores are made: what generation holds at its end.
    """
    ids = inputs["input_ids"]
    width = new_tokens + (0 if model.config.is_encoder_decoder else ids.shape[1])
    whole = ids.new_zeros(len(ids), width)
    if model.config.is_encoder_decoder:
        model(input_ids=ids, decoder_input_ids=whole, use_cache=True)
    else:
        model(input_ids=whole, use_cache=True, logits_to_keep=1)
