"""Collation of rows to batches, and the trained model with its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..train.task import precision
from .tokenizing import IGNORED


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Pad rows of integers with a value to an int64 tensor, (rows, length of the longest row)."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def collate(rows: Sequence[Mapping[str, Any]], kind: str, pad_token_id: int) -> dict[str, Tensor]:
    """Collate rows to a batch, padded on the right to the longest row.

    Transformers' collators can't be used, since they pad on the side that the tokenizer uses for
    generation.

    Returns:
        "input_ids", (rows, width) int64; "labels", (rows, target width), -100 where there is no
        loss, or (rows,) for a classifier; "attention_mask", (rows, width), 1 for tokens and 0 for
        padding; and, for a classifier whose tokenizer returns them, "token_type_ids". A packed
        batch has "position_ids", (rows, width), instead of a mask: without a mask and a cache,
        Transformers starts a new example at every position 0, and tokens see only their own
        example. Padding tokens have position 0.
    """
    fill_values = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "labels" and kind == "classification":
            batch[name] = torch.tensor(values)
        else:
            batch[name] = pad(values, fill_values.get(name, 0))
    if "position_ids" not in batch:
        masks = [[1] * len(row["input_ids"]) for row in rows]
        batch["attention_mask"] = pad(masks, 0)
    return batch


class TextModule(nn.Module):
    """The trained model and its loss.

    `forward` takes a micro-batch: the tensors of `collate`, and "weights", (slots,). It returns one
    float32 loss for each slot: the sum over the slot's target tokens, times the slot's weight. If
    each weight is (slots of the step) / (target tokens of the step), the mean over the step's slots
    is the mean over its target tokens, as in Transformers' Trainer. This mean does not depend on
    how the step is split into micro-batches.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """Compute the weighted loss of each slot, (slots,)."""
        losses = self.losses(self.logits(inputs), inputs["labels"])
        return losses * inputs["weights"]

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the losses of each row's target tokens, or of its class, (slots,), in float32."""
        if self.kind == "classification":
            return F.cross_entropy(logits.float(), labels, reduction="none")
        if self.kind == "causal":
            # The logits at a token predict the next token.
            logits = logits[:, :-1]
            labels = labels[:, 1:]
        is_target = labels != IGNORED  # (slots, tokens)
        # Select the target tokens first: fp32 logits of all tokens, with padding, would take
        # gigabytes.
        losses = F.cross_entropy(logits[is_target].float(), labels[is_target], reduction="none")
        rows = is_target.nonzero()[:, 0]  # row of each loss
        return losses.new_zeros(len(labels)).index_add(0, rows, losses)

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """Compute the logits, (slots, tokens, vocabulary), or (slots, classes) for a classifier."""
        model: Any = self.model
        model_inputs = dict(inputs)
        model_inputs.pop("weights", None)
        labels = model_inputs.pop("labels", None)
        if self.kind == "seq2seq":
            # The decoder reads the labels, shifted by one token, after the start token.
            decoder_ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
            model_inputs["decoder_input_ids"] = decoder_ids
        if self.kind != "classification":
            model_inputs["use_cache"] = False
            return model(**model_inputs).logits
        # A classifier's head is in fp32, whatever the dtype of the other layers.
        dtype = precision(self.model)
        device_type = model_inputs["input_ids"].device.type
        with torch.autocast(device_type, dtype, enabled=dtype != torch.float32):
            return model(**model_inputs).logits
