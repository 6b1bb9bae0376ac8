"""Texts to token numbers, for each kind of model; ``encode`` runs it over batches of rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from ..seeds import digest_texts
from .examples import Example
from .templates import Rendered, context_text, render, settle_template

IGNORED = -100
"""The label of a token without a loss, as in Transformers."""


class Row(NamedTuple):
    """A tokenized example.

    Attributes:
        labels: one per token, ``IGNORED`` where there is no loss; a classifier's class number.
        target_tokens: how many have a loss; a causal model has none for the first token, which
            nothing precedes.
    """

    input_ids: list[int]
    labels: list[int] | int
    target_tokens: int
    truncated: bool
    token_type_ids: list[int] | None = None

    @property
    def length(self) -> int:
        """Of input or labels, whichever is longer."""
        return max(len(self.input_ids), len(self.labels) if isinstance(self.labels, list) else 1)


def seq2seq_rows(
    examples: Sequence[Example], tokenizer: Any, max_length: int, max_target_length: int
) -> list[Row]:
    """Input and target, each ended by the tokenizer's EOS and cut at the end before it."""
    inputs = _ids(tokenizer, [example.question for example in examples])
    targets = _ids(tokenizer, [example.answer for example in examples], target=True)
    eos, special = tokenizer.eos_token_id, set(tokenizer.all_special_ids)
    rows = []
    for ids, target in zip(inputs, targets, strict=True):
        if eos is not None and (not target or target[-1] != eos):
            target = [*target, eos]
        short = _keep_end(ids, max_length, special)
        short_target = _keep_end(target, max_target_length, special)
        cut = len(short) < len(ids) or len(short_target) < len(target)
        rows.append(Row(short, short_target, len(short_target), cut))
    return rows


def classification_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Row]:
    """One or two sentences; of two, the longer is cut, token by token, as Transformers does.

    Raises:
        UserError: an example without a class number.
    """
    rows = []
    for example in examples:
        if example.label is None:
            raise UserError(
                f"{example.where} has no label, which a classifier learns: give a task or a column"
                " that has labels, or --task_type causal or seq2seq."
            )
        pair = () if example.pair is None else (example.pair,)
        whole = tokenizer(example.question, *pair, verbose=False)
        cut = len(whole["input_ids"]) > max_length
        if cut:
            whole = tokenizer(example.question, *pair, truncation=True, max_length=max_length)
        kinds = whole.get("token_type_ids")
        rows.append(Row(whole["input_ids"], example.label, 1, cut, kinds))
    return rows


def causal_rows(
    examples: Sequence[Example], tokenizer: Any, template: str, max_length: int
) -> list[Row]:
    """Context and answer, under a settled template; every answer's tokens have a loss, and so has
    the EOS after the last.

    Where a row is too long, its context is cut from the left (a BOS stays), so that the answer and
    what was said last remain. Only an answer that leaves less than a quarter of the row for the
    context is itself cut, at its end; it then has no EOS.

    Raises:
        UserError: a row that the template can't show, or a tokenizer without EOS.
    """
    eos = require_eos(tokenizer)
    texts = [render(example, tokenizer, template) for example in examples]
    contexts = context_rows([text.context for text in texts], tokenizer, template)
    answers = _ids(tokenizer, [text.answer for text in texts], special=False)
    rows = []
    for example, text, context, answer in zip(examples, texts, contexts, answers, strict=True):
        labels = _context_labels(example, text, context, tokenizer)
        ended = answer if answer and answer[-1] == eos else [*answer, eos]
        rows.append(_fit(context, labels, ended, max_length, tokenizer.bos_token_id))
    return rows


def context_rows(contexts: Sequence[str], tokenizer: Any, template: str) -> list[list[int]]:
    """Tokens of contexts, in training and before generation.

    A chat template writes its own special tokens; else the tokenizer's BOS, if it has one, is put
    in front, and an EOS that it appends is left out.
    """
    special = template != "chat"
    rows = _ids(tokenizer, contexts, special=special)
    if special and _ids(tokenizer, ["a"])[0][-1] == tokenizer.eos_token_id:
        rows = [row[:-1] for row in rows]
    return rows


