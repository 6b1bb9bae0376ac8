"""errors: hints, and how a script ends."""

from __future__ import annotations

import errno
import signal
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bilora_diffusion.errors import Interrupted, TrainingError, UserError, did_you_mean, run_cli


def test_hint_names_the_nearest() -> None:
    assert did_you_mean("bilroa", ("lora", "bilora", "full")) == ' (did you mean "bilora"?)'
    assert did_you_mean("zzzzzz", ("lora", "bilora")) == ""
    assert did_you_mean("lora", ()) == ""


@pytest.mark.parametrize("kind", [UserError, TrainingError])
def test_run_cli_says_one_sentence(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise kind("rho is 0;\n  use more.")

    assert run_cli(main) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: rho is 0; use more.\n")


def test_an_unexpected_exception_is_one_sentence_and_a_file_with_its_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_cli(lambda: None) == 0
    assert run_cli(lambda: 1 / 0) == 1  # type: ignore[arg-type, return-value]
    (file,) = tmp_path.iterdir()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ZeroDivisionError" in err
    assert str(file) in err
    assert "run_cli(lambda: 1 / 0)" in file.read_text()
    monkeypatch.setenv("BILORA_TRACEBACK", "1")
    assert run_cli(lambda: 1 / 0) == 1  # type: ignore[arg-type, return-value]
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted("saved: go on with x", signal.SIGTERM), 143)],
)
def test_an_interruption_is_one_sentence_and_the_signals_exit_code(
    stop: KeyboardInterrupt, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise stop

    assert run_cli(main) == code
    assert capsys.readouterr().err == f"{str(stop) or 'interrupted'}\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "some/file"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence(
    error: Exception, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def main() -> None:
        raise RuntimeError("while writing") from error

    assert run_cli(main) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "full" in err
    assert "make room" in err


@pytest.mark.parametrize(
    ("rank", "local_rank", "speaks"),
    [(None, None, True), ("0", "0", True), ("1", "1", False), ("2", "0", False), ("0", "1", False)],
)
def test_only_the_main_process_speaks(
    rank: str | None,
    local_rank: str | None,
    speaks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)

    def main() -> None:
        raise UserError("no.")

    assert run_cli(main) == 2
    assert bool(capsys.readouterr().err) is speaks
