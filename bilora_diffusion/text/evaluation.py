"""Loss, metrics and answers on held-out rows, of the model as it acts in the caller's context."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..durable import write_text
from ..errors import UserError
from ..train.task import inference, to_device
from .collate import collate
from .encode import Encoded, generation_prompt
from .metrics import score
from .models import TextModel

if TYPE_CHECKING:
    from .task import TextData, TextModule

CAUSAL_NEW_TOKENS = 256
PREFIX = "heldout_"


class Evaluation:
    """Measures a model on held-out rows.

    Rows go through in order of their length, so that little is padded; the figures do not depend
    on the batch size beyond rounding.

    Args:
        cfg: the options of evaluation, and lengths.
        loaded: the model, its tokenizer and kind.
        module: the model with its loss.
        data: with a validation set.

    Raises:
        UserError: answers may be longer than the model allows.
    """

    def __init__(self, cfg: Any, loaded: TextModel, module: TextModule, data: TextData) -> None:
        assert data.validation is not None
        self.cfg, self.loaded, self.module, self.data = cfg, loaded, module, data
        self.rows: Encoded = data.validation
        self.new_tokens = 0 if loaded.kind == "classification" else _new_tokens(cfg, loaded)

    def measure(self) -> dict[str, float]:
        """``heldout_loss``: the mean over all target tokens; a classifier's metrics; and
        ``train_grid_loss``, the same on the first ``eval_train_samples`` training rows.
        """
        loss, classes = self._measure(self.rows, len(self.rows))
        found = {PREFIX + "loss": loss}
        if classes:
            words = self.data.label_words
            predictions = [words[classes[i]] for i in range(len(self.rows))]
            found |= self._scores(predictions, range(len(self.rows)))
        if self.cfg.eval_train_samples:
            count = min(len(self.data.train), self.cfg.eval_train_samples)
            found["train_grid_loss"], _ = self._measure(self.data.train, count)
        return found

    def _measure(self, rows: Encoded, count: int) -> tuple[float, dict[int, int]]:
        """Mean loss per target token of the first ``count`` rows, and a classifier's choices."""
        total, classes = 0.0, {}
        with inference(self.module):
            for numbers, inputs in self._batches(rows, count):
                logits = self.module.logits(inputs)
                total += float(self.module.losses(logits, inputs["labels"]).double().sum())
                if self.loaded.kind == "classification":
                    classes.update(zip(numbers, logits.argmax(-1).tolist(), strict=True))
        return total / sum(rows.target_tokens[:count]), classes

    def answer(self, folder: Path) -> dict[str, float]:
        """Let the model answer, greedily; returns metrics of the answers.

        Args:
            folder: where ``predictions.jsonl`` goes: prompt, prediction and reference of each row.
        """
        count = len(self.rows)
        if self.cfg.max_predictions is not None:
            count = min(count, self.cfg.max_predictions)
        if not count or self.loaded.kind == "classification":
            return {}
        texts = self._generate(range(count))
        lines = [
            json.dumps(
                {
                    "prompt": self.rows.example(i).question,
                    "prediction": texts[i],
                    "reference": self.rows.example(i).answer,
                },
                ensure_ascii=False,
            )
            for i in range(count)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
        return self._scores([texts[i] for i in range(count)], range(count))

    def _scores(self, predictions: Sequence[str], numbers: Sequence[int]) -> dict[str, float]:
        references = [self.rows.example(i).answer for i in numbers]
        found = score(
            self.data.metrics,
            predictions,
            references,
            labels=self.data.label_words,
            answer_marker=self.data.answer_marker,
        )
        return {PREFIX + name: value for name, value in found.items()}

    def _batches(self, rows: Encoded, count: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        order = sorted(range(count), key=lambda i: -rows.lengths[i])
        device = next(self.module.parameters()).device
        for numbers in _chunks(order, self.cfg.eval_batch_size):
            batch = collate(
                [rows.row(i) for i in numbers],
                self.loaded.kind,
                self.loaded.tokenizer.pad_token_id,
            )
            yield numbers, to_device(batch, device)

    def _generate(self, numbers: Sequence[int]) -> dict[int, str]:
        """Greedy answers by row."""
        prompts = {i: self._prompt(i) for i in numbers}
        order = sorted(numbers, key=lambda i: -len(prompts[i]))
        found: dict[int, str] = {}
        with inference(self.module):
            for chunk in _chunks(order, self.cfg.eval_batch_size):
                answers = self._answers([prompts[i] for i in chunk])
                found.update(zip(chunk, answers, strict=True))
        return found

    def _prompt(self, number: int) -> list[int]:
        if self.loaded.kind == "seq2seq":
            return self.rows.row(number)["input_ids"]
        example, limit = self.rows.example(number), self.loaded.max_tokens
        room = None if limit is None else limit - self.new_tokens
        return generation_prompt(example, self.loaded.tokenizer, self.cfg.template, room)

    def _answers(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        tokenizer = self.loaded.tokenizer
        left = self.loaded.kind == "causal"  # so that all answers start at one place
        ids, mask = _padded(prompts, tokenizer.pad_token_id, left)
        model: Any = self.loaded.model
        given = {"input_ids": ids, "attention_mask": mask}
        made = model.generate(
            **to_device(given, model.device),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        if self.loaded.kind == "causal":
            made = made[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _new_tokens(cfg: Any, loaded: TextModel) -> int:
    """Most tokens of a generated answer.

    Raises:
        UserError: the model has not so many positions, or none left for a prompt.
    """
    wanted, limit = cfg.generation_max_new_tokens, loaded.max_tokens
    if wanted is None and loaded.kind == "seq2seq":
        return cfg.max_target_length
    if wanted is None:
        return CAUSAL_NEW_TOKENS if limit is None else min(CAUSAL_NEW_TOKENS, limit // 2)
    if limit is not None and wanted >= limit:
        raise UserError(
            f"--generation_max_new_tokens {wanted} leaves no room for a prompt in the {limit}"
            f" tokens that the model allows: give {limit // 2} or less."
        )
    return wanted


def _chunks(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size])


def _padded(prompts: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (batch, width), padded on one side."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if left else 0
        ids[row, start : start + len(prompt)] = torch.as_tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask
