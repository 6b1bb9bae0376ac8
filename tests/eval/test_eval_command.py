"""Where the commands of ``eval`` put their results, and what of ``runs/*`` they leave aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import clip_scores, command, landscape, text_scores
from eval.curves.output import Reading
from eval.dynamics import main as dynamics
from eval.generalization import main as generalization
from eval.records import SCORES


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs in ``demo``, which is in the current folder, and another elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo/lora", "demo/bilora", "other/lora"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "run.json").touch()
        (folder / "pytorch_lora_weights.safetensors").touch()
    return tmp_path


def output_dir(parser: command.Parser, *words: str) -> Path:
    return parser.read(words).output_dir


def test_results_lie_beside_the_runs() -> None:
    parsers = {
        "scores": (clip_scores._parser(), []),
        "landscape": (landscape._parser(), []),
        "text_scores": (text_scores._parser(), ["--benchmarks", "heldout"]),
    }
    for main in (dynamics, generalization):
        reading = main.__self__  # pyright: ignore[reportFunctionMemberAccess]
        assert isinstance(reading, Reading)
        parsers[reading.format.module] = (reading._parser(), [])
    for name, (parser, words) in parsers.items():
        assert output_dir(parser, "demo/lora", "demo/bilora/", *words) == Path("demo") / name
        assert output_dir(parser, "demo/lora", *words, "--output_dir", "x") == Path("x")


def test_the_folder_of_runs(runs: Path) -> None:
    assert command.folder_of(["A=demo/lora", "base", "some/hub-id"]) == Path("demo")
    assert command.folder_of(["demo/lora/pytorch_lora_weights.safetensors"]) == Path("demo")
    assert command.folder_of(["demo/lora", "other/lora"]) == Path()
    assert command.folder_of([str(runs / "demo/lora")]) == Path("demo")
    assert command.folder_of(["base"], Path("demo")) == Path("demo")
    grouped = ["--group", "one=demo/lora,demo/bilora"]
    assert output_dir(landscape._parser(), *grouped) == Path("demo/landscape")


def test_results_and_logs_among_runs_are_left_out(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = runs / "demo" / "scores"
    scores.mkdir()
    (scores / SCORES.file).touch()
    (runs / "demo" / "lora.log").touch()
    words = [str(path) for path in sorted(Path("demo").iterdir())]
    read = landscape._parser().read([*words, "demo/missing"])
    assert read.runs == ["demo/bilora", "demo/lora", "demo/missing"]
    assert "demo/lora.log, demo/scores" in capsys.readouterr().err
