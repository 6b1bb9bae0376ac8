"""Subjects, results and caches: grouped, paired, read back as written; damaged ones are refused."""

import json
import math
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.lora_names import FILE_NAME
from eval import command, report, table
from eval.cache import FOLDER, Cache
from eval.subjects import by_group, gather, paired, settings_note, single
from eval.table import Entry, Metric, Provenance, Result, Row, Summary
from tests.run import recorded_runs

RESULT = Result(
    kind="landscape",
    subjects=[Entry("a", "LoRA", seed=0, method="lora", about={"cost": 1})],
    metrics={"loss": Metric("held-out loss", scale=1000, form=".2f")},
    control="LoRA",
    settings={"levels": [1, 2], "equal": None},
    notes=["A note."],
    figures=["a.png"],
    provenance=Provenance("python -m eval.landscape a", {"torch": "2"}, None, None, {}, []),
    rows=[
        Row("a", "LoRA", 0, "i2t", 'a "cat", in\nthe rain', None, 0.1 + 0.2, "images/1.png"),
        Row("a", "LoRA", None, "loss", "", 25, None, "a\rb\r\nc\u2028\x00"),
    ],
    summaries=[
        Summary("LoRA", "loss", step=25, count=2, mean=1 / 3, error=0.0),
        Summary("LoRA", "loss", "x", mean=1.0, low=-0.5, high=1.5, control="base", lower=2),
    ],
)


def test_a_result_comes_back(tmp_path):
    for result in (Result("sweep", subjects=[], rows=[], summaries=[]), RESULT):
        table.write(result, tmp_path, "# Report")
        assert table.read(tmp_path) == result
    names = ["report.md", "result.json", "rows.csv", "summary.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert table.read(tmp_path, rows=False).rows == []
    assert json.loads((tmp_path / "result.json").read_text())["schema_version"] == 1


HEAD = "subject,group,seed,metric,item,step,value,note\n"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("rows.csv", f"{HEAD}a,b,0,c,,,high,\n", "rows.csv is damaged"),
        ("rows.csv", "subject,group\na,b\n", "is damaged"),
        ("summary.csv", "\x00", "summary.csv is damaged"),
        (table.FILE, None, r"holds no result\.json"),
        (table.FILE, '{"schema_version": 9, "kind": "sweep"}', r"version 9, .* eval\.sweep"),
        *((table.FILE, text, "is damaged") for text in ("{}", "{")),
    ],
)
def test_what_is_no_result_of_this_version_is_refused(tmp_path, file, text, words):
    table.write(RESULT, tmp_path, "")
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        table.read(tmp_path)


def test_a_curve_has_the_steps_that_all_of_a_group_have():
    points = ((5, 2, 1.0), (0, 2, None), (9, 1, 2.0))
    lines = [Summary("LoRA", "loss", step=s, count=c, mean=m) for s, c, m in points]
    curve = replace(RESULT, summaries=lines).curve("LoRA", "loss")
    assert [(point.step, point.mean) for point in curve] == [(0, None), (5, 1.0)]


SMALL: list[tuple[tuple[float, ...], str]] = [
    ((-4e-6, -8e-6, -1e-6), "-0.0040 [-0.0080, -0.0010], 5/5"),  # by its interval
    ((-4e-6,), "-0.0040 [n/a], 5/5"),  # by itself
    ((-1e-2, -3e-2, 1e-2), "-10.00 [-30.00, +10.00], 5/5"),
    ((0.0, 0.0, 0.0), "+0.00 [+0.00, +0.00], 5/5"),
    ((1e-17, 0.0, 3e-17), "+0.0000 [+0.0000, +0.0000], 5/5"),  # no more than rounding
]


@pytest.mark.parametrize(("values", "text"), SMALL)
def test_a_difference_is_shown_with_the_digits_of_its_interval(values, text):
    difference, low, high = (*values, None, None)[:3]
    line = Summary("a", "loss", difference=difference, lower=5)
    line = replace(line, difference_low=low, difference_high=high)
    assert report.difference(line, RESULT.metrics["loss"]) == text


def test_a_mean_is_shown_with_the_digits_of_its_interval():
    line, metric = Summary("a", "loss", mean=0.5, low=0.49999, high=0.50001), RESULT.metrics["loss"]
    assert report.mean(line, metric) == "500.000 [499.990, 500.010]"
    assert report.mean(line, metric, intervals=False) == "500.00"


