"""run.json and metrics.jsonl: strict JSON, whole after a kill, continued on resume; and what they
say of versions, commit and machine.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import provenance, runlog
from bilora_diffusion.run.record import read_fit
from bilora_diffusion.run.runlog import RunLog, read_metrics, read_run

CONFIG = {"rank": 4, "betas": (0.9, 0.999), "hub_token": "hf_secret", "output_dir": Path("out")}


def start(folder: Path, resume_step: int | None = None, **values: Any) -> RunLog:
    log = RunLog(folder)
    log.start(
        **{"config": CONFIG, "method": "bilora", "seed": 3, **values}, resume_step=resume_step
    )
    return log


def strict(text: str) -> Any:
    """Parse JSON that has neither NaN nor Infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def test_a_whole_run(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    log = start(folder)
    assert read_run(folder)["status"] == "running"
    log.metric(1, loss=torch.tensor(0.5), lr=2e-4, digest="ab", dynamics={"gain": 0.5})
    log.metric(2, loss=np.float32(0.25), taken=True, note=None)
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        log.metric(3, value=object())
    log.metric(3, loss=float("nan"))
    log.close("finished", heldout_loss=0.0834, verify={"layers": 7})
    assert read_metrics(folder) == [
        {"step": 1, "loss": 0.5, "lr": 2e-4, "digest": "ab", "dynamics": {"gain": 0.5}},
        {"step": 2, "loss": 0.25, "taken": True, "note": None},
        {"step": 3, "loss": None, "nonfinite": True},
    ]
    record = strict((folder / "run.json").read_text())
    assert record == read_run(folder)
    assert record["config"] == {"rank": 4, "betas": [0.9, 0.999], "output_dir": "out"}
    assert (record["method"], record["seed"], record["status"]) == ("bilora", 3, "finished")
    assert record["results"] == {"heldout_loss": 0.0834, "verify": {"layers": 7}}
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["device"]["cpu_cores"] >= 1
    assert record["device"]["torch_threads"] == torch.get_num_threads()
    assert record["peak_memory_bytes"] > 50e6
    assert 0 <= record["wall_seconds"] < 60
    assert record["resumed"] == []
    assert "secret" not in (folder / "run.json").read_text()
    assert sorted(os.listdir(folder)) == ["metrics.jsonl", "run.json"]


def test_a_resume_drops_later_lines_a_torn_one_and_the_error(tmp_path: Path) -> None:
    log = start(tmp_path)
    for step in range(1, 8):
        log.metric(step, loss=step / 3)
    log.metric(5, validation_loss=0.1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    log.close("failed", "the loss of step 8 is not finite")
    record = read_run(tmp_path)
    assert (record["status"], record["error"]) == ("failed", "the loss of step 8 is not finite")
    assert len(read_metrics(tmp_path)) == 8
    for step in (2, 5, 7, "x"):
        (tmp_path / "validation" / f"step-{step}").mkdir(parents=True)
        (tmp_path / "validation" / f"step-{step}" / "000.png").touch()
    again = start(tmp_path, resume_step=5)
    left = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert left == ["step-2", "step-5", "step-x"]
    assert "error" not in read_run(tmp_path)
    again.metric(6, loss=0.5)
    again.close("finished")
    kept = [{"step": step, "loss": step / 3} for step in range(1, 6)]
    later = [{"step": 5, "validation_loss": 0.1}, {"step": 6, "loss": 0.5}]
    assert read_metrics(tmp_path) == kept + later


def test_wall_time_and_peak_memory_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(provenance, "peak_memory", lambda device: int(clock[0]))
    log = start(tmp_path)
    began = read_run(tmp_path)["started_at"]
    clock[0] += 7
    log.metric(1, loss=1.0)
    assert read_run(tmp_path)["wall_seconds"] == 0.0
    clock[0] += 10
    log.metric(2, loss=1.0)  # the heartbeat
    assert read_run(tmp_path)["wall_seconds"] == 17.0
    clock[0] += 3
    log.sync()
    clock[0] = 5.0  # killed; another boot
    again = start(tmp_path, resume_step=1)
    clock[0] += 2
    again.sync()
    clock[0] = 1.0
    last = start(tmp_path, resume_step=2)
    clock[0] += 0.5
    last.close("finished", x=1)
    record = read_run(tmp_path)
    assert record["wall_seconds"] == 22.5
    assert record["peak_memory_bytes"] == 120
    assert record["started_at"] == began
    assert [entry["step"] for entry in record["resumed"]] == [1, 2]


def test_reading_what_is_not_a_run(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with pytest.raises(UserError, match=r"no run\.json"):
        read_run(tmp_path)
    for content, part in {"{": "damaged", '{"schema_version": 2}': "schema version 2"}.items():
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=part):
            read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("seed", [1], r"'seed' is \[1\]"),
        ("seed", 10**400, "'seed' is 1000"),
        ("method", "\ud800", r"'method' is '\\ud800'"),
        ("status", "resting", "'status' is 'resting'"),
        ("config", [], r"'config' is \[\]"),
        ("config", {"rho": [1]}, r"'config\.rho' is \[1\]"),
        ("config", {"rho": math.inf}, "run.json is damaged"),
        ("config", {"validation_prompts": ["a", 1]}, r"'config\.validation_prompts' is 1"),
        ("wall_seconds", -1, "'wall_seconds' is -1"),
        ("results", {"best_step": "x"}, r"'results\.best_step' is 'x'"),
    ],
)
def test_a_record_that_does_not_fit_its_model_is_refused_by_its_first_odd_value(
    tmp_path: Path, key: str, value: Any, shown: str
) -> None:
    start(tmp_path).close("finished")
    record = read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record | {key: value}))
    with pytest.raises(UserError, match=shown):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record | {"key of another version": value}))
    if value != {"rho": math.inf}:
        assert read_run(tmp_path)["seed"] == 3


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": -1}', '{"step": 1.5}', '{"step": 1, "loss": Infinity}', "[1]", ""),
        *('{"step": 1, "loss": "0.5"}', '{"step": 1, "loss": 1e308}'),
        '{"step": 1, "loss": %s}' % ("[" * 100_000),
        '{"step": 1, "loss": 1%s}' % ("0" * 5000),
    ],
)
def test_a_line_that_is_none_of_metrics_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    whole = '{"step": 0, "loss": NaN, "skipped": false}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 1, "lo')
    assert read_metrics(tmp_path) == [{"step": 0, "loss": None, "skipped": False}]
    (tmp_path / "metrics.jsonl").write_text(f"{whole}{line}\n")
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(tmp_path)


