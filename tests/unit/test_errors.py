"""errors: hints, and how a script ends."""

from __future__ import annotations

import pytest

from bilora_diffusion.errors import TrainingError, UserError, did_you_mean, run_cli


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


def test_run_cli_passes_success_and_other_errors() -> None:
    assert run_cli(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)  # type: ignore[arg-type, return-value]


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
