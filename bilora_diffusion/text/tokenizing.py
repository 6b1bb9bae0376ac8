"""Tokenize examples for each kind of model; causal models use a template.

A causal row has two parts. The *context* is the text up to the last answer. It is tokenized as one
text, exactly as for generation. The *answer* is tokenized separately, so that no token spans both
parts. Earlier answers of a conversation are part of the context; their tokens are found by
character offsets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..core.errors import UserError, as_user_error
from ..core.seeds import digest_texts
from .examples import Example

# The label of a token without a loss, as in Transformers.
IGNORED = -100
# Stanford Alpaca's exact prompts, without and with an input: the answer follows the colon directly.
#
# Source: https://github.com/tatsu-lab/stanford_alpaca, ``PROMPT_DICT`` in ``train.py``.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        context: text before the last answer.
        answer: the last answer, with the template's end-of-turn token if it has one.
        spans: character ranges [start, end) of earlier answers in the context.
    """

    context: str
    answer: str
    spans: Sequence[tuple[int, int]] = ()


class Row(NamedTuple):
    """A tokenized example.

    Attributes:
        input_ids: tokens of the input.
        labels: target tokens, `IGNORED` where there is no loss; or a class number.
        target_tokens: number of tokens with a loss. The first token of a causal row has no loss,
            since no token precedes it.
        truncated: whether the example was truncated.
        token_type_ids: number of each token's sentence; None if the tokenizer does not return it.
    """

    input_ids: list[int]
    labels: list[int] | int
    target_tokens: int
    truncated: bool
    token_type_ids: list[int] | None = None

    @property
    def length(self) -> int:
        """Length of the input or of the labels, whichever is larger."""
        if isinstance(self.labels, int):
            return len(self.input_ids)
        return max(len(self.input_ids), len(self.labels))


def seq2seq_rows(
    examples: Sequence[Example], tokenizer: Any, max_length: int, max_target_length: int
) -> list[Row]:
    """Tokenize inputs and targets, each truncated to its maximum length.

    The tokenizer adds its special tokens, such as the EOS at the end; the maximum includes them.
    """
    questions = [example.question for example in examples]
    answers = [example.answer for example in examples]
    inputs = _ids(tokenizer, questions, truncation=True, max_length=max_length)
    targets = _ids(tokenizer, answers, "text_target", truncation=True, max_length=max_target_length)
    whole_inputs = _ids(tokenizer, questions)
    whole_targets = _ids(tokenizer, answers, "text_target")
    rows = []
    for number, (ids, labels) in enumerate(zip(inputs, targets, strict=True)):
        is_cut = ids != whole_inputs[number] or labels != whole_targets[number]
        rows.append(Row(ids, labels, len(labels), truncated=is_cut))
    return rows


def classification_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Row]:
    """Tokenize one or two sentences per example, truncated to `max_length` tokens together.

    Of two sentences, Transformers always removes the next token from the one that is longer.
    """
    rows = []
    for example in examples:
        assert example.label is not None
        sentences = [example.question]
        if example.pair is not None:
            sentences.append(example.pair)
        encoding = tokenizer(*sentences, verbose=False)
        is_cut = len(encoding["input_ids"]) > max_length
        if is_cut:
            encoding = tokenizer(*sentences, truncation=True, max_length=max_length)
        sentence_ids = encoding.get("token_type_ids")
        rows.append(Row(encoding["input_ids"], example.label, 1, is_cut, sentence_ids))
    return rows


