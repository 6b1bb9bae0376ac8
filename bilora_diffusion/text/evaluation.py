"""Losses, metrics and generated answers on held-out rows, with the active adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device

from ..core.durable import write_text
from ..core.errors import UserError
from ..core.files import counted
from ..core.values import HELDOUT_LOSS, HELDOUT_PREFIX, TRAINING_GRID_LOSS
from ..train.task import explain_memory_errors, inference
from .config import TextConfig
from .encode import Encoded
from .metrics import score
from .models import TextModel
from .module import TextModule, collate, pad
from .rows import TextData
from .tokenizing import generation_prompt

# Default maximum length of a causal model's generated answer, in tokens.
CAUSAL_NEW_TOKENS = 256


class Evaluation:
    """Evaluator of a model on held-out rows.

    Batches have rows of similar length, which reduces padding. The batch size changes the results
    only by rounding.

    Args:
        cfg: training configuration.
        text_model: model and tokenizer.
        module: the model with its loss.
        data: tokenized rows, with a validation set.

    Raises:
        UserError: ``--generation_max_new_tokens`` leaves no tokens for a prompt.
    """

    def __init__(
        self, cfg: TextConfig, text_model: TextModel, module: TextModule, data: TextData
    ) -> None:
        assert data.validation is not None
        self.cfg = cfg
        self.text_model = text_model
        self.module = module
        self.data = data
        self.rows: Encoded = data.validation
        self.new_tokens = 0
        if text_model.kind != "classification":
            self.new_tokens = _max_new_tokens(cfg, text_model)

    def measure(self) -> dict[str, float]:
        """Measure the held-out loss and the values that the options add to it.

        Returns:
            "heldout_loss", the mean over all target tokens; the metrics of a classifier or, with
            ``--choose_by score``, of generated answers; and "train_grid_loss", the same loss on the
            first `eval_train_samples` training rows, unless that option is 0.
        """
        losses, classes = self._measure(self.rows, len(self.rows))
        total = sum(self.rows.target_tokens)
        metrics = {HELDOUT_LOSS: sum(losses) / total}
        if self.text_model.kind == "classification":
            words = self.data.rows.label_words
            metrics |= self._scores([words[number] for number in classes])
        elif self.cfg.chooses_by_score:
            metrics |= self._scores(self._generated_answers())
        if self.cfg.eval_train_samples:
            train = self.data.train
            count = min(len(train), self.cfg.eval_train_samples)
            losses, _ = self._measure(train, count)
            metrics[TRAINING_GRID_LOSS] = sum(losses) / sum(train.target_tokens[:count])
        return metrics

    def _measure(self, rows: Encoded, count: int) -> tuple[list[float], list[int]]:
        """Compute each row's summed loss and a classifier's predicted class, for `count` rows."""
        sums = [0.0] * count
        classes = [0] * count
        kind, pad_token_id = self.text_model.kind, self.text_model.tokenizer.pad_token_id
        with inference(self.module):
            for indices in self.batches(rows.lengths[:count]):
                batch = collate([rows.row(index) for index in indices], kind, pad_token_id)
                with self._explain_memory_errors("measuring the held-out loss", len(indices)):
                    inputs: Any = send_to_device(batch, self.text_model.model.device)
                    logits = self.module.logits(inputs)
                    losses = self.module.losses(logits, inputs["labels"]).double().tolist()
                for index, loss in zip(indices, losses, strict=True):
                    sums[index] = loss
                if kind == "classification":
                    best_classes = logits.argmax(-1).tolist()  # (rows, classes) -> (rows,)
                    for index, class_number in zip(indices, best_classes, strict=True):
                        classes[index] = class_number
        return sums, classes

    def answer(self, folder: Path) -> dict[str, float]:
        """Generate answers greedily, write them to ``predictions.jsonl`` and return their metrics.

        A classifier and ``--max_predictions 0`` generate no answers: the result is empty, and no
        file is written.
        """
        if self.text_model.kind == "classification":
            return {}
        answers = self._generated_answers()
        if not answers:
            return {}
        lines = []
        for number, answer in enumerate(answers):
            example = self.rows.example(number)
            # The question, without the prompt template.
            line = {"prompt": example.question, "prediction": answer, "reference": example.answer}
            lines.append(json.dumps(line, ensure_ascii=False))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
        return self._scores(answers)

    def _generated_answers(self) -> list[str]:
        """Generate answers greedily to all held-out rows, or to the first ``--max_predictions``."""
        count = len(self.rows)
        if self.cfg.max_predictions is not None:
            count = min(count, self.cfg.max_predictions)
        prompts = [self._prompt(number) for number in range(count)]
        answers = [""] * count
        with inference(self.module):
            for indices in self.batches([len(prompt) for prompt in prompts]):
                batch_prompts = [prompts[index] for index in indices]
                with self._explain_memory_errors("generating answers", len(indices)):
                    texts = generate(self.text_model, batch_prompts, self.new_tokens)
                for index, text in zip(indices, texts, strict=True):
                    answers[index] = text
        return answers

    def _scores(self, predictions: Sequence[str]) -> dict[str, float]:
        """Compute the metrics of predicted answers to the first held-out rows."""
        rows = self.data.rows
        references = [self.rows.example(number).answer for number in range(len(predictions))]
        metrics = score(rows.metrics, predictions, references, rows.label_words, rows.answer_marker)
        return {HELDOUT_PREFIX + name: value for name, value in metrics.items()}

    def _explain_memory_errors(self, action: str, count: int) -> AbstractContextManager[None]:
        """Return a context manager whose out-of-memory error names the options to change."""
        fix = "use shorter rows, or lower --generation_max_new_tokens if answers are generated"
        if count > 1:
            fix = f"lower --eval_batch_size (now {self.cfg.eval_batch_size})"
        return explain_memory_errors(f"{action} of {counted(count, 'row')}", fix)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield batches of row indices, in the order of the rows' lengths, longest first."""
        # Longest first: if the memory is too small, the first batch fails.
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        for start in range(0, len(order), self.cfg.eval_batch_size):
            yield order[start : start + self.cfg.eval_batch_size]

    def _prompt(self, number: int) -> list[int]:
        """Return the tokens from which a T5 or causal model generates a row's answer."""
        if self.text_model.kind == "seq2seq":
            return self.rows.row(number)["input_ids"]
        room = None
        if self.text_model.max_tokens is not None:
            # Reserve positions for the answer.
            room = self.text_model.max_tokens - self.new_tokens
        example = self.rows.example(number)
        return generation_prompt(example, self.text_model.tokenizer, self.cfg.template, room)


