"""Rows of local files, and errors in them."""

import json

import pytest
from datasets import Dataset

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.examples import Example, label_words_of, open_file, with_labels
from bilora_diffusion.text.rows import open_rows
from tests.scripts.runs import words

pytestmark = pytest.mark.usefixtures("hub")

ROWS = [{"question": 'Say "a, b".\nNow \u2028', "answer": "ä 🍎"}, {"question": "x", "answer": "y"}]


def write(folder, suffix, rows):
    path = folder / f"train{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig") as file:  # with a BOM, as on Windows
            for row in rows:
                print(json.dumps(row, ensure_ascii=False), file=file)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_format_gives_the_same_examples(suffix, tmp_path):
    examples = open_file(write(tmp_path, suffix, ROWS))
    assert examples == [Example(row["question"], row["answer"]) for row in ROWS]


def test_conversations_end_with_the_assistant(tmp_path):
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write(tmp_path, ".jsonl", [{"messages": messages}, {"messages": messages[1:]}])
    talks = open_file(path, input_column="auto", target_column="auto")
    # The last user turn has no answer. A single exchange is a plain question and answer.
    assert talks == [Example("u", "a", turns=tuple(turns[:3])), Example("u", "a")]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"id": "1", "prompt": "p", "completion": "c"}, "p", "c"),
        ({"sentence": "s", "label": 3}, "s", "3"),
        ({"input": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "j", "output": "o"}, "i\n\nj", "o"),
        ({"instruction": "i", "input": None, "output": "o"}, "i", "o"),
        ({"instruction": "i", "context": "j", "response": "o"}, "i\n\nj", "o"),
    ],
)
def test_columns_are_found_by_name(row, question, answer, tmp_path):
    (example,) = open_file(write(tmp_path, ".jsonl", [row]))
    assert (example.question, example.answer) == (question, answer)


def test_named_columns_take_precedence_over_usual_ones(tmp_path):
    path = write(tmp_path, ".jsonl", [{"input": "i", "output": "o", "a": "x", "b": "y"}])
    assert open_file(path, input_column="a", target_column="b") == [Example("x", "y")]
    assert open_file(path, input_column="a") == [Example("x", "o")]