def test_one_result_does_not_replace_another(tmp_path):
    table.write(RESULT, tmp_path, "")
    command.require_free(tmp_path, "landscape")
    command.require_free(tmp_path / "new", "sweep")
    with pytest.raises(UserError, match=r"holds a result of eval\.landscape: give another"):
        command.require_free(tmp_path, "sweep")


ABOUT = {"digest": "abc", "levels": (1, 2)}


def test_a_value_is_measured_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"loss": math.inf, "values": (1, 2)}

    for _ in range(2):
        cache = Cache(tmp_path, ABOUT)
        assert cache.item(["line", 0], make) == {"loss": None, "values": [1, 2]}
    assert len(calls) == 1
    assert ["line", 1] not in cache
    assert cache.get(["line", 1]) is None
    cache.put("none", None)
    assert Cache(tmp_path, ABOUT).item("none", pytest.fail) is None
    # What the values depend on tells them apart.
    other_cache = Cache(tmp_path, ABOUT | {"digest": "def"})
    assert "none" not in other_cache
    other_cache.put("none", 2.0)  # two commands at once do not meet
    cache.put("rise", 3.0)
    assert Cache(tmp_path, ABOUT).get("none") is None


@pytest.mark.parametrize("torn", [b'{"key": "b", "value": 2}', b"\xff\n"])
def test_what_a_kill_tore_off_is_measured_again(tmp_path, torn):
    Cache(tmp_path, ABOUT).put("a", 1)
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(file.read_bytes() + torn)
    cache = Cache(tmp_path, ABOUT)
    assert cache.get("a") == 1
    assert cache.item("b", lambda: 3) == 3
    assert Cache(tmp_path, ABOUT).get("b") == 3


COMMANDS = {
    "clip_scores": "scores-lora-bilora",
    **{name: name for name in ("dynamics", "generalization", "landscape", "text_scores")},
}
"""Command -> its folder of results."""


