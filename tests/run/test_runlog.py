"""A run's record and log, also after a kill, its final message, and the published files."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import console, hub, provenance, runlog
from bilora_diffusion.run.runlog import RunLog, read_metrics, read_run

CONFIG = {"rank": 4, "betas": (0.9, 0.999), "hub_token": "hf_secret", "output_dir": Path("out")}


def start(folder, resume_step=None):
    log = RunLog(folder)
    log.start(CONFIG, method="bilora", seed=3, resume_step=resume_step)
    return log


def test_a_complete_run_is_recorded(tmp_path):
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
    record = json.loads((folder / "run.json").read_text(), parse_constant=pytest.fail)
    assert record == read_run(folder)
    assert record["config"] == {"rank": 4, "betas": [0.9, 0.999], "output_dir": "out"}
    assert record["method"] == "bilora"
    assert record["seed"] == 3
    assert record["status"] == "finished"
    assert record["results"] == {"heldout_loss": 0.0834, "verify": {"layers": 7}}
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["device"]["cpu_cores"] >= 1
    assert record["device"]["torch_threads"] == torch.get_num_threads()
    assert record["peak_memory_bytes"] > 50e6
    assert 0 <= record["wall_seconds"] < 60
    assert record["resumed"] == []
    assert "secret" not in (folder / "run.json").read_text()
    assert sorted(os.listdir(folder)) == ["metrics.jsonl", "run.json"]


def test_a_resumed_run_drops_later_and_incomplete_lines_and_the_error(tmp_path):
    log = start(tmp_path)
    for step in range(1, 8):
        log.metric(step, loss=step / 3)
    log.metric(5, validation_loss=0.1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    log.close("failed", "the loss of step 8 is not finite")
    record = read_run(tmp_path)
    assert record["status"] == "failed"
    assert record["error"] == "the loss of step 8 is not finite"
    assert len(read_metrics(tmp_path)) == 8
    for step in (2, 5, 7, "x"):
        images = tmp_path / "validation" / f"step-{step}"
        images.mkdir(parents=True)
        (images / "000.png").touch()
    resumed_log = start(tmp_path, resume_step=5)
    folders = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert folders == ["step-2", "step-5", "step-x"]
    assert "error" not in read_run(tmp_path)
    resumed_log.metric(6, loss=0.5)
    resumed_log.close("finished")
    earlier = [{"step": step, "loss": step / 3} for step in range(1, 6)]
    later = [{"step": 5, "validation_loss": 0.1}, {"step": 6, "loss": 0.5}]
    assert read_metrics(tmp_path) == earlier + later


def test_wall_time_and_peak_memory_include_the_time_before_a_resume(tmp_path, monkeypatch):
    seconds = 100.0  # value of the clock, and here also of the peak memory

    def elapse(duration):
        nonlocal seconds
        seconds += duration

    monkeypatch.setattr(runlog.time, "monotonic", lambda: seconds)
    monkeypatch.setattr(provenance, "peak_memory", lambda device: int(seconds))
    log = start(tmp_path)
    started_at = read_run(tmp_path)["started_at"]
    elapse(7)
    log.metric(1, loss=1.0)
    assert read_run(tmp_path)["wall_seconds"] == 0.0
    elapse(10)
    log.metric(2, loss=1.0)  # some lines also update the record
    assert read_run(tmp_path)["wall_seconds"] == 17.0
    elapse(3)
    log.sync()
    seconds = 5.0  # the run is killed, and the machine's clock starts again
    resumed_log = start(tmp_path, resume_step=1)
    elapse(2)
    resumed_log.close("finished", x=1)
    record = read_run(tmp_path)
    assert record["wall_seconds"] == 22.0
    assert record["peak_memory_bytes"] == 120
    assert record["started_at"] == started_at
    assert [entry["step"] for entry in record["resumed"]] == [1]


RECORD = {"schema_version": 1, "method": "a", "status": "failed", "config": {}}
DAMAGED: list[Any] = [
    ("run.json", "{", "damaged"),
    ("run.json", '{"schema_version": 2}', "schema version 2"),
    ("run.json", {**RECORD, "seed": 10**400}, "'seed' is 1000"),  # too large for a float
    ("run.json", {**RECORD, "config": {"rho": [1]}}, r"'config\.rho' is \[1\]"),
    ("run.json", {**RECORD, "config": {"rho": math.inf}}, "damaged"),
    ("metrics.jsonl", '{"step": 1}\n{"loss": 2}\n', r"line 2 of .*metrics\.jsonl"),
    ("metrics.jsonl", '{"step": 1, "loss": Infinity}\n', r"line 1 of .*metrics\.jsonl"),
]
"""File, content and words of the error message; tests/test_any_bytes.py tries arbitrary bytes."""
READERS: dict[str, Callable[[Path], object]] = {
    "run.json": read_run,
    "metrics.jsonl": read_metrics,
}


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED)
def test_a_damaged_file_or_value_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=words):
        READERS[name](tmp_path)


def test_missing_files_unknown_keys_and_incomplete_lines_are_handled(tmp_path):
    assert read_metrics(tmp_path) == []
    with pytest.raises(UserError, match=r"no run\.json"):
        read_run(tmp_path)
    start(tmp_path).close("finished")
    record = read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record | {"of another version": [1]}))
    assert read_run(tmp_path)["seed"] == 3
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": NaN}\n{"step": 1, "lo')
    assert read_metrics(tmp_path) == [{"step": 0, "loss": None}]


def git(folder, *arguments):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return process.stdout.strip()


def test_the_commit_and_uncommitted_changes_are_recorded(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package.parent, "init", "-q")
    assert provenance.commit(package) == (None, None)  # the package is not tracked yet
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "x")
    head = git(package.parent, "rev-parse", "HEAD")
    assert provenance.commit(package) == (head, False)
    (package / "__init__.py").write_text("x = 1")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook of another repository
    assert provenance.commit(package) == (head, True)


RISING_LOSSES = {0: 0.5, 5: 0.4, 10: 0.5}
ENDS = [
    ({}, RISING_LOSSES, "loss step 5 was 20.0 % better than .* --step 5$"),
    (
        {"validation_dataset": "x"},
        RISING_LOSSES,
        "does not show which step has the best images.* compare .*--keep_best",
    ),
    ({}, {}, "give data that is not trained on as --validation_dataset"),
]


@pytest.mark.parametrize(("config", "losses", "words"), ENDS)
def test_the_final_message_names_the_files_the_best_step_and_how_to_export_it(
    tmp_path, config, losses, words
):
    run = tmp_path / "my run"
    log = RunLog(run)
    log.start(config, method="lora", seed=0, resume_step=None)
    for step, loss in losses.items():
        log.metric(step, heldout_loss=loss)
    log.record_removed_checkpoints([3])
    log.close("interrupted")
    log.start(config, method="lora", seed=0, resume_step=10)
    log.record_removed_checkpoints([4])
    log.close("finished")
    if losses:
        (run / "checkpoints" / "step-5").mkdir(parents=True)
    (run / "weights.safetensors").touch()
    files = {"for diffusers": "weights.safetensors", "model card": "README.md"}
    block = console.describe_run(run, files, "eval.clip_scores")
    assert re.search(words, block.splitlines()[-1])
    assert str(run / "weights.safetensors") in block
    assert "model card" not in block  # the card does not exist
    assert f"python -m eval.clip_scores '{run}' base" in block
    assert ("(steps 5; removed: 3, 4; " in block) == bool(losses)
    assert ("0.5000 at step 10, lowest 0.4000 at step 5" in block) == bool(losses)


BY_SAMPLES = {"validation_dataset": "x"}
# Step -> distances of three pictures, whose changes between steps agree or differ in sign
SURE = {0: [0.9, 0.8, 0.7], 5: [0.5, 0.4, 0.3], 10: [0.6, 0.51, 0.39]}
UNSURE = {0: [0.9, 0.8, 0.7], 5: [0.5, 0.4, 0.3], 10: [0.6, 0.35, 0.3]}
WORSE = {0: [0.9, 0.8, 0.7], 5: [0.95, 0.86, 0.74], 10: [1.0, 0.91, 0.79]}
AS_BASE = {0: [0.9, 0.8, 0.7], 5: [0.95, 0.7, 0.8], 10: [0.96, 0.91, 0.6]}


@pytest.mark.parametrize(
    ("distances", "results", "end", "advice"),
    [
        (
            SURE,
            {"best_step": 5},
            "the files have the weights of step 5, the best",
            "step 5 was 20.0 % better",
        ),
        (
            SURE,
            {},
            "the files have the weights of step 10, the last",
            "step 5 was 20.0 % .*again with --keep_b",
        ),
        (
            UNSURE,
            {"best_step": 5, "stopped_early": True},
            "stopped early at step 10 of 60; the files have the weights of step 5",
            "step 5 was 4.0 % better than step 10, no more than the spread .*images of both$",
        ),
        (
            WORSE,
            {"best_step": 5},
            "files have the weights of step 5",
            "better than the base.*more steps or anot",
        ),
        (
            AS_BASE,
            {"best_step": 5},
            "files have the weights of step 5",
            "best, step 5, differs .* train longer",
        ),
    ],
)
def test_the_final_message_names_the_exported_step_and_how_certain_the_best_step_is(
    tmp_path, distances, results, end, advice
):
    """Step 0 is the base model. Differences are compared with their spread over the pictures."""
    log = RunLog(tmp_path)
    log.start(BY_SAMPLES, method="lora", seed=0, resume_step=None, num_steps=60)
    for step, by_picture in distances.items():
        parts = {f"heldout_distance_of/{n}": value for n, value in enumerate(by_picture)}
        mean = sum(by_picture) / len(by_picture)
        log.metric(step, heldout_loss=0.5, heldout_distance=mean, **parts)
    log.close("finished", steps=10, **results)
    first_line, *_, last_line = console.describe_run(tmp_path, {}, "eval.clip_scores").splitlines()
    assert end in first_line
    assert re.search(advice, last_line)
    assert "learning_rate" not in last_line or distances is WORSE


def test_the_final_message_names_the_score_that_chose_the_step(tmp_path):
    log = RunLog(tmp_path)
    log.start({"validation_file": None}, method="lora", seed=0, resume_step=None, num_steps=15)
    for step, score in {0: 0.25, 5: 0.5, 10: 0.75, 15: 0.5}.items():
        log.metric(step, heldout_loss=0.5, heldout_exact_match=score)
    log.close("finished", steps=15, best_step=10, chosen_by="heldout_exact_match")
    block = console.describe_run(tmp_path, {}, "eval.text_scores")
    assert "weights of step 10, the best by the held-out exact match" in block
    assert "0.5000 at step 15, highest 0.7500 at step 10" in block
    assert block.endswith("by the held-out exact match step 10 was 0.2500 better than step 15")


def test_the_rate_of_steps_excludes_the_time_of_measurements(capsys):
    with console.Bar(2, 0, "lora", lambda activity: None) as bar:
        with bar.waiting_for("held-out loss"):
            time.sleep(0.3)
        bar.step({"loss": 0.5, "lr": 1e-3})
    rates = re.findall(r"1/2 .*, +([\d.]+)it/s", capsys.readouterr().err)
    assert float(rates[-1]) > 10  # about 3 if the measurement were included


def test_no_path_of_this_machine_is_published(tmp_path, monkeypatch):
    home = str(Path("/", "home", "Jane Doe", "clients", "acme"))
    log = RunLog(tmp_path)
    config = {
        "pretrained_model_name_or_path": "owner/base",
        "instance_data_dir": f"{home}/images",
        "output_dir": str(tmp_path),
        "validation_prompts": ["a cat and/or a dog"],
        "learning_rate": 1e-4,
    }
    log.start(config, method="lora", seed=0, resume_step=None)
    log.metric(1, loss=0.5)
    log.close("finished")
    model_config = {"_name_or_path": f"{home}/base", "sample_size": 64}
    for name in ("unet/config.json", "adapter_config.json", "checkpoints/step-1/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(model_config))
    committed_files: dict[str, bytes] = {}
    uploads: list[dict[str, Any]] = []

    def commit(repo_id, operations, **_):
        for operation in operations:
            committed_files[operation.path_in_repo] = operation.path_or_fileobj

    monkeypatch.setattr(hub, "upload_folder", lambda **options: uploads.append(options))
    monkeypatch.setattr(hub, "create_commit", commit)
    hub.push(tmp_path, "me/run", None)
    # Files that may contain a path are committed with changed content, others are not changed.
    changed_names = {"run.json", "unet/config.json", "adapter_config.json"}
    assert set(committed_files) == changed_names
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = [file.relative_to(tmp_path).as_posix() for file in files]
    ignored = uploads[0]["ignore_patterns"]
    assert list(hub.filter_repo_objects(names, ignore_patterns=ignored)) == ["metrics.jsonl"]
    for content in committed_files.values():
        assert b"Jane" not in content
        assert str(tmp_path).encode() not in content
    published_model = json.loads(committed_files["adapter_config.json"])
    assert published_model == {**model_config, "_name_or_path": "base"}
    published = json.loads(committed_files["run.json"])["config"]
    assert published == {**config, "instance_data_dir": "images", "output_dir": tmp_path.name}
    assert read_run(tmp_path)["config"] == config, "the local record keeps the paths"


@pytest.mark.slow
def test_the_peak_memory_is_that_of_the_process_alone():
    array = np.ones(50_000_000)  # 400 MB, which a child's ru_maxrss would include
    code = "from bilora_diffusion.run.provenance import peak_memory; print(peak_memory('cpu'))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    child_peak = int(child.stdout)
    assert 50e6 < child_peak < provenance.peak_memory("cpu") - 0.5 * array.nbytes