def causal_rows(
    examples: Sequence[Example], tokenizer: Any, template: str, max_length: int
) -> list[Row]:
    """Tokenize the context and the answer of each example, with a resolved template.

    The tokens of all answers and the EOS after the last answer have a loss. If a row is too long,
    its context is truncated on the left (a BOS is kept), so that the answer and the last turns
    remain. An answer that leaves less than a quarter of the row for the context is truncated too,
    at its end, and then has no EOS.

    Raises:
        UserError: the tokenizer has no EOS, or the template can't render an example.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            "the tokenizer has no EOS token, so answers could not end: give another tokenizer with"
            " --tokenizer_name."
        )
    texts = [render(example, tokenizer, template) for example in examples]
    contexts = context_rows([text.context for text in texts], tokenizer, template)
    answers = _ids(tokenizer, [text.answer for text in texts], add_special_tokens=False)
    rows = []
    for text, context, answer in zip(texts, contexts, answers, strict=True):
        labels = _context_labels(text, context, tokenizer)
        if not answer or answer[-1] != eos:  # a chat template can end a turn with the EOS
            answer = [*answer, eos]
        rows.append(_fit(context, labels, answer, max_length, tokenizer.bos_token_id))
    return rows


# Functions that convert examples to tokenized rows, by kind of model.
ROW_BUILDERS: dict[str, Callable[..., list[Row]]] = {
    "seq2seq": seq2seq_rows,
    "classification": classification_rows,
    "causal": causal_rows,
}


def context_rows(contexts: Sequence[str], tokenizer: Any, template: str) -> list[list[int]]:
    """Tokenize contexts, for training and for generation.

    A chat template writes the special tokens itself. With the other templates, the tokenizer adds
    its BOS, if it has one, and an EOS that it appends is removed.
    """
    adds_special_tokens = template != "chat"
    rows = _ids(tokenizer, contexts, add_special_tokens=adds_special_tokens)
    if adds_special_tokens and _ids(tokenizer, ["a"])[0][-1] == tokenizer.eos_token_id:
        rows = [row[:-1] for row in rows]
    return rows


def generation_prompt(
    example: Example, tokenizer: Any, template: str, max_length: int | None = None
) -> list[int]:
    """Return the tokens that a causal model continues with its answer, as in training.

    Args:
        example: example whose last answer is generated.
        tokenizer: the model's tokenizer.
        template: template, or "auto".
        max_length: maximum number of tokens; a longer prompt loses its first tokens, but keeps its
            BOS. None if there is no limit.
    """
    template = resolve_template(template, tokenizer)
    context = context_text(example, tokenizer, template)
    (ids,) = context_rows([context], tokenizer, template)
    if max_length is None:
        return ids
    return _last_values(ids, max_length, tokenizer.bos_token_id)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash a tokenizer's behavior; a fast tokenizer's hash does not depend on its files' path."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # The tokenizer stores a call's padding and truncation; each call in this file sets them.
        rules["padding"] = rules["truncation"] = None
    else:
        rules = {**tokenizer.init_kwargs, "vocabulary": tokenizer.get_vocab()}
    parts = [rules, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    texts = [json.dumps(part, sort_keys=True, default=str) for part in parts]
    return digest_texts([type(tokenizer).__name__, *texts])


def _ids(
    tokenizer: Any, texts: Sequence[str], argument: str = "text", **settings: Any
) -> list[list[int]]:
    """Tokenize texts; `argument` is "text_target" for the targets of a seq2seq model."""
    rows = tokenizer(**{argument: list(texts)}, **settings, verbose=False)["input_ids"]
    return [list(row) for row in rows]


def _context_labels(text: Rendered, context: list[int], tokenizer: Any) -> list[int]:
    """Return a context's labels: the tokens of earlier answers, and `IGNORED` elsewhere."""
    if not text.spans:
        return [IGNORED] * len(context)
    encoding = tokenizer(
        text.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    labels = []
    # Each token covers the characters [first, end), which can be none.
    for token, (first, end) in zip(context, encoding["offset_mapping"], strict=True):
        is_of_answer = any(start <= first < end <= stop for start, stop in text.spans)
        labels.append(token if is_of_answer else IGNORED)
    return labels


def _fit(
    context: list[int], labels: list[int], answer: list[int], max_length: int, bos: int | None
) -> Row:
    """Join a context, its labels and an answer to a row, truncated as `causal_rows` describes."""
    is_cut = len(context) + len(answer) > max_length
    if is_cut:
        room = max(max_length - len(answer), min(len(context), max_length // 4))
        pairs = list(zip(context, labels, strict=True))
        pairs = _last_values(pairs, room, (bos, IGNORED))
        context = [token for token, _ in pairs]
        labels = [label for _, label in pairs]
        answer = answer[: max_length - len(context)]
    labels = labels + answer
    target_tokens = sum(label != IGNORED for label in labels[1:])
    return Row(context + answer, labels, target_tokens, is_cut)


def _last_values(values: list[Any], size: int, first: Any) -> list[Any]:
    """Return the last values, at most `size`; a first value equal to `first` (a BOS) is kept."""
    if len(values) <= size:
        return values
    if size > 1 and values[0] == first:
        return [first, *values[len(values) - size + 1 :]]
    return values[len(values) - size :]


def resolve_template(template: str, tokenizer: Any) -> str:
    """Replace "auto" with "chat" if the tokenizer has a chat template, else with "alpaca".

    Raises:
        UserError: the template is "chat", but the tokenizer has no chat template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise UserError(
            "the tokenizer has no chat template, which --template chat needs: give --template"
            " alpaca, or a chat model's tokenizer with --tokenizer_name."
        )
    if template != "auto":
        return template
    return "chat" if has_chat else "alpaca"


def render(example: Example, tokenizer: Any, template: str) -> Rendered:
    """Render a row as text, with a resolved template.

    Raises:
        UserError: the template can't render the conversation.
    """
    if template != "chat":
        return Rendered(context_text(example, tokenizer, template), example.answer)
    messages = example.messages()
    where = example.where
    conversation = _chat(messages, tokenizer, where)
    # From the last answer to the first: the conversation's text must begin with the prompt of each
    # answer.
    text = conversation
    spans = []
    for number in reversed(range(len(messages))):
        if messages[number]["role"] == "assistant":
            prompt = _chat(messages[:number], tokenizer, where, prompting=True)
            if not text.startswith(prompt):
                raise UserError(
                    f"the tokenizer's chat template writes the turns of {where} differently if an"
                    " answer follows, so training would not match generation: give another"
                    " --tokenizer_name or, if no row has several turns, --template alpaca."
                )
            end = _turn_end(text, len(prompt), messages[number]["content"], tokenizer, where)
            spans.append((len(prompt), end))
            text = prompt
    start, end = spans[0]  # of the last answer
    return Rendered(conversation[:start], conversation[start:end], spans[1:])


def context_text(example: Example, tokenizer: Any, template: str) -> str:
    """Return the text before the last answer, which is the prompt for generation.

    Raises:
        UserError: the template can't render the conversation.
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
            " only --template chat supports: give --template chat, with a tokenizer that has a chat"
            " template."
        )
    prompt = "\n\n".join(message["content"] for message in messages)
    if template == "alpaca":
        return ALPACA.format(instruction=prompt)
    return f"{prompt}\n" if prompt else ""


def _chat(messages: list[Any], tokenizer: Any, where: str, *, prompting: bool = False) -> str:
    """Apply the tokenizer's chat template; `prompting` appends the start of an answer's turn."""
    sentence = f"the tokenizer's chat template can't render {where}"
    fix = "correct its turns or, if no row has several turns, give --template alpaca"
    with as_user_error(sentence, fix):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompting
        )
    return str(text)


def _turn_end(text: str, start: int, content: str, tokenizer: Any, where: str) -> int:
    """Return the end of the answer that starts at character `start`, with its end-of-turn token.

    Templates can strip the content or put text before it, and the end-of-turn token can differ from
    the EOS token: it is the special token after the content. Line breaks after this token belong to
    the template; a model does not generate them.
    """
    stripped = content.strip()
    place = text.find(stripped, start)
    if place < 0:
        raise UserError(
            f"the tokenizer's chat template changes an answer of {where}, so its tokens can't be"
            " found: give another --tokenizer_name or, if no row has several turns, --template"
            " alpaca."
        )
    end = place + len(stripped)
    tail = text[end:].lstrip()
    special_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    special_tokens.append(tokenizer.eos_token or "")
    # One special token can begin with another: use the longest.
    mark = ""
    for token in special_tokens:
        if tail.startswith(token) and len(token) > len(mark):
            mark = token
    if not mark:
        return end
    return len(text) - len(tail) + len(mark)
