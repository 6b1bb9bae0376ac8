"""The tasks by name: prompts, label words and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bilora_diffusion.errors import UserError
from bilora_diffusion.text import catalog, sources
from bilora_diffusion.text.entry import TextTask
from bilora_diffusion.text.sources import held_out, open_task

# Rows as the hub's sets have them; each with T5's input and target.
ROWS: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    "mnli": [
        (
            {"premise": "A b.", "hypothesis": "C d.", "label": 1, "idx": 0},
            "mnli hypothesis: C d. premise: A b.",
            "neutral",
        ),
        (
            {"premise": "E", "hypothesis": "F", "label": 2, "idx": 1},
            "mnli hypothesis: F premise: E",
            "contradiction",
        ),
    ],
    "sst2": [
        ({"sentence": "a {b} ", "label": 0, "idx": 0}, "sst2 sentence: a {b} ", "negative"),
        ({"sentence": "fine", "label": 1, "idx": 1}, "sst2 sentence: fine", "positive"),
    ],
    "cola": [
        ({"sentence": "The car.", "label": 0, "idx": 0}, "cola sentence: The car.", "unacceptable"),
        ({"sentence": "It runs.", "label": 1, "idx": 1}, "cola sentence: It runs.", "acceptable"),
    ],
    "qnli": [
        (
            {"question": "Who?", "sentence": "Him.", "label": 0, "idx": 0},
            "qnli question: Who? sentence: Him.",
            "entailment",
        ),
        (
            {"question": "When?", "sentence": "Red.", "label": 1, "idx": 1},
            "qnli question: When? sentence: Red.",
            "not_entailment",
        ),
    ],
    "mrpc": [
        (
            {"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0},
            "mrpc sentence1: A sentence2: B",
            "equivalent",
        ),
        (
            {"sentence1": "C", "sentence2": "D", "label": 0, "idx": 1},
            "mrpc sentence1: C sentence2: D",
            "not_equivalent",
        ),
    ],
    "boolq": [
        (
            {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
            "boolq passage: It is. question: is it",
            "True",
        ),
        (
            {"question": "is he", "passage": "No.", "idx": 1, "label": 0},
            "boolq passage: No. question: is he",
            "False",
        ),
    ],
    "cb": [
        (
            {"premise": "A", "hypothesis": "B", "idx": 0, "label": 1},
            "cb hypothesis: B premise: A",
            "contradiction",
        ),
        (
            {"premise": "C", "hypothesis": "D", "idx": 1, "label": 2},
            "cb hypothesis: D premise: C",
            "neutral",
        ),
    ],
    "copa": [
        (
            {
                "premise": "It fell.",
                "choice1": "It broke.",
                "choice2": "It sang.",
                "question": "effect",
                "idx": 0,
                "label": 0,
            },
            "copa choice1: It broke. choice2: It sang. premise: It fell. question: effect",
            "choice1",
        ),
        (
            {
                "premise": "P",
                "choice1": "A",
                "choice2": "B",
                "question": "cause",
                "idx": 1,
                "label": 1,
            },
            "copa choice1: A choice2: B premise: P question: cause",
            "choice2",
        ),
    ],
    "rte": [
        (
            {"premise": "A", "hypothesis": "B", "idx": 0, "label": 0},
            "rte hypothesis: B premise: A",
            "entailment",
        ),
        (
            {"premise": "C", "hypothesis": "D", "idx": 1, "label": 1},
            "rte hypothesis: D premise: C",
            "not_entailment",
        ),
    ],
    "wic": [
        (
            {
                "word": "bank",
                "sentence1": "A bank.",
                "sentence2": "The bank.",
                "start1": 2,
                "start2": 4,
                "end1": 6,
                "end2": 8,
                "idx": 0,
                "label": 1,
            },
            "wic sentence1: A bank. sentence2: The bank. word: bank",
            "True",
        ),
        (
            {
                "word": "go",
                "sentence1": "Go.",
                "sentence2": "A go.",
                "start1": 0,
                "start2": 2,
                "end1": 2,
                "end2": 4,
                "idx": 1,
                "label": 0,
            },
            "wic sentence1: Go. sentence2: A go. word: go",
            "False",
        ),
    ],
}
PAIRS = {
    "mnli": ("A b.", "C d."),
    "sst2": ("a {b} ", None),
    "cola": ("The car.", None),
    "qnli": ("Who?", "Him."),
    "mrpc": ("A", "B"),
    "boolq": ("is it", "It is."),
    "cb": ("A", "B"),
    "copa": ("It fell. effect?", "choice1: It broke. choice2: It sang."),
    "rte": ("A", "B"),
    "wic": ("bank: A bank.", "The bank."),
}


@pytest.mark.parametrize("name", ROWS)
def test_prompts_and_label_words_are_t5s(name: str) -> None:
    task = catalog.get(name)
    for row, prompt, answer in ROWS[name]:
        for kind in ("seq2seq", "causal"):
            example = task.example(row, kind, "row 1")
            assert (example.prompt, example.answer) == (prompt, answer)
        assert example.label == row["label"]
        assert example.pair is None


@pytest.mark.parametrize("name", ROWS)
def test_a_classifier_is_given_the_bare_sentences(name: str) -> None:
    row, _, answer = ROWS[name][0]
    example = catalog.get(name).example(row, "classification", "row 1")
    assert (example.prompt, example.pair) == PAIRS[name]
    assert (example.answer, example.label) == (answer, row["label"])


def test_glue_lies_where_the_hub_has_it() -> None:
    places = {
        name: (t.dataset, t.config_name, t.validation) for name in ROWS for t in [catalog.get(name)]
    }
    assert places["mnli"] == ("nyu-mll/glue", "mnli", "validation_matched")
    assert places["cola"] == ("nyu-mll/glue", "cola", "validation")
    assert places["wic"] == ("aps/super_glue", "wic", "validation")
    assert catalog.get("cola").metrics[0] == "matthews_correlation"
    assert {catalog.get(name).metrics[0] for name in ROWS if name != "cola"} == {"accuracy"}


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        ("metamath", {"query": "1+1?", "response": "The answer is: 2"}, "1+1?", "The answer is: 2"),
        ("code_feedback", {"query": "Sort {x}.", "answer": "sorted(x)"}, "Sort {x}.", "sorted(x)"),
        ("wizardlm", {"instruction": "Do.", "output": "Done."}, "Do.", "Done."),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, "Add.", "3"),
        ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2", "3"),
    ],
)
def test_instruction_sets(name: str, row: dict[str, Any], prompt: str, answer: str) -> None:
    example = catalog.get(name).example(row, "causal", "row 1")
    assert (example.question, example.answer, example.label) == (prompt, answer, None)
    assert example.input == row.get("input", "")


def test_unknown_tasks_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r'no task "sst-2" \(did you mean "sst2"\?\)'):
        catalog.get("sst-2")
    assert catalog.get("alpaca") is catalog.get("alpaca_cleaned")
    assert len(catalog.names()) == 18


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"sentence": "a", "label": -1},
            "the label -1 of row 7 is not among the 2 classes of cola",
        ),
        ({"sentence": "a", "label": "yes"}, "\"label\" of row 7 holds 'yes', not a class number"),
        ({"text": "a", "label": 1}, 'row 7 has no column "sentence", only text, label'),
        ({"sentence": 3, "label": 1}, 'column "sentence" of row 7 holds 3, not text'),
    ],
)
def test_rows_of_another_set_are_refused(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        catalog.get("cola").example(row, "seq2seq", "row 7")


def stored(folder: Path, **splits: list[dict[str, Any]]) -> str:
    """A local set in the layout of the hub's."""
    folder.mkdir()
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_a_set_is_read_split_by_split(tmp_path: Path) -> None:
    rows = [row for row, _, _ in ROWS["cola"]]
    place = stored(tmp_path / "set", train=rows * 3, validation=rows)
    task = TextTask("cola", place, "cola sentence: {sentence}", label_words=("no", "yes"))
    train, held = (open_task(task, split, kind="seq2seq") for split in ("train", "validation"))
    assert [example.answer for example in train] == ["no", "yes"] * 3
    assert [example.prompt for example in held] == [f"cola sentence: {r['sentence']}" for r in rows]


def test_what_is_held_out_depends_on_no_seed_and_keeps_groups_together(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "root": f"r{i // 3}", "response": f"a{i}"} for i in range(60)]
    place = stored(tmp_path / "set", train=rows)
    task = TextTask(
        "math",
        place,
        "{query}",
        "response",
        validation=None,
        holdout=10,
        group="root",
        max_train_samples=20,
    )
    held = open_task(task, "validation", kind="causal")
    assert held == open_task(task, "validation", kind="causal", seed=3)
    groups = {int(example.answer[1:]) // 3 for example in held}
    assert len(held) == 12 == 3 * len(groups)
    first, again, other = (open_task(task, "train", kind="causal", seed=s) for s in (0, 0, 1))
    assert len(first) == 20
    assert first == again != other
    assert groups.isdisjoint(int(example.answer[1:]) // 3 for example in first + other)
    backwards = Dataset.from_list(rows[::-1])
    assert {59 - n for n in held_out(task, backwards)} == held_out(task, Dataset.from_list(rows))


def test_sets_that_do_not_fit_their_task_are_refused(tmp_path: Path) -> None:
    place = stored(tmp_path / "set", train=[{"query": "q", "response": "a"}])
    task = TextTask("math", place, "{query}", "response", validation=None, holdout=1, group="root")
    with pytest.raises(UserError, match='has no column "root", only query, response'):
        open_task(task, "train", kind="causal")
    task = TextTask("math", place, "{query}", "response", validation=None, holdout=1, group="query")
    with pytest.raises(UserError, match="has 1 rows, and math holds 1 of them out"):
        open_task(task, "train", kind="causal")
    with pytest.raises(UserError, match="could not be loaded"):
        open_task(TextTask("x", place, "{query}"), "validation", kind="causal")


def test_the_hub_out_of_reach_is_refused() -> None:
    with pytest.raises(UserError, match="dataset nyu-mll/glue of the task cola could not be load"):
        open_task(catalog.get("cola"), "train", kind="seq2seq")


def test_sets_that_come_as_a_script_are_read_from_their_parquet_branch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def load_dataset(*place: Any, **more: Any) -> Any:
        calls.append((place, more["split"], more.get("data_files")))
        if len(calls) == 1:
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        return Dataset.from_list([row for row, _, _ in ROWS["boolq"]])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = sources.open_task(catalog.get("boolq"), "validation", kind="seq2seq")
    assert [example.answer for example in found] == ["True", "False"]
    branch = "hf://datasets/aps/super_glue@refs%2Fconvert%2Fparquet/boolq/validation/*.parquet"
    assert calls == [
        (("aps/super_glue", "boolq"), "validation", None),
        (("parquet",), "validation", {"validation": branch}),
    ]
