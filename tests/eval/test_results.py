"""Subjects, results and caches: grouping, pairing, writing, reading, and damaged files."""

import json
import math
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.lora_names import FILE_NAME
from eval import command
from eval.cache import FOLDER, Cache
from eval.results import report, table
from eval.results.table import Entry, Metric, Provenance, Result, Row, Summary
from eval.subjects import by_group, check_pairing, gather, settings_note, single
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


def test_a_result_is_read_back_as_written(tmp_path):
    empty = Result("sweep", subjects=[], rows=[], summaries=[])
    for result in (empty, RESULT):
        table.write(result, tmp_path, "# Report")
        assert table.read(tmp_path) == result
    names = ["report.md", "result.json", "rows.csv", "summary.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert table.read(tmp_path, rows=False).rows == []
    assert json.loads((tmp_path / "result.json").read_text())["schema_version"] == 1


HEAD = "subject,group,seed,metric,item,step,value,note\n"


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("rows.csv", f"{HEAD}a,b,0,c,,,high,\n", "rows.csv is damaged"),
        ("rows.csv", "subject,group\na,b\n", "is damaged"),
        ("summary.csv", "\x00", "summary.csv is damaged"),
        (table.FILE, None, r"has no readable result\.json"),
        (table.FILE, '{"schema_version": 9, "kind": "sweep"}', r"version 9, .* eval\.sweep"),
        (table.FILE, "{}", "is damaged"),
        (table.FILE, "{", "is damaged"),
    ],
)
def test_a_damaged_result_or_one_of_another_version_is_refused(tmp_path, file, text, sentence):
    table.write(RESULT, tmp_path, "")
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        table.read(tmp_path)


def test_a_curve_has_the_steps_that_all_runs_of_its_group_have():
    lines = [
        Summary("LoRA", "loss", step=5, count=2, mean=1.0),
        Summary("LoRA", "loss", step=0, count=2, mean=None),
        Summary("LoRA", "loss", step=9, count=1, mean=2.0),  # one run ended earlier
    ]
    curve = replace(RESULT, summaries=lines).curve("LoRA", "loss")
    assert [(point.step, point.mean) for point in curve] == [(0, None), (5, 1.0)]


@pytest.mark.parametrize(
    ("difference", "low", "high", "text"),
    [
        (-4e-6, -8e-6, -1e-6, "-0.0040 [-0.0080, -0.0010], 5/5"),
        (-4e-6, None, None, "-0.0040 [n/a], 5/5"),  # digits of the difference itself
        (-1e-2, -3e-2, 1e-2, "-10.00 [-30.00, +10.00], 5/5"),
        (0.0, 0.0, 0.0, "+0.00 [+0.00, +0.00], 5/5"),
        (1e-17, 0.0, 3e-17, "+0.0000 [+0.0000, +0.0000], 5/5"),  # only rounding errors
    ],
)
def test_a_difference_is_shown_with_the_digits_of_its_interval(difference, low, high, text):
    interval = {"difference_low": low, "difference_high": high}
    line = Summary("a", "loss", difference=difference, lower=5, **interval)
    assert report.difference(line, RESULT.metrics["loss"]) == text  # multiplied by 1000


def test_a_mean_is_shown_with_the_digits_of_its_interval():
    line = Summary("a", "loss", mean=0.5, low=0.49999, high=0.50001)
    metric = RESULT.metrics["loss"]
    assert report.mean(line, metric) == "500.000 [499.990, 500.010]"
    assert report.mean(line, metric, intervals=False) == "500.00"


def test_a_result_does_not_replace_one_of_another_command(tmp_path):
    table.write(RESULT, tmp_path, "")
    command.require_free(tmp_path, "landscape")
    command.require_free(tmp_path / "new", "sweep")
    with pytest.raises(UserError, match=r"holds a result of eval\.landscape: give another"):
        command.require_free(tmp_path, "sweep")


# Settings on which the cached values depend
ABOUT = {"digest": "abc", "levels": (1, 2)}


