"""Loss, metrics and answers on held-out rows, of the model as it acts in the caller's context."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device

from ..core.durable import write_text
from ..core.errors import UserError
from ..train.task import inference, loss_by_part
from .config import TextConfig
from .encode import Encoded
from .metrics import score
from .models import TextModel
from .module import TextModule, collate, padded
from .rows import TextData
from .tokenizing import generation_prompt

CAUSAL_NEW_TOKENS = 256
PREFIX = "heldout_"


class Evaluation:
    """Measures a model on the held-out rows of ``data``.

    Rows go through in order of their length, so that little is padded; the figures do not depend
    on the batch size beyond rounding.

    Raises:
        UserError: answers may be longer than the model allows.
    """

    def __init__(
        self, cfg: TextConfig, loaded: TextModel, module: TextModule, data: TextData
    ) -> None:
        assert data.validation is not None
        self.cfg, self.loaded, self.module, self.data = cfg, loaded, module, data
        self.rows: Encoded = data.validation
        self.by_row = False
        self.new_tokens = 0 if loaded.kind == "classification" else _new_tokens(cfg, loaded)

    def measure(self) -> dict[str, float]:
        """``heldout_loss``: the mean over all target tokens; a classifier's metrics; and
        ``train_grid_loss``, the same on the first ``eval_train_samples`` training rows; or, where
        it measures ``by_row``, each row's part (`loss_by_part`).
        """
        losses, classes = self._measure(self.rows, len(self.rows))
        total = sum(self.rows.target_tokens)
        figures = {PREFIX + "loss": sum(losses) / total}
        if self.by_row:
            return figures | loss_by_part(losses, total)
        if classes:
            words = self.data.rows.label_words
            figures |= self._scores([words[classes[i]] for i in range(len(self.rows))])
        if self.cfg.eval_train_samples:
            count = min(len(self.data.train), self.cfg.eval_train_samples)
            losses, _ = self._measure(self.data.train, count)
            figures["train_grid_loss"] = sum(losses) / sum(self.data.train.target_tokens[:count])
        return figures

    def _measure(self, rows: Encoded, count: int) -> tuple[list[float], dict[int, int]]:
        """The summed losses of the first ``count`` rows, and a classifier's choices."""
        sums, classes, kind = [0.0] * count, dict[int, int](), self.loaded.kind
        with inference(self.module):
            for numbers in self.batches(rows.lengths[:count]):
                batch = collate(
                    [rows.row(i) for i in numbers], kind, self.loaded.tokenizer.pad_token_id
                )
                inputs: Any = send_to_device(batch, self.loaded.model.device)
                logits = self.module.logits(inputs)
                losses = self.module.losses(logits, inputs["labels"]).double().tolist()
                for number, loss in zip(numbers, losses, strict=True):
                    sums[number] = loss
                if kind == "classification":
                    classes.update(zip(numbers, logits.argmax(-1).tolist(), strict=True))
        return sums, classes

    def answer(self, folder: Path) -> dict[str, float]:
        """Let the model answer, greedily; write ``predictions.jsonl``; return metrics."""
        limit = self.cfg.max_predictions
        count = len(self.rows) if limit is None else min(len(self.rows), limit)
        if not count or self.loaded.kind == "classification":
            return {}
        prompts = [self._prompt(i) for i in range(count)]
        text_by_row: dict[int, str] = {}
        with inference(self.module):
            for numbers in self.batches([len(prompt) for prompt in prompts]):
                texts = generate(self.loaded, [prompts[i] for i in numbers], self.new_tokens)
                text_by_row.update(zip(numbers, texts, strict=True))
        answers, lines = [text_by_row[i] for i in range(count)], []
        for i, answer in enumerate(answers):
            example = self.rows.example(i)
            line = {"prompt": example.question, "prediction": answer, "reference": example.answer}
            lines.append(json.dumps(line, ensure_ascii=False))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
        return self._scores(answers)

    def _scores(self, predictions: Sequence[str]) -> dict[str, float]:
        """Metrics of the answers to the first rows."""
        rows = self.data.rows
        figures = score(
            rows.metrics,
            predictions,
            [self.rows.example(i).answer for i in range(len(predictions))],
            labels=rows.label_words,
            answer_marker=rows.answer_marker,
        )
        return {PREFIX + name: value for name, value in figures.items()}

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of rows of about the same length, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.cfg.eval_batch_size):
            yield order[start : start + self.cfg.eval_batch_size]

    def _prompt(self, number: int) -> list[int]:
        if self.loaded.kind == "seq2seq":
            return self.rows.row(number)["input_ids"]
        example, limit = self.rows.example(number), self.loaded.max_tokens
        room = None if limit is None else limit - self.new_tokens
        return generation_prompt(example, self.loaded.tokenizer, self.cfg.template, room)


def generate(
    loaded: TextModel, prompts: Sequence[Sequence[int]], new_tokens: int, **sampling: Any
) -> list[str]:
    """A model's answers to prompts in tokens; ``sampling`` as Transformers' `generate` takes it."""
    tokenizer, causal = loaded.tokenizer, loaded.kind == "causal"
    side = "left" if causal else "right"  # so that all answers start at one place
    inputs = {
        "input_ids": padded(prompts, tokenizer.pad_token_id, side),
        "attention_mask": padded([[1] * len(prompt) for prompt in prompts], 0, side),
    }
    model: Any = loaded.model
    tokens = model.generate(
        **send_to_device(inputs, model.device),
        max_new_tokens=new_tokens,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        **{"do_sample": False, **sampling},
    )
    if causal:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _new_tokens(cfg: TextConfig, loaded: TextModel) -> int:
    """Most tokens of a generated answer, of which the model must have more positions."""
    new_tokens, limit = cfg.generation_max_new_tokens, loaded.max_tokens
    if new_tokens is None and loaded.kind == "seq2seq":
        return cfg.max_target_length
    if new_tokens is None:
        return CAUSAL_NEW_TOKENS if limit is None else min(CAUSAL_NEW_TOKENS, limit // 2)
    if limit is not None and new_tokens >= limit:
        raise UserError(
            f"--generation_max_new_tokens {new_tokens} leaves no room for a prompt in the {limit}"
            f" tokens that the model allows: give {limit // 2} or less."
        )
    return new_tokens