GOOD = '{"input": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "columns", "sentence"),
    [
        ("t.jsonl", GOOD + "{oops}\n", {}, "line 2 of t.jsonl"),
        ("t.json", f"[{GOOD}, 3]", {}, "row 2 of t.json is a number"),
        ("t.csv", "input,output\na,b,c\n", {}, "line 2 of t.csv .*2 fields"),
        ("t.jsonl", '{"a": "x", "output": "y"}', {}, "prompt.*--input_column.*a, output"),
        ("t.jsonl", GOOD, {"input_column": "inputs"}, '"inputs".*"input".*--input_column'),
        ("t.jsonl", GOOD + '{"input": null, "output": "b"}', {}, '"input" of line 2 .* is empty'),
        (
            "t.jsonl",
            GOOD + '{"input": "a", "output": ["b"]}',
            {},
            '"output" of line 2 .* is a list',
        ),
        ("t.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', {}, "line 1 .*assistant"),
    ],
)
def test_an_error_names_the_row_and_the_column(name, content, columns, sentence, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        open_file(tmp_path / name, **columns)


@pytest.mark.parametrize(
    ("answers", "label_words"),
    [(["b", "a", "b"], ("a", "b")), (["10", "9", "-1"], ("-1", "9", "10"))],
)
def test_label_words_are_the_sorted_answers(answers, label_words):
    assert label_words_of([Example("", answer) for answer in answers]) == label_words


def test_a_blank_label_is_not_a_class(tmp_path):
    """A row with a blank label is skipped, like every row with a blank answer."""
    texts = {"train": "good,pos\nbad,neg\nodd,\n", "held_out": "fine,pos\nodd, \n"}
    files = {}
    for name, text in texts.items():
        files[name] = tmp_path / f"{name}.csv"
        files[name].write_text(f"text,label\n{text}")
    options = {"task_type": "classification", "model_name_or_path": "tiny"}
    options |= {"train_file": files["train"], "validation_file": files["held_out"]}
    rows = open_rows(resolve_text(words(options)))
    assert rows.label_words == ("neg", "pos")
    assert [example.label for example in rows.train] == [1, 0, None]
    assert [example.label for example in rows.validation or ()] == [1, None]


def test_labels_are_indices_of_the_label_words():
    labelled = with_labels([Example("x", "b"), Example("y", "a")], ("a", "b"))
    assert [example.label for example in labelled] == [1, 0]
    with pytest.raises(UserError, match=r'"yess" of row 2 .*did you mean "yes"'):
        with_labels([Example("y", "yess", where="row 2")], ("no", "yes"))


def split_of(folder, rows, share=0.3, **options):
    """Split a file and return the prompts of its training rows and of its held-out rows."""
    options |= {"model_name_or_path": "tiny", "train_file": write(folder, ".jsonl", rows)}
    options = {"task_type": "causal", **options, "validation_split": share}
    split = open_rows(resolve_text(words(options)))
    sides = (split.train, split.validation or [])
    return tuple({example.prompt for example in side} for side in sides)


@pytest.mark.parametrize("kind", ["causal", "classification"])
def test_a_row_stays_on_its_side_of_the_split_when_rows_are_added_or_reordered(
    kind, tmp_path, caplog
):
    caplog.set_level("INFO")
    rows = [{"input": f"row {n}", "output": "ba"[n % 2]} for n in range(60)]
    train, heldout = split_of(tmp_path, rows, task_type=kind)
    assert len(train) + len(heldout) == 60
    assert not train & heldout
    assert 8 < len(heldout) < 28  # a binomial distribution around 18
    assert f"holds out {len(heldout)} of the 60 rows of train.jsonl" in caplog.text

    # A new class changes the class numbers.
    added = [{"input": f"new {n}", "output": "abc"[n % 3]} for n in range(30)]
    more_train, more_heldout = split_of(tmp_path, [*added, *rows[::-1]], task_type=kind, seed=1)
    assert train <= more_train
    assert heldout <= more_heldout
    # Equal rows are on the same side.
    assert split_of(tmp_path, rows * 2, task_type=kind) == (train, heldout)
    larger_train, larger_heldout = split_of(tmp_path, rows, share=0.5, task_type=kind)
    assert heldout < larger_heldout
    assert larger_train < train
    few_train, few_heldout = split_of(tmp_path, rows, task_type=kind, max_train_samples=9)
    assert few_train < train  # the limit applies after the split
    assert few_heldout == heldout


@pytest.mark.parametrize(
    ("share", "options", "sentence"),
    [
        (0, {}, "--validation_split is 0.0: give a number above 0"),
        (1, {}, "--validation_split is 1.0: give a number above 0 and below 1"),
        (1.5, {}, "give at most 1"),
        (0.001, {}, r"no held-out row among the 2 in train.jsonl"),
        (0.999, {}, r"no training row among the 2"),
        (0.5, {"validation_file": "x.jsonl"}, "--validation_file .* only one"),
        (0.5, {"train_file": None, "task": "sst2"}, "a task has .*held-out rows"),
    ],
)
def test_a_split_with_an_empty_side_or_other_held_out_rows_is_refused(
    share, options, sentence, tmp_path
):
    file = write(tmp_path, ".jsonl", [{"input": f"row {n}", "output": "a"} for n in range(2)])
    options = {"train_file": file, "task_type": "causal", **options}
    with pytest.raises(UserError, match=sentence):
        open_rows(
            resolve_text(
                words({"model_name_or_path": "tiny", **options, "validation_split": share})
            )
        )


def test_max_eval_samples_selects_the_same_held_out_rows_for_every_seed(tmp_path):
    file = write(tmp_path, ".csv", [{"question": f"q{n}", "answer": "a"} for n in range(40)])

    def heldout_prompts(seed):
        options = {"model_name_or_path": "smollm2", "train_file": file, "validation_file": file}
        rows = open_rows(resolve_text(words({**options, "max_eval_samples": 30, "seed": seed})))
        assert len(rows.train) == 40
        return [example.prompt for example in rows.validation or ()]

    assert len(heldout_prompts(0)) == 30
    assert heldout_prompts(1) == heldout_prompts(0)