def test_a_cached_value_is_measured_once(tmp_path):
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
    # Values with other settings are separate, even if two commands run at the same time.
    other_cache = Cache(tmp_path, ABOUT | {"digest": "def"})
    assert "none" not in other_cache
    other_cache.put("none", 2.0)
    cache.put("rise", 3.0)
    assert Cache(tmp_path, ABOUT).get("none") is None


@pytest.mark.parametrize("torn", [b'{"key": "b", "value": 2}', b"\xff\n"])
def test_a_value_truncated_by_a_kill_is_measured_again(tmp_path, torn):
    Cache(tmp_path, ABOUT).put("a", 1)
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(file.read_bytes() + torn)
    cache = Cache(tmp_path, ABOUT)
    assert cache.get("a") == 1
    assert cache.item("b", lambda: 3) == 3
    assert Cache(tmp_path, ABOUT).get("b") == 3


def parser_of(command_name):
    """Return the parser of ``python -m eval.COMMAND_NAME``."""
    return import_module(f"eval.{command_name}").main.__self__.parser()


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Create two runs in the folder ``demo`` of the working folder."""
    monkeypatch.chdir(tmp_path)
    for run in (Path("demo/lora"), Path("demo/bilora")):
        run.mkdir(parents=True)
        (run / "run.json").touch()
        (run / FILE_NAME).touch()
    return Path("demo")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("clip_scores", "scores-lora-bilora"),
        ("dynamics", "dynamics"),
        ("generalization", "generalization"),
        ("landscape", "landscape"),
        ("text_scores", "text_scores"),
    ],
)
def test_the_default_output_folder_is_next_to_the_runs(name, folder, demo):
    words, parser = ["demo/lora", "demo/bilora/"], parser_of(name)
    assert parser.read(words).output_dir == demo / folder
    assert parser.read([*words, "--output_dir", "x"]).output_dir == Path("x")
    if name == "text_scores":
        assert parser.read([*words, "--steps", "all"]).output_dir == demo / f"{folder}-steps"
    docstring = import_module(f"eval.{name}").__doc__ or ""
    assert parser.description == docstring.partition("\n")[0]


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("", "scores"),
        ("demo/lora", "scores-lora"),
        ("demo/lora base", "scores-lora-base"),
        ("L=demo/lora", "scores-L"),
        ("demo/lora --steps all", "scores-lora-steps"),
        ("demo/lora --prompts my/two.txt", "scores-lora-two"),
        (f"demo/bilora/{FILE_NAME}", "scores-bilora"),
    ],
)
def test_different_arguments_have_different_default_output_folders(words, folder, demo):
    assert parser_of("clip_scores").read(words.split()).output_dir == demo / folder


def test_different_sets_of_many_runs_have_different_default_output_folders(demo):
    names = ["r0", "r1", "r2", "r3", "r4"]
    parser = parser_of("clip_scores")
    folder, other_folder = (parser.read([*names, last]).output_dir for last in ("r6", "r7"))
    assert folder != other_folder


def test_a_new_result_removes_the_figures_of_the_previous_result(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("steps.png", "grid.png", "own.png", "../kept.png"):
        (out / name).touch()
    # A damaged record may name a picture outside the folder.
    figures = ["steps.png", "grid.png", "../kept.png"]
    table.write(replace(RESULT, figures=figures), out, "")
    command.remove_last_figures(out, "another command", ["grid.png"])
    pictures = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert pictures == ["grid.png", "kept.png", "own.png"]
    assert RESULT.provenance.command in capsys.readouterr().out
    command.remove_last_figures(out, RESULT.provenance.command, figures)
    assert not capsys.readouterr().out


def test_results_and_logs_among_the_runs_are_skipped(demo, capsys):
    for name in ("scores", "sweep"):
        (demo / name).mkdir()
        (demo / name / table.FILE).touch()
    for name in ("lora.log", "sweep.json", "notes", "adapter.safetensors"):
        (demo / name).touch()
    words = [str(path) for path in sorted(demo.iterdir())]
    parser = parser_of("dynamics")
    runs = parser.read([*words, "demo/missing"]).runs
    assert runs == ["demo/adapter.safetensors", "demo/bilora", "demo/lora", "demo/missing"]
    left_out = "demo/lora.log, demo/notes, demo/scores, demo/sweep, demo/sweep.json"
    assert left_out in capsys.readouterr().err
    # A file given alone is not skipped, because the command must refuse it by name.
    assert parser.read(["demo/notes"]).runs == ["demo/notes"]


@pytest.fixture
def run(tmp_path):
    """Return ``run(name, method, seed, **config)``, which writes a run and returns its path."""

    def make_run(name, method, seed=0, **config):
        return str(recorded_runs.make(tmp_path / name, method, seed, steps=(), config=config))

    return make_run


def test_runs_are_grouped_by_method_and_settings(run):
    words = [
        run("b1", "bilora", 1),
        run("b0", "bilora", 0),
        run("fast", "bilora", 0, auxiliary_learning_rate=1e-2),
        # LoRA ignores rho, and the output folder does not matter.
        run("l0", "lora", 0, rho=0.1, output_dir="0"),
        run("l1", "lora", 1, rho=0.2, output_dir="1"),
    ]
    groups = by_group(gather(words))
    seeds = {label: [subject.seed for subject in members] for label, members in groups.items()}
    assert seeds == {
        "Bi-LoRA (auxiliary_learning_rate=0.001)": [0, 1],
        "Bi-LoRA (auxiliary_learning_rate=0.01)": [0],
        "LoRA": [0, 1],
    }
    assert [subject.label for subject in groups["LoRA"]] == ["l0", "l1"]
    assert gather(words[:2])[0].group == "Bi-LoRA"
    namesakes = [run("0/run", "lora", 0), run("1/run", "lora", 1)]
    assert [subject.label for subject in gather(namesakes)] == ["run", "run-2"]


def test_runs_are_grouped_by_a_label(run):
    first, second, lora = run("b0", "bilora"), run("b1", "bilora", 1), run("l0", "lora")
    subjects = gather([lora], [f"mine = {first},{second}"])
    assert [subject.group for subject in subjects] == ["LoRA", "mine", "mine"]
    for words, groups, sentence in (
        ([first, run("same-seed", "bilora")], [], "are both seed 0"),
        ([], [f"x={first},{lora}"], "mixes bilora and lora"),
        ([lora], [f"LoRA={second}"], 'two groups are called "LoRA"'),
    ):
        with pytest.raises(UserError, match=sentence):
            gather(words, groups)


def test_a_note_names_runs_that_differ_in_more_than_the_method_and_their_settings(run):
    dog = {"rank": 8, "max_train_steps": 40, "dataset_name": "photos/dog"}
    lora = run("dog", "lora", rho=1.0, **dog)
    bilora = run("cat", "bilora", rank=4, max_train_steps=500, dataset_name="photos/cat")
    alike = run("dog-2", "bilora", **dog)
    sentence = settings_note(single([lora, bilora], weights=False))
    assert sentence == "LoRA, Bi-LoRA differ in: data dog / cat, steps 40 / 500, rank 8 / 4."
    assert settings_note(single([lora, alike], weights=False)) == ""


def test_runs_are_paired_by_the_digests_of_their_inputs(tmp_path):
    words = []
    for method, seed in (("lora", 0), ("lora", 1), ("bilora", 0), ("bilora", 1), ("lora-sam", 5)):
        folder = tmp_path / f"{method}-{seed}"
        words.append(str(recorded_runs.make(folder, method, seed, steps=(1, 2))))
    # LoRA-SAM and the control have no seed in common.
    pairs = {"LoRA": None, "Bi-LoRA": True, "LoRA-SAM": None}
    assert check_pairing(gather(words), "LoRA") == pairs
    file = tmp_path / "bilora-1" / "metrics.jsonl"
    for changed_digest in ('"other"', "null"):  # other inputs, and no recorded digest
        file.write_text(re.sub('"digest": [^,]*', f'"digest": {changed_digest}', file.read_text()))
        assert check_pairing(gather(words), "LoRA") == pairs | {"Bi-LoRA": False}
