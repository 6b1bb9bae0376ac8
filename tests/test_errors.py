"""How a script ends, and how files are written: completely or not at all."""

import errno
import os
import signal
import subprocess
import sys
import tempfile

import pytest
from safetensors import SafetensorError

from bilora_diffusion.core import durable
from bilora_diffusion.core.errors import Interrupted, TrainingError, UserError, run_cli


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (UserError("rho is 0;\n  use more."), 2, "error: rho is 0; use more."),
        (TrainingError("the loss is not finite"), 2, "error: the loss is not finite"),
        (OSError(errno.ENOSPC, "full", "some/file"), 2, "error: the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("saved: go on with x", signal.SIGTERM), 143, "saved: go on with x"),
    ],
)
def test_an_error_ends_a_script_with_one_sentence_and_an_exit_code(
    error, exit_code, message, capsys
):
    def main():
        raise error

    assert run_cli(main) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_an_unexpected_exception_gives_one_sentence_and_a_file_with_its_traceback(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_cli(lambda: None) == 0
    assert run_cli(lambda: 1 / 0) == 1  # type: ignore[arg-type, return-value]
    (file,) = tmp_path.rglob("*.txt")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ZeroDivisionError" in err
    assert str(file) in err
    assert "run_cli(lambda: 1 / 0)" in file.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert run_cli(lambda: 1 / 0) == 1  # type: ignore[arg-type, return-value]
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "BILORA_TRACEBACK=1" in err
    monkeypatch.setenv("BILORA_TRACEBACK", "1")
    assert run_cli(lambda: 1 / 0) == 1  # type: ignore[arg-type, return-value]
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_closed_output_pipe_ends_a_script_silently():
    # A pipe holds less than a megabyte, so the write fails.
    script = """
import sys
from bilora_diffusion.core.errors import run_cli
sys.exit(run_cli(lambda: print("x" * 2**20)))
"""
    script = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    script.stdout.close()
    assert script.stderr.read() == b""
    assert script.wait() == 141  # 128 + SIGPIPE, as in a shell


def write(path, text, failure=None):
    with durable.replacing(path) as partial:
        partial.write_text(text)
        assert partial.suffix == path.suffix
        assert path.read_text() == "old"
        if failure is not None:
            raise failure


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")
    for failure in (OSError(errno.ENOSPC, "full"), ValueError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            write(path, "half", failure)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]
    write(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "some/file"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "No rights"), False),
    ],
)
def test_a_full_disk_is_recognized_even_as_the_cause_of_another_error(error, full):
    outer = RuntimeError("while writing")
    outer.__cause__ = error
    assert durable.disk_is_full(error) is durable.disk_is_full(outer) is full