def generate(
    text_model: TextModel, prompts: Sequence[Sequence[int]], new_tokens: int, **sampling: Any
) -> list[str]:
    """Generate a model's answers to prompts, greedily by default.

    Args:
        text_model: model and tokenizer.
        prompts: token ids of each prompt.
        new_tokens: maximum number of tokens of an answer.
        sampling: further arguments of Transformers' `generate`.
    """
    tokenizer = text_model.tokenizer
    is_causal = text_model.kind == "causal"
    # A causal model continues the end of a row, so its rows are padded on the left.
    side = "left" if is_causal else "right"
    # A model can't continue an empty prompt, so the prompt gets a start token.
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    prompts = [prompt or [start] for prompt in prompts]
    # Padding needs an explicit mask, since the padding token can be the EOS token.
    masks = [[1] * len(prompt) for prompt in prompts]
    inputs = {
        "input_ids": pad(prompts, tokenizer.pad_token_id, side),
        "attention_mask": pad(masks, 0, side),
    }
    model: Any = text_model.model
    options = {"do_sample": False, **sampling}
    tokens = model.generate(
        **send_to_device(inputs, model.device),
        max_new_tokens=new_tokens,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    if is_causal:
        # The output includes the prompts.
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _max_new_tokens(cfg: TextConfig, text_model: TextModel) -> int:
    """Return the maximum number of tokens of a generated answer.

    Raises:
        UserError: the answer can take all tokens that the model allows.
    """
    new_tokens = cfg.generation_max_new_tokens
    limit = text_model.max_tokens
    if new_tokens is None and text_model.kind == "seq2seq":
        return cfg.max_target_length
    if new_tokens is None:
        return CAUSAL_NEW_TOKENS if limit is None else min(CAUSAL_NEW_TOKENS, limit // 2)
    if limit is not None and new_tokens >= limit:
        raise UserError(
            f"--generation_max_new_tokens {new_tokens} leaves no tokens for a prompt, since the"
            f" model allows {limit}: give {limit // 2} or less."
        )
    return new_tokens
