"""Examples to token numbers for each kind of model; for a causal one by a template.

A causal row is cut in two. The *context* is the text up to the last answer; it is tokenized in one
go, exactly as it will be before generation. The *answer* is tokenized on its own, so no token can
grow across the border. Earlier answers of a conversation lie inside the context; their tokens are
found by character offsets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..core.errors import UserError, translated
from ..core.seeds import digest_texts
from .examples import Example

IGNORED = -100
"""The label of a token without a loss, as in Transformers."""
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford Alpaca's prompts to the letter: the answer follows the colon at once.

Source: https://github.com/tatsu-lab/stanford_alpaca, ``PROMPT_DICT`` in ``train.py``.
"""


class Rendered(NamedTuple):
    """A row as text; ``spans`` are the characters [start, end) of the context that earlier answers
    own. The answer includes the mark that ends a turn, where the template has one.
    """

    context: str
    answer: str
    spans: Sequence[tuple[int, int]] = ()


class Row(NamedTuple):
    """A tokenized example; ``labels`` are ``IGNORED`` where there is no loss, or a class number.

    Of ``target_tokens``, the tokens with a loss, a causal row's first is none: nothing precedes it.
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
    """Input and target, each ended by the tokenizer's EOS and cut before it."""
    sides = []
    for name, texts, size in (
        ("text", [example.question for example in examples], max_length),
        ("text_target", [example.answer for example in examples], max_target_length),
    ):
        short = _ids(tokenizer, texts, name, truncation=True, max_length=size)
        sides.append(zip(short, _ids(tokenizer, texts, name), strict=True))
    return [
        Row(ids, labels, len(labels), truncated=ids != all_ids or labels != all_labels)
        for (ids, all_ids), (labels, all_labels) in zip(*sides, strict=True)
    ]


def classification_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Row]:
    """One or two sentences; of two, the longer is cut, token by token, as Transformers does."""
    rows = []
    for example in examples:
        assert example.label is not None
        pair = () if example.pair is None else (example.pair,)
        encoding = tokenizer(example.question, *pair, verbose=False)
        cut = len(encoding["input_ids"]) > max_length
        if cut:
            encoding = tokenizer(example.question, *pair, truncation=True, max_length=max_length)
        kinds = encoding.get("token_type_ids")
        rows.append(Row(encoding["input_ids"], example.label, 1, cut, kinds))
    return rows