@pytest.fixture
def parsers(tmp_path, monkeypatch):
    """``parsers(name)``, in a folder with two runs in ``demo`` and another elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo/lora", "demo/bilora", "other/lora"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("run.json", "pytorch_lora_weights.safetensors"):
            (tmp_path / name / file).touch()
    return lambda name: import_module(f"eval.{name}").main.__self__.parser()


@pytest.mark.parametrize("name", COMMANDS)
def test_results_lie_beside_the_runs(name, parsers):
    words, parser = ["demo/lora", "demo/bilora/"], parsers(name)
    assert parser.read(words).output_dir == Path("demo") / COMMANDS[name]
    assert parser.read([*words, "--output_dir", "x"]).output_dir == Path("x")
    summary = (import_module(f"eval.{name}").__doc__ or "").partition("\n")[0]
    assert parser.description == summary


def test_other_questions_have_other_folders(parsers, tmp_path):
    questions = ["", "demo/lora", "demo/lora base", "L=demo/lora", "demo/lora --steps all"]
    questions += ["demo/lora --prompts my/two.txt", f"demo/bilora/{FILE_NAME}"]
    questions += [" ".join(f"r{number}" for number in [*range(5), last]) for last in (6, 7)]
    folders = [parsers("clip_scores").read(words.split()).output_dir for words in questions]
    assert folders[:7] == [
        *(Path("demo/scores"), Path("demo/scores-lora"), Path("demo/scores-lora-base")),
        *(Path("demo/scores-L"), Path("demo/scores-lora-steps"), Path("demo/scores-lora-two")),
        Path("demo/scores-bilora"),
    ]
    assert len(set(folders)) == len(folders)


def test_a_result_leaves_no_figure_of_the_last(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for name in ("steps.png", "grid.png", "own.png", "../kept.png"):
        (tmp_path / "out" / name).touch()
    figures = ["steps.png", "grid.png", "../kept.png"]
    table.write(replace(RESULT, figures=figures), tmp_path / "out", "")
    command.remove_last_figures(tmp_path / "out", "another command", ["grid.png"])
    left = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert left == ["grid.png", "kept.png", "own.png"]
    assert RESULT.provenance.command in capsys.readouterr().out
    command.remove_last_figures(tmp_path / "out", RESULT.provenance.command, figures)
    assert not capsys.readouterr().out


def test_results_and_logs_among_runs_are_left_out(parsers, capsys):
    for name in ("scores", "sweep"):
        Path("demo", name).mkdir()
        Path("demo", name, table.FILE).touch()
    for name in ("lora.log", "sweep.json", "notes", "adapter.safetensors"):
        Path("demo", name).touch()
    words = [str(path) for path in sorted(Path("demo").iterdir())]
    read = parsers("dynamics").read([*words, "demo/missing"])
    expected = ["demo/adapter.safetensors", "demo/bilora", "demo/lora", "demo/missing"]
    assert read.runs == expected
    left_out = "demo/lora.log, demo/notes, demo/scores, demo/sweep, demo/sweep.json"
    assert left_out in capsys.readouterr().err
    assert parsers("dynamics").read(["demo/notes"]).runs == ["demo/notes"]  # to be refused by name


def test_groups_by_setting(tmp_path):
    def run(name, method, seed, **config):
        return str(recorded_runs.make(tmp_path / name, method, seed, steps=(), config=config))

    plain = [run(f"b{seed}", "bilora", seed) for seed in (1, 0)]
    fast = run("fast", "bilora", 0, auxiliary_learning_rate=1e-2)
    # rho plays no part in LoRA, nor does where a run lies
    lora = [run(f"l{i}", "lora", i, rho=0.1 * i + 0.1, output_dir=str(i)) for i in range(2)]
    groups = by_group(gather([*plain, fast, *lora]))
    assert {label: [run.seed for run in runs] for label, runs in groups.items()} == {
        "Bi-LoRA (auxiliary_learning_rate=0.001)": [0, 1],
        "Bi-LoRA (auxiliary_learning_rate=0.01)": [0],
        "LoRA": [0, 1],
    }
    assert [run.label for run in groups["LoRA"]] == ["l0", "l1"]
    subjects = gather([lora[0]], [f"mine = {plain[0]},{plain[1]}"])
    assert [run.group for run in subjects] == ["LoRA", "mine", "mine"]
    assert gather(plain)[0].group == "Bi-LoRA"
    namesakes = [run(f"{seed}/run", "lora", seed) for seed in range(2)]
    assert [subject.label for subject in gather(namesakes)] == ["run", "run-2"]
    same_seed = run("again", "bilora", 0)
    for words, groups, sentence in (
        ([*plain, same_seed], [], "are both seed 0"),
        ([], [f"x={plain[0]},{lora[1]}"], "mixes bilora and lora"),
        ([lora[0]], [f"LoRA={lora[1]}"], 'two groups are called "LoRA"'),
    ):
        with pytest.raises(UserError, match=sentence):
            gather(words, groups)


def test_runs_that_differ_in_more_than_the_method_are_named_with_the_settings(tmp_path):
    def run(name, method, **config):
        return str(recorded_runs.make(tmp_path / name, method, steps=(), config=config))

    lora = run("dog", "lora", rank=8, max_train_steps=40, dataset_name="photos/dog", rho=1.0)
    bilora = run("cat", "bilora", rank=4, max_train_steps=500, dataset_name="photos/cat")
    alike = run("dog-2", "bilora", rank=8, max_train_steps=40, dataset_name="photos/dog")
    sentence = settings_note(single([lora, bilora], weights=False))
    assert sentence == "LoRA, Bi-LoRA differ in: data dog / cat, steps 40 / 500, rank 8 / 4."
    assert settings_note(single([lora, alike], weights=False)) == ""


def test_runs_are_paired_by_the_digests_of_their_inputs(tmp_path):
    runs = [
        recorded_runs.make(tmp_path / f"{m}{s}", m, s, steps=(1, 2))
        for m in ("lora", "bilora")
        for s in range(2)
    ]
    lone = recorded_runs.make(tmp_path / "sam", "lora-sam", 5, steps=(1, 2))
    words = [str(path) for path in (*runs, lone)]
    expected = {"LoRA": None, "Bi-LoRA": True, "LoRA-SAM": None}
    assert paired(gather(words), "LoRA") == expected
    file = runs[3] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"digest": "1-', '"digest": "other-'))
    assert paired(gather(words), "LoRA") == expected | {"Bi-LoRA": False}
    file.write_text(re.sub('"digest": "[^"]*"', '"digest": null', file.read_text()))
    assert paired(gather(words), "LoRA") == expected | {"Bi-LoRA": False}
