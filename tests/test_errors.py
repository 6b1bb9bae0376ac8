"""errors: hints, and how a script ends."""

import errno
import signal
import subprocess
import sys
import tempfile

import pytest

from bilora_diffusion.errors import Interrupted, TrainingError, UserError, did_you_mean, run_cli


def test_hint_names_the_nearest():
    assert did_you_mean("bilroa", ("lora", "bilora", "full")) == ' (did you mean "bilora"?)'
    assert did_you_mean("zzzzzz", ("lora", "bilora")) == ""
    assert did_you_mean("lora", ()) == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("rho is 0;\n  use more."), 2, "error: rho is 0; use more."),
        (TrainingError("the loss is not finite"), 2, "error: the loss is not finite"),
        (OSError(errno.ENOSPC, "full", "some/file"), 2, "error: the disk that holds some/file"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("saved: go on with x", signal.SIGTERM), 143, "saved: go on with x"),
    ],
)
def test_what_ends_a_script_is_one_sentence_and_an_exit_code(error, code, said, capsys):
    def main() -> None:
        raise error

    assert run_cli(main) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_an_unexpected_exception_is_one_sentence_and_a_file_with_its_trace(
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
    monkeypatch.setenv("BILORA_TRACEBACK", "1")
    assert run_cli(lambda: 1 / 0) == 1  # type: ignore[arg-type, return-value]
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_output_that_nobody_reads_ends_a_script_in_silence():
    printing = "run_cli(lambda: print('x' * 2**20))"
    code = f"import sys; from bilora_diffusion.errors import run_cli; sys.exit({printing})"
    script = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert script.stdout is not None
    assert script.stderr is not None
    script.stdout.close()
    assert script.stderr.read() == b""
    assert script.wait() == 141