def causal_rows(
    examples: Sequence[Example], tokenizer: Any, template: str, max_length: int
) -> list[Row]:
    """Context and answer, under a resolved template; every answer's tokens have a loss, and so has
    the EOS after the last.

    Where a row is too long, its context is cut from the left (a BOS stays), so that the answer and
    what was said last remain. Only an answer that leaves less than a quarter of the row for the
    context is itself cut, at its end; it then has no EOS.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise UserError(
            "the tokenizer has no EOS token, so that no answer could end: give another one by"
            " --tokenizer_name."
        )
    texts = [render(example, tokenizer, template) for example in examples]
    contexts = context_rows([text.context for text in texts], tokenizer, template)
    answers = _ids(tokenizer, [text.answer for text in texts], add_special_tokens=False)
    rows = []
    for text, context, answer in zip(texts, contexts, answers, strict=True):
        labels = _context_labels(text, context, tokenizer)
        ended = answer if answer and answer[-1] == eos else [*answer, eos]
        rows.append(_fit(context, labels, ended, max_length, bos))
    return rows


ROWS = {"seq2seq": seq2seq_rows, "classification": classification_rows, "causal": causal_rows}
"""Functions that make rows of examples, by kind of model."""


def context_rows(contexts: Sequence[str], tokenizer: Any, template: str) -> list[list[int]]:
    """Tokens of contexts, in training and before generation.

    A chat template writes its own special tokens; else the tokenizer's BOS, if it has one, is put
    in front, and an EOS that it appends is left out.
    """
    special = template != "chat"
    rows = _ids(tokenizer, contexts, add_special_tokens=special)
    if special and _ids(tokenizer, ["a"])[0][-1] == tokenizer.eos_token_id:
        rows = [row[:-1] for row in rows]
    return rows


def generation_prompt(
    example: Example, tokenizer: Any, template: str, max_length: int | None = None
) -> list[int]:
    """Tokens that a causal model continues with its answer: those it was trained to continue.

    Args:
        max_length: cut from the left to so many tokens, as in training; None: do not cut.
    """
    template = resolve_template(template, tokenizer)
    ids = context_rows([context_text(example, tokenizer, template)], tokenizer, template)[0]
    return ids if max_length is None else _keep_last(ids, max_length, tokenizer.bos_token_id)


def tokenizer_hash(tokenizer: Any) -> str:
    """Identifies how a tokenizer cuts text; of a fast one not where its files lie."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls leave the last padding and truncation behind; every call here sets its own.
        rules |= {"padding": None, "truncation": None}
    else:
        rules = {**tokenizer.init_kwargs, "vocabulary": tokenizer.get_vocab()}
    parts = [rules, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    texts = [json.dumps(part, sort_keys=True, default=str) for part in parts]
    return digest_texts([type(tokenizer).__name__, *texts])


def _ids(
    tokenizer: Any, texts: Sequence[str], name: str = "text", **settings: Any
) -> list[list[int]]:
    rows = tokenizer(**{name: list(texts)}, **settings, verbose=False)["input_ids"]
    return [list(row) for row in rows]


def _context_labels(text: Rendered, context: list[int], tokenizer: Any) -> list[int]:
    """The tokens of earlier answers, and ``IGNORED`` elsewhere."""
    if not text.spans:
        return [IGNORED] * len(context)
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


def resolve_template(template: str, tokenizer: Any) -> str:
    """Replace "auto" by "chat" if the tokenizer has a chat template, else by "alpaca"."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise UserError(
            "the tokenizer has no chat template, which --template chat needs: give --template"
            " alpaca, or the tokenizer of a chat model by --tokenizer_name."
        )
    return ("chat" if has_chat else "alpaca") if template == "auto" else template


def render(example: Example, tokenizer: Any, template: str) -> Rendered:
    """A row as text, under a resolved template.

    Raises:
        UserError: a conversation that the template can't show.
    """
    if template != "chat":
        return Rendered(context_text(example, tokenizer, template), example.answer)
    messages, where = example.messages(), example.where
    text = full = _chat(messages, tokenizer, where)
    spans = []
    for number in reversed(range(len(messages))):
        if messages[number]["role"] == "assistant":
            before = _chat(messages[:number], tokenizer, where, prompting=True)
            if not text.startswith(before):
                raise UserError(
                    f"the tokenizer's chat template writes the turns of {where} in another way once"
                    " an answer follows, so training would not match generation: give --template"
                    " alpaca, or another chat template."
                )
            end = _turn_end(text, len(before), messages[number]["content"], tokenizer, where)
            spans.append((len(before), end))
            text = before
    (start, end), *earlier = spans
    return Rendered(full[:start], full[start:end], earlier)


def context_text(example: Example, tokenizer: Any, template: str) -> str:
    """Everything before the last answer: what the model is given before it generates.

    Raises:
        UserError: a conversation that the template can't show.
    """
    messages = example.messages()[:-1]
    if template == "chat":
        return _chat(messages, tokenizer, example.where, prompting=True)
    if template == "alpaca" and not example.turns and example.input.strip():
        return ALPACA_INPUT.format(instruction=example.prompt, input=example.input)
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise UserError(
            f"{example.where} is a conversation of several turns ({', '.join(roles[:6])}), which"
            " only --template chat can show: give it, with a tokenizer that has a chat template."
        )
    prompt = "\n\n".join(message["content"] for message in messages)
    if template == "alpaca":
        return ALPACA.format(instruction=prompt)
    return f"{prompt}\n" if prompt else ""


def _chat(messages: list[Any], tokenizer: Any, where: str, *, prompting: bool = False) -> str:
    sentence = f"the tokenizer's chat template refuses {where}"
    with translated(sentence, "correct its turns, or give --template alpaca"):
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
        )


def _turn_end(text: str, start: int, content: str, tokenizer: Any, where: str) -> int:
    """End of the answer that starts at ``start``, the mark that ends its turn included.

    Templates may strip the content, put something before it, and need not end turns with the EOS
    token; the mark is the special token that follows the content. Line breaks after it belong to
    the template, no model ever writes them.
    """
    bare = content.strip()
    place = text.find(bare, start)
    if place < 0:
        raise UserError(
            f"the tokenizer's chat template changes an answer of {where}, so its tokens can't be"
            " found: give --template alpaca, or another chat template."
        )
    end = place + len(bare)
    tail = text[end:].lstrip()
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    marks |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    mark = max((m for m in marks if m and tail.startswith(m)), key=len, default=None)
    return end if mark is None else len(text) - len(tail) + len(mark)
