"""Where the commands of ``eval`` put their results, and what of ``runs/*`` they leave aside."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from bilora_diffusion.errors import UserError
from eval import command, table
from eval.table import Result

FOLDERS = {
    "clip_scores": "scores",
    **{name: name for name in ("dynamics", "generalization", "landscape", "text_scores")},
}
NEEDED = {"text_scores": ["--benchmarks", "heldout"]}


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


def parser_of(name: str) -> command.Parser:
    return import_module(f"eval.{name}").main.__self__.parser()


@pytest.mark.parametrize("name", FOLDERS)
def test_results_lie_beside_the_runs(name: str) -> None:
    needed = NEEDED.get(name, [])
    words = ["demo/lora", "demo/bilora/", *needed]
    assert parser_of(name).read(words).output_dir == Path("demo") / FOLDERS[name]
    assert parser_of(name).read([*words, "--output_dir", "x"]).output_dir == Path("x")
    summary = (import_module(f"eval.{name}").__doc__ or "").partition("\n")[0]
    assert parser_of(name).description == summary


def test_results_and_logs_among_runs_are_left_out(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("scores", "sweep"):
        (runs / "demo" / name).mkdir()
        (runs / "demo" / name / table.FILE).touch()
    (runs / "demo" / "lora.log").touch()
    words = [str(path) for path in sorted(Path("demo").iterdir())]
    read = parser_of("dynamics").read([*words, "demo/missing"])
    assert read.runs == ["demo/bilora", "demo/lora", "demo/missing"]
    assert "demo/lora.log, demo/scores, demo/sweep" in capsys.readouterr().err


def test_one_result_does_not_replace_another(tmp_path: Path) -> None:
    table.write(Result("landscape"), tmp_path, "")
    command.require_free(tmp_path, "landscape")
    command.require_free(tmp_path / "new", "sweep")
    with pytest.raises(UserError, match=r"holds a result of eval\.landscape: give another"):
        command.require_free(tmp_path, "sweep")
