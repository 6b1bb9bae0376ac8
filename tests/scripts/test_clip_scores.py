"""CLIP scores of runs on the miniature: start to end, killed, repeated, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bilora_diffusion.durable import TEMPORARY
from eval import clip_scores
from eval.records import SCORES
from eval.scores.schema import ScoresResult
from tests.scripts.conftest import ROOT

PROMPTS = """a ToK icon of a Fluffy Rabbit, in the style of ToK
a ToK icon of a red car, in the style of ToK
a flat icon of an apple
"""
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    return file


def words(output: Path, prompts: Path, *more: str, steps: int = 2, seeds: str = "0") -> list[str]:
    return [
        *more,
        *("--prompts", str(prompts), "--general_prompts", "general", "--max_prompts", "3"),
        *("--num_inference_steps", str(steps), "--seeds", seeds, "--output_dir", str(output)),
    ]


def run(*argv: str) -> ScoresResult:
    """Score in this process and read the result."""
    assert clip_scores.main(argv) == 0
    return SCORES.read(ScoresResult, Path(argv[argv.index("--output_dir") + 1]))


def pictures(folder: Path) -> dict[str, int]:
    """Every whole image, and when it was written."""
    files = [
        file for file in (folder / "images").glob("**/*.png") if not file.name.startswith(TEMPORARY)
    ]
    return {file.relative_to(folder).as_posix(): file.stat().st_mtime_ns for file in files}


def values(result: ScoresResult) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Scores by label, prompt and seed."""
    names = ("i2t", "t2t", "truth", "nearest", "drift")
    return {
        (
            result.adapters[image.adapter].label,
            result.prompts[image.prompt].text,
            image.seed,
        ): {name: getattr(image, name) for name in names}
        for image in result.images
    }


def largest_difference(one: ScoresResult, other: ScoresResult) -> float:
    left, right = values(one), values(other)
    assert left.keys() == right.keys()
    differences = [0.0]
    for key, scores in left.items():
        for name, value in scores.items():
            assert (value is None) == (right[key][name] is None)
            if value is not None:
                differences.append(abs(value - right[key][name]))
    return max(differences)