def test_a_fit_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    assert read_fit(path) is None
    run = {"name": "a", "title": "lora", "fold": 1, "steps": [0, 5], "losses": [1.0, None]}
    choice = {"options": {"rank": "4"}, "title": "rank 4", "steps": 5, "loss": 0.5}
    whole = {"settings": {}, "spent": 5, "runs": [run], "out": {}, "choice": choice}
    whole["standings"] = []
    path.write_text(json.dumps(whole))
    assert read_fit(path) == whole
    for odd in (
        *({"runs": None}, {"runs": [run | {"losses": [1.0]}]}, {"runs": [run | {"fold": "x"}]}),
        *({"out": []}, {"settings": []}, {"choice": choice | {"steps": 0}}, {"standings": [{}]}),
    ):
        path.write_text(json.dumps(whole | odd))
        with pytest.raises(UserError, match=r"fit\.json is damaged"):
            read_fit(path)
    del whole["runs"]
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="it has no runs"):
        read_fit(path)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package.parent, "init", "-q")
    assert provenance.commit(package) == (None, None)  # not one of its files
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "x")
    head = git(package.parent, "rev-parse", "HEAD")
    assert provenance.commit(package) == (head, False)
    (package / "__init__.py").write_text("x = 1")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook of another repository
    assert provenance.commit(package) == (head, True)
