"""``python -m eval.landscape`` on real runs of two steps: what it measures, keeps and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bilora_diffusion import mini
from bilora_diffusion.run import runlog
from eval import landscape
from eval.flatness import models, profile, subjects
from eval.flatness.models import Sample
from eval.flatness.result import LandscapeResult
from eval.flatness.weights import evaluate
from eval.records import LANDSCAPE
from tests.scripts.conftest import ROOT
from tests.scripts.runs import flags

pytestmark = pytest.mark.slow

TINY = [
    *("--directions", "2", "--points", "3", "--grid", "3"),
    *("--max_images", "1", "--levels", "1", "--ascent_steps", "1"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-step runs on two icons, measured on two others: two methods, two seeds, PiSSA, and all
    weights."""
    from accelerate.state import AcceleratorState

    from bilora_diffusion.image.script import main

    root = tmp_path_factory.mktemp("landscape")
    for name, source in (("train", mini.train_dir()), ("heldout", mini.heldout_dir())):
        (root / name).mkdir()
        for picture in sorted(source.glob("**/*.png"))[:2]:
            (root / name / picture.name).write_bytes(picture.read_bytes())
    shared: dict[str, Any] = {
        "dataset": root / "train",
        "validation_dataset": root / "heldout",
        "pretrained_model_name_or_path": "mini",
        "instance_prompt": "a ToK icon",
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    arms: dict[str, dict[str, Any]] = {
        "lora-0": {"method": "lora", "seed": 0},
        "lora-1": {"method": "lora", "seed": 1},
        "bilora-0": {"method": "bilora", "seed": 0},
        "pissa": {"method": "lora", "seed": 0, "init_lora_weights": "pissa", "lora_alpha": 6},
        "text": {"method": "lora", "seed": 0, "train_text_encoder": True},
        "full": {"method": "full", "seed": 0},
    }
    for name, arm in arms.items():
        AcceleratorState._reset_state()
        main(flags(root / name, **shared | arm))
    return root


def look(runs: Path, out: Path, *words: str) -> LandscapeResult:
    arguments = [str(runs / word) if (runs / word).is_dir() else word for word in words]
    assert landscape.main([*arguments, "--output_dir", str(out)]) == 0
    return LANDSCAPE.read(LandscapeResult, out)


def test_several_runs_in_one_figure(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = ["lora-0", "lora-1", "bilora-0", "base"]
    found = look(runs, out, *names, *TINY)
    assert found.runs == ["LoRA seed 0", "LoRA seed 1", "Bi-LoRA seed 0", "base"]
    assert [group.label for group in found.groups] == ["LoRA", "Bi-LoRA", "base"]
    assert list(found.entries[0].spaces) == ["lora", "full"]
    assert list(found.entries[3].spaces) == ["full"]
    for entry in found.entries:
        for space, own in entry.spaces.items():
            assert [len(row) for row in own.profiles] == [3, 3]
            for row in own.profiles:
                assert row[1] == entry.loss  # the middle is the run's own weights
            assert own.sharpness is not None
            assert own.sharpness >= 0
            first_of_group = entry.label != "LoRA seed 1"
            assert (own.grid is not None) == first_of_group, space
            if own.grid is not None:
                assert own.grid[1][1] == entry.loss
    lora, bilora = found.groups[0].spaces["full"], found.groups[1].spaces["full"]
    assert lora.rise.difference is None
    assert bilora.rise.difference is not None
    assert bilora.rise.difference.seeds == 1
    for name in found.figures:
        with Image.open(out / name) as picture:
            assert picture.width > 400
    text = (out / "landscape.md").read_text()
    assert "| LoRA (control) | 2 |" in text
    assert str(tmp_path) not in text + (out / "landscape.json").read_text()
    record = json.loads((out / "landscape.json").read_text())
    assert (record["schema_version"], record["kind"]) == (1, "landscape")


def test_what_is_measured_is_kept_and_only_the_rest_is_measured(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ["lora-0", "--space", "lora", *TINY]
    calls = 0
    line, fails_at = profile.line, 1

    def counted(*args: Any) -> list[float]:
        nonlocal calls
        if calls == fails_at:
            raise KeyboardInterrupt
        calls += 1
        return line(*args)

    monkeypatch.setattr(profile, "line", counted)
    assert landscape.main([str(runs / "lora-0"), *words[1:], "--output_dir", str(out)]) == 130
    assert not (out / "landscape.json").exists()
    fails_at = -1
    first = look(runs, out, *words)
    assert calls == 2  # the first direction was kept
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing is left to measure"))
    again = look(runs, out, *words)
    assert calls == 2
    assert again.entries == first.entries
    monkeypatch.undo()
    more = look(runs, out, *words, "--eigenvalue", "--directions", "3")
    own = more.entries[0].spaces["lora"]
    assert own.profiles[:2] == first.entries[0].spaces["lora"].profiles
    assert len(own.profiles) == 3
    assert own.eigenvalue is not None


def opened(folder: Path, levels: int = 10, spaces: tuple[str, ...] = ("lora", "full")) -> Any:
    (subject,) = subjects.read([str(folder)], [])
    sample = Sample("train", 0, levels, "cpu")
    images = models.open_set(subject.config, "train")
    return models.load(subject, images, sample, spaces, "adapted")


@pytest.mark.parametrize("name", ["lora-0", "bilora-0", "pissa", "text", "full"])
def test_the_loss_of_all_images_and_levels_is_that_of_the_runs_log(runs: Path, name: str) -> None:
    logged = runlog.read_run(runs / name)["results"]["train_grid_loss"]
    model = opened(runs / name)
    assert evaluate(model.loss.terms) == pytest.approx(logged, rel=1e-5)
    assert ("lora" in model.spaces) == (name != "full")


def test_the_spaces_hold_the_trained_factors_and_the_weights_beneath(runs: Path) -> None:
    model = opened(runs / "lora-0")
    factors, full = model.spaces["lora"], model.spaces["full"]
    assert len(factors) == 2 * len(full) == 112
    for weight in factors:
        assert weight.tensor.shape[weight.filter_dim] == 4
    # As trained, with alpha 8 at rank 4 and so a scale of 2, though the file has it in B.
    stored = load_file(runs / "lora-0" / "pytorch_lora_weights.safetensors")
    assert torch.equal(factors[0].tensor, stored[f"{factors[0].name}.weight"])
    assert torch.equal(2 * factors[1].tensor, stored[f"{factors[1].name}.weight"])
    assert len(opened(runs / "pissa").spaces["lora"]) == 112
    assert opened(runs / "pissa").spaces["lora"][0].tensor.shape[0] == 8
    text = {weight.name.split(".")[0] for weight in opened(runs / "text").spaces["full"]}
    assert text == {"unet", "text_encoder", "text_encoder_2"}


def test_as_a_script_in_a_process_of_its_own(runs: Path, tmp_path: Path) -> None:
    words = ["--space", "full", "--full_weights", "adapted", "--split", "heldout", *TINY]
    words += ["--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "eval.landscape", str(runs / "lora-0"), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "landscape_grid.png" in done.stdout
    assert "held-out loss" in (tmp_path / "landscape.md").read_text()


Case = tuple[str, list[str], str]
CASES: list[Case] = [
    ("no run", [], "no run was given"),
    ("base alone", ["base"], "no training images"),
    ("no folder", ["{runs}/missing"], "missing"),
    ("not a run", ["{runs}/train"], "run.json"),
    ("no export", ["{runs}/unfinished"], "no exported weights"),
    ("even points", ["{runs}/lora-0", "--points", "4"], "--points 4"),
    ("few points", ["{runs}/lora-0", "--points", "1"], "--points 1"),
    ("even grid", ["{runs}/lora-0", "--grid", "2"], "0 for no plane"),
    ("unknown space", ["{runs}/lora-0", "--space", "lora,ful"], 'did you mean "full"'),
    ("empty space", ["{runs}/lora-0", "--space", ""], "take lora or full"),
    ("radius", ["{runs}/lora-0", "--radius", "0"], "--radius 0.0"),
    ("full radius", ["{runs}/lora-0", "--full_radius", "inf"], "--full_radius inf"),
    ("rho", ["{runs}/lora-0", "--rho", "-1"], "--rho -1.0"),
    ("rho is no number", ["{runs}/lora-0", "--rho", "small"], "small"),
    ("directions", ["{runs}/lora-0", "--directions", "0"], "--directions is 0"),
    ("levels", ["{runs}/lora-0", "--levels", "11"], "1 to 10"),
    ("split", ["{runs}/lora-0", "--split", "held-out"], 'did you mean "heldout"'),
    ("device", ["{runs}/lora-0", "--device", "cud"], "cud"),
    ("unknown flag", ["{runs}/lora-0", "--direction", "2"], "--directions"),
    ("group", ["--group", "LoRA"], "LABEL=RUN"),
    ("same seed twice", ["{runs}/lora-0", "{runs}/lora-0"], "--group"),
    ("mixed options", ["{runs}/lora-1", "{runs}/pissa"], "lora_alpha"),
    ("control", ["{runs}/lora-0", "--control", "LoRa"], 'did you mean "LoRA"'),
    ("other images", ["{runs}/lora-0", "{runs}/other-images"], "other images"),
    ("other size", ["{runs}/lora-0", "{runs}/small"], "resolution 32 and not 64"),
    ("other base", ["{runs}/lora-0", "{runs}/other-base"], "base model"),
    ("no adapter", ["{runs}/full", "--space", "lora"], "has no adapter"),
    ("newer option", ["{runs}/newer"], "warp_factor"),
    ("output is a file", ["{runs}/lora-0", "--output_dir", "{runs}/a-file"], "a-file"),
]


@pytest.fixture(scope="module")
def broken(runs: Path) -> Path:
    """Run folders that are not to be used, beside the good ones."""

    def altered(name: str, source: str, change: Callable[[dict[str, Any]], None]) -> None:
        folder = runs / name
        folder.mkdir()
        record = json.loads((runs / source / "run.json").read_text())
        change(record)
        (folder / "run.json").write_text(json.dumps(record))
        if name != "unfinished":
            file = "pytorch_lora_weights.safetensors"
            (folder / file).write_bytes((runs / source / file).read_bytes())

    altered("unfinished", "lora-0", lambda record: record.update(status="failed"))
    altered("newer", "lora-0", lambda record: record["config"].update(warp_factor=9))

    for name, option, value in (
        ("other-base", "pretrained_model_name_or_path", "some/base"),
        ("other-images", "dataset_name", str(runs / "heldout")),
        ("small", "resolution", 32),
    ):
        altered(name, "bilora-0", lambda r, o=option, v=value: r["config"].update({o: v}))
    (runs / "a-file").write_text("")
    return runs


@pytest.mark.parametrize(("words", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_one_sentence(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    words = [word.format(runs=broken) for word in words]
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    assert landscape.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "landscape.json").exists()