def test_two_runs_and_the_base_model_from_start_to_end(
    scored_runs: Path,
    tiny_models: list[str],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "scores"
    argv = words(
        output,
        prompts,
        *(str(scored_runs / "demo" / name) for name in ("lora", "bilora")),
        *("base", *tiny_models),
        seeds="0,1",
    )
    made = run(*argv)
    said = capsys.readouterr().out
    assert "36 of 36 images are to be made" in said

    assert [entry.label for entry in made.adapters] == ["LoRA", "Bi-LoRA", "base model"]
    assert [entry.kind for entry in made.adapters] == ["run", "run", "base"]
    assert len(made.images) == 3 * 6 * 2
    assert made.sampling["guidance_scale"] == 4.0
    assert made.sampling["size"] == 64
    for image in made.images:
        general = made.prompts[image.prompt].general
        base = made.adapters[image.adapter].kind == "base"
        assert (image.i2t is None) == (image.t2t is None) == general
        assert (image.caption is None) == (image.nearest is None) == general
        assert (image.drift is None) == (not general or base)
        with Image.open(output / image.file) as picture:
            assert picture.size == (64, 64)
    # the shipped reference of the first prompt, which a text file of the user does not have
    assert [prompt.reference for prompt in made.prompts] == [None] * 6
    assert made.diversity.keys() == {"LoRA", "Bi-LoRA", "base model"}
    assert {(row.adapter, row.control) for row in made.comparisons} == {(1, 0), (2, 0)}
    assert made.provenance["command"].startswith("python -m eval.clip_scores")

    text = (output / "report.md").read_text()
    assert "average of 3" in text
    assert "CLIP T2T Bi-LoRA" in text
    assert made.scorer.name in text
    for name in ("report.md", "scores.json", "scores.csv"):
        assert str(tmp_path) not in (output / name).read_text()
    assert made.figures == ["grid.png", "differences.png", "memorization.png"]
    for name in made.figures:
        with Image.open(output / name) as picture:
            assert picture.width > 300

    before, first = pictures(output), (output / "scores.json").read_bytes()
    assert len(before) == 36
    run(*argv)
    assert "0 of 36 images are to be made" in capsys.readouterr().out
    assert pictures(output) == before
    assert (output / "scores.json").read_bytes() == first
    run(f"Mine={argv[0]}", *argv[1:])  # another name is no other image
    assert "0 of 36 images are to be made" in capsys.readouterr().out
    assert pictures(output) == before


def test_order_and_batch_change_no_score(
    scored_runs: Path, tiny_models: list[str], prompts: Path, tmp_path: Path
) -> None:
    lora, bilora = (str(scored_runs / "demo" / name) for name in ("lora", "bilora"))
    one = run(*words(tmp_path / "one", prompts, lora, bilora, *tiny_models, "--batch_size", "1"))
    other = run(
        *words(tmp_path / "other", prompts, bilora, lora, *tiny_models, "--batch_size", "16")
    )
    assert largest_difference(one, other) <= 1e-6
    ours = {row.metric: row.mean for row in one.comparisons}
    theirs = {row.metric: row.mean for row in other.comparisons}
    assert ours.keys() == theirs.keys()
    for metric, mean in ours.items():
        assert mean == pytest.approx(-theirs[metric], abs=2e-6)


def test_an_adapter_against_itself_is_even_and_made_once(
    scored_runs: Path, tiny_models: list[str], prompts: Path, tmp_path: Path
) -> None:
    lora = scored_runs / "demo" / "lora"
    copy = tmp_path / "copy.safetensors"
    shutil.copyfile(lora / LORA, copy)
    argv = words(
        tmp_path / "out", prompts, f"one={lora}", f"other={copy}", *tiny_models, seeds="0,1"
    )
    made = run(*argv, "--general_prompts", "none", "--train_data", "mini")
    assert len(pictures(tmp_path / "out")) == 3 * 2
    assert {row.metric for row in made.comparisons} == {"i2t", "t2t", "nearest", "diversity"}
    for found in made.comparisons:
        assert found.mean == 0
        assert (found.wins, found.ties, found.losses) == (0, 3, 0)
        assert found.win_rate == 0.5


def test_a_broken_adapter_loses_and_the_demo_is_the_default(
    scored_runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.safetensors"
    with safe_open(scored_runs / "demo" / "lora" / LORA, framework="pt") as content:
        metadata = content.metadata()
    generator = torch.Generator().manual_seed(0)
    weights = load_file(scored_runs / "demo" / "lora" / LORA)
    save_file(
        {key: torch.randn(value.shape, generator=generator) for key, value in weights.items()},
        broken,
        metadata,
    )
    monkeypatch.chdir(scored_runs)
    general = ("--general_prompts", "none", "--seeds", "0")
    made = run("--output_dir", "out", "--max_prompts", "8", "--num_inference_steps", "8", *general)
    said = capsys.readouterr().out
    assert "No adapter was named, so these are the demo's two runs" in said
    assert "No adapter was named" in (scored_runs / "out" / "report.md").read_text()
    assert "never set beside the paper's" in (scored_runs / "out" / "report.md").read_text()
    assert [entry.label for entry in made.adapters] == ["LoRA", "Bi-LoRA", "base model"]
    assert made.scorer.kind == "embedded"
    assert made.prompts[0].reference == "1f407.png"
    assert made.images[0].truth is not None

    argv = ["LoRA=demo/lora", f"broken={broken}", "--output_dir", "out", "--max_prompts", "8"]
    made = run(*argv, "--num_inference_steps", "8", *general, "--train_data", "none")
    found = next(row for row in made.comparisons if row.metric == "i2t")
    assert found.interval is not None
    assert found.interval.high < 0
    assert found.win_rate < 0.5
    assert "broken is worse than LoRA" in capsys.readouterr().out
    assert len(pictures(scored_runs / "out")) == 4 * 8  # those of LoRA were there


def start(argv: list[str], *launcher: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(launcher or ("-m", "eval.clip_scores")), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def record(folder: Path) -> dict[str, Any]:
    """``scores.json`` without its provenance, which names the folder and the commit."""
    found = json.loads((folder / "scores.json").read_text())
    del found["provenance"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_makes_no_image_twice_and_two_processes_score_the_same(
    scored_runs: Path, tiny_models: list[str], prompts: Path, tmp_path: Path
) -> None:
    adapters = [str(scored_runs / "demo" / name) for name in ("lora", "bilora")]
    output, more = tmp_path / "killed", (*adapters, *tiny_models, "--batch_size", "2")
    argv = words(output, prompts, *more, steps=6)
    first = start(argv)
    while not (before := pictures(output)) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = pictures(output)
    assert 0 < len(before) < 15
    assert not (output / "scores.json").exists()

    again = start(argv)
    said, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"{15 - len(before)} of 15 images are to be made" in said
    after = pictures(output)
    assert len(after) == 15
    assert {name: after[name] for name in before} == before

    whole = tmp_path / "whole"
    done = start(words(whole, prompts, *more, "--processes", "2", steps=6))
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    assert len(pictures(whole)) == 15
    assert record(whole) == record(output)

    two = tmp_path / "two"
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    shared = start(words(two, prompts, *more, steps=6), *launcher, "-m", "eval.clip_scores")
    said, errors = shared.communicate()
    assert shared.returncode == 0, errors
    assert said.count("written: ") == 1
    assert len(pictures(two)) == 15
    assert (
        largest_difference(SCORES.read(ScoresResult, two), SCORES.read(ScoresResult, whole)) <= 1e-6
    )
