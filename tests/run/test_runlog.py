"""run.json and metrics.jsonl: strict JSON, whole after a kill, continued on resume; and what they
say of versions, commit and machine.
"""

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


def test_a_whole_run(tmp_path):
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


def test_a_resume_drops_later_lines_a_torn_one_and_the_error(tmp_path):
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


def test_wall_time_and_peak_memory_add_up(tmp_path, monkeypatch):
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


FIT_RUN = {"name": "a", "title": "lora", "fold": 1, "steps": [0, 5], "losses": [1.0, None]}
FIT: dict[str, Any] = {"settings": {}, "spent": 5, "runs": [FIT_RUN], "out": {}, "standings": []}
FIT["choice"] = {"options": {"rank": "4"}, "title": "rank 4", "steps": 5, "loss": 0.5}
ODD = [
    ("run.json", "{", "damaged"),
    ("run.json", '{"schema_version": 2}', "schema version 2"),
    *(
        (
            "run.json",
            {"schema_version": 1, "method": "a", "status": "failed", "config": {}} | odd,
            at,
        )
        for odd, at in (
            ({"seed": 10**400}, "'seed' is 1000"),
            ({"config": {"rho": [1]}}, r"'config\.rho' is \[1\]"),
            ({"config": {"rho": math.inf}}, "damaged"),
            ({"results": {"best_step": "x"}}, r"'results\.best_step' is 'x'"),
        )
    ),
    *(
        ("metrics.jsonl", f'{{"step": 1}}\n{line}\n', r"line 2 of .*metrics\.jsonl")
        for line in ('{"loss": 2}', '{"step": 1, "loss": Infinity}', '{"step": 1, "loss": "0.5"}')
    ),
    *(
        ("fit.json", FIT | odd, r"fit\.json is damaged")
        for odd in ({"runs": None}, {"runs": [FIT_RUN | {"losses": [1.0]}]}, {"standings": [{}]})
    ),
]
"""Files by content -> what is named; any bytes and values are tried in tests/test_any_bytes.py."""


@pytest.mark.parametrize(("name", "content", "said"), ODD)
def test_what_does_not_fit_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    readers = {"run.json": read_run, "metrics.jsonl": read_metrics}
    read = readers.get(name, lambda folder: read_fit(folder / name))
    with pytest.raises(UserError, match=said):
        read(tmp_path)


def test_what_is_not_there_and_what_another_version_added(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_fit(tmp_path / "fit.json") is None
    with pytest.raises(UserError, match=r"no run\.json"):
        read_run(tmp_path)
    start(tmp_path).close("finished")
    record = read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record | {"of another version": [1]}))
    assert read_run(tmp_path)["seed"] == 3
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": NaN}\n{"step": 1, "lo')
    assert read_metrics(tmp_path) == [{"step": 0, "loss": None}]
    (tmp_path / "fit.json").write_text(json.dumps(FIT))
    assert read_fit(tmp_path / "fit.json") == FIT


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit(tmp_path, monkeypatch):
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