def generation_prompt(
    example: Example, tokenizer: Any, template: str, max_length: int | None = None
) -> list[int]:
    """Tokens that a causal model continues with its answer: those it was trained to continue.

    Args:
        template: "auto", "chat", "alpaca" or "plain".
        max_length: cut from the left to so many tokens, as in training; None: do not cut.

    Raises:
        UserError: the template can't show the example.
    """
    template = settle_template(template, tokenizer)
    ids = context_rows([context_text(example, tokenizer, template)], tokenizer, template)[0]
    return ids if max_length is None else _keep_last(ids, max_length, tokenizer.bos_token_id)


def require_eos(tokenizer: Any) -> int:
    """The EOS token's number.

    Raises:
        UserError: there is none, so no answer could end.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so that no answer could end: give another one by"
            " --tokenizer_name."
        )
    return int(tokenizer.eos_token_id)


def tokenizer_digest(tokenizer: Any) -> str:
    """Identifies how a tokenizer cuts text; not where its files lie."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls leave the last padding and truncation behind; every call here sets its own.
        rules = {key: state[key] for key in state if key not in ("padding", "truncation")}
    else:
        plain = (str, int, float, bool)
        settings = {k: v for k, v in tokenizer.init_kwargs.items() if isinstance(v, plain)}
        places = {k for k in settings if "path" in k or "file" in k}
        rules = {
            "vocabulary": tokenizer.get_vocab(),
            "settings": {k: v for k, v in settings.items() if k not in places},
        }
    parts = [rules, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    texts = [json.dumps(part, sort_keys=True, default=str) for part in parts]
    return digest_texts([type(tokenizer).__name__, *texts])


def _ids(
    tokenizer: Any, texts: Sequence[str], *, special: bool = True, target: bool = False
) -> list[list[int]]:
    arguments: dict[str, Any] = {"text_target" if target else "text": list(texts)}
    rows = tokenizer(**arguments, add_special_tokens=special, verbose=False)["input_ids"]
    return [list(row) for row in rows]


def _context_labels(
    example: Example, text: Rendered, context: list[int], tokenizer: Any
) -> list[int]:
    """The tokens of earlier answers, and ``IGNORED`` elsewhere."""
    if not text.spans:
        return [IGNORED] * len(context)
    if not tokenizer.is_fast:
        raise UserError(
            f"{example.where} has several turns, and only a fast tokenizer tells which tokens are"
            " the assistant's: give one by --tokenizer_name, or keep one turn a row."
        )
    offsets = tokenizer(
        text.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    return [
        token if any(start <= a < b <= end for start, end in text.spans) else IGNORED
        for token, (a, b) in zip(context, offsets, strict=True)
    ]


def _fit(
    context: list[int], labels: list[int], answer: list[int], max_length: int, bos: int | None
) -> Row:
    cut = len(context) + len(answer) > max_length
    if cut:
        room = max(max_length - len(answer), min(len(context), max_length // 4))
        pairs = _keep_last(list(zip(context, labels, strict=True)), room, (bos, IGNORED))
        context, labels = [token for token, _ in pairs], [label for _, label in pairs]
        answer = answer[: max_length - len(context)]
    labels = labels + answer
    targets = sum(label != IGNORED for label in labels[1:])
    return Row(context + answer, labels, targets, cut)


def _keep_last(values: list[Any], size: int, first: Any) -> list[Any]:
    """The last ``size`` values; the first one stays in front if it is ``first`` (a BOS)."""
    if len(values) <= size:
        return values
    if size > 1 and values[0] == first:
        return [first, *values[len(values) - size + 1 :]]
    return values[len(values) - size :]


def _keep_end(ids: list[int], size: int, special: Collection[int]) -> list[int]:
    """The first ``size`` tokens, of which the last is the special one that ends the text."""
    if len(ids) <= size:
        return ids
    return [*ids[: size - 1], ids[-1]] if ids[-1] in special else ids[:size]
