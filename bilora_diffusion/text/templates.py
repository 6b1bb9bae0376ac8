"""How a causal language model is shown a question: chat, Alpaca's prompt, or plain text.

A row is cut in two. The *context* is the text up to the last answer; it is tokenized in one go,
exactly as it will be before generation. The *answer* is tokenized on its own, so no token can grow
across the border between the two. Earlier answers of a conversation lie inside the context, and
which of its tokens they own is read off the tokens' character offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..choices import TEMPLATES
from ..errors import UserError
from .examples import Example

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""What Stanford Alpaca was trained on, to the letter: the answer follows the colon at once.

Source: https://github.com/tatsu-lab/stanford_alpaca, ``PROMPT_DICT`` in ``train.py``.
"""


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        context: everything before the last answer.
        answer: the last answer, with the mark that ends a turn where the template has one.
        spans: characters [start, end) of the context that earlier answers own.
    """

    context: str
    answer: str
    spans: tuple[tuple[int, int], ...] = ()


def settle_template(template: str, tokenizer: Any) -> str:
    """What "auto" stands for: "chat" if the tokenizer has a chat template, else "alpaca".

    Raises:
        UserError: no such template, or "chat" without a chat template.
    """
    if template not in TEMPLATES:
        raise UserError(f'"{template}" is no template: give one of {", ".join(TEMPLATES)}.')
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise UserError(
            "the tokenizer has no chat template, which --template chat needs: give --template"
            " alpaca, or the tokenizer of a chat model by --tokenizer_name."
        )
    return ("chat" if has_chat else "alpaca") if template == "auto" else template


def render(example: Example, tokenizer: Any, template: str) -> Rendered:
    """A row as text, under a settled template.

    Raises:
        UserError: a conversation that the template can't show.
    """
    if template == "chat":
        return _render_chat(example, tokenizer)
    return Rendered(context_text(example, tokenizer, template), example.answer)


def context_text(example: Example, tokenizer: Any, template: str) -> str:
    """Everything before the last answer: what the model is given before it generates.

    Raises:
        UserError: a conversation that the template can't show.
    """
    if template == "chat":
        return _chat(example.messages()[:-1], tokenizer, example.where, prompting=True)
    if template == "alpaca" and not example.turns and example.input.strip():
        return ALPACA_INPUT.format(instruction=example.prompt, input=example.input)
    prompt = _single_prompt(example)
    if template == "alpaca":
        return ALPACA.format(instruction=prompt)
    return f"{prompt}\n" if prompt else ""


def _single_prompt(example: Example) -> str:
    if not example.turns:
        return example.question
    roles = [message["role"] for message in example.messages()]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise UserError(
            f"{example.where} is a conversation of several turns ({', '.join(roles[:6])}), which"
            " only --template chat can show: give it, with a tokenizer that has a chat template."
        )
    return "\n\n".join(message["content"] for message in example.messages()[:-1])


def _render_chat(example: Example, tokenizer: Any) -> Rendered:
    messages, where = example.messages(), example.where
    text = whole = _chat(messages, tokenizer, where)
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
    return Rendered(whole[:start], whole[start:end], tuple(earlier))


def _chat(messages: list[Any], tokenizer: Any, where: str, *, prompting: bool = False) -> str:
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise UserError(
            f"the tokenizer's chat template refuses {where} ({str(error).rstrip('.')}): correct its"
            " turns, or give --template alpaca."
        ) from error


def _turn_end(text: str, start: int, content: str, tokenizer: Any, where: str) -> int:
    """Where an answer that starts at ``start`` ends, the mark that ends its turn included.

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
    rest = text[end:].lstrip()
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    marks |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    mark = max((m for m in marks if m and rest.startswith(m)), key=len, default=None)
    return end if mark is None else len(text) - len(rest) + len(mark)
