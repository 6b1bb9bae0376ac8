"""Rows to the tensors of one batch, and the model with its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..train.task import precision
from .tokenizing import IGNORED


def padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Numbers of different counts as one table, (rows, width) int64."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def collate(rows: Sequence[Mapping[str, Any]], kind: str, pad_token_id: int) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest row.

    Not a collator of Transformers: those pad on the side that the tokenizer generates from.

    Returns:
        ``input_ids`` (batch, width) int64; ``labels``, -100 where there is no loss: (batch, target
        width), or (batch,) for a classifier; ``attention_mask``: 1 for tokens and 0 for padding,
        (batch, width). ``token_type_ids`` where the tokenizer makes them. A packed batch has
        ``position_ids`` (batch, width) instead of a mask: where they begin anew, padding at each
        token, Transformers masks what lies before, as long as there is neither mask nor cache.
    """
    fill = {"input_ids": pad_token_id, "labels": IGNORED}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    classes = {"labels": torch.tensor(columns.pop("labels"))} if kind == "classification" else {}
    batch = {name: padded(values, fill.get(name, 0)) for name, values in columns.items()} | classes
    if "position_ids" not in batch:
        batch["attention_mask"] = padded([[1] * len(ids) for ids in columns["input_ids"]], 0)
    return batch


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
        targets = labels != IGNORED
        # Only where there is a loss: a vocabulary in fp32 for every padded token takes gigabytes.
        losses = F.cross_entropy(logits[targets].float(), labels[targets], reduction="none")
        rows = targets.nonzero()[:, 0]
        return losses.new_zeros(len(labels)).index_add(0, rows, losses)

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """(slots, tokens, vocabulary), or (slots, classes) of a classifier."""
        model: Any = self.model
        model_inputs = {k: v for k, v in inputs.items() if k not in ("labels", "weights")}
        if self.kind == "seq2seq":
            labels = inputs["labels"]
            model_inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(
                labels=labels
            )
        if self.kind != "classification":
            model_inputs["use_cache"] = False
            return model(**model_inputs).logits
        dtype = precision(self.model)  # its head is in fp32, whatever the layers before it are in
        with torch.autocast(
            model_inputs["input_ids"].device.type, dtype, enabled=dtype != torch.float32
        ):
            return model(**model_inputs).logits
