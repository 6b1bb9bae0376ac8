"""Bad input of every command: one sentence, exit code 2, and no file is created or changed."""

import json
from importlib import import_module

import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion.core.files import ROOT
from bilora_diffusion.run import snapshots
from tests.eval.test_checkpoints import make_run as checkpointed
from tests.eval.test_landscape import icons_run
from tests.eval.test_text_scores import make_run as text_run
from tests.eval.text_score_models import save_record
from tests.run import recorded_runs
from tests.scripts.runs import two_icons

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
EXPERIMENT = str(ROOT / "eval" / "experiments" / "lora_bilora.yaml")
# Command -> arguments -> fragment of the error message
CASES: dict[str, dict[str, str]] = {
    "clip_scores": {
        "icons --prompt x": 'did you mean "--prompts"',
        "icons --prompts nowhere.txt": "nowhere.txt",
        "icosn": 'did you mean "icons"',  # without a request to the hub
        "dataset": "dataset is not a run folder (it has no run.json)",
        "file": "file",
        "plain.safetensors": "no LoRA",
        "icons --adapter_scale nan": "--adapter_scale",
        "icons --guidance_from base --guidance_scale 1": "give a guidance above 1",
        "full --guidance_from base": "no adapter to leave out",
        "icons --base_precision int9": '"int9"',
        "icons --base_precision int8 --guidance_from base": "--base_precision merges the adapter",
        "icons --weight_noise 0.2 --guidance_from base": "--weight_noise merges the adapter",
        "icons --weight_noise -1": "--weight_noise",
        "full --guidance_from 0.5": "guidance from the adapter at strength 0.5 is refused for Full",
        "icons --guidance_from bse": (
            '--guidance_from is "bse": give adapter, base or a number from 0 to 1.'
        ),
        "icons --guidance_from 1.5": "or a number from 0 to 1",
        "icons --guidance_from nan": "or a number from 0 to 1",
        "icons --device cuda:99": "cuda:99",
        "": "make demo",
        "unfinished": "pytorch_lora_weights.safetensors",
        f"base --base_model {SDXL} --scorer embedded": "--scorer embedded",
        "damaged": "damaged/run.json is ",
        "steps --steps 10": "a run on text: use python -m eval.text_scores",
        "--steps all": "name run folders",
        "steps base --steps all": "base is not a run folder",
        "file --steps all": "file is not a run folder",
    },
    "text_scores": {
        "steps --steps 10,15": "no checkpoint of step 15; it has 10, 20",
        "empty --steps all": "has no checkpoints",
        "--benchmarks heldout": "there is nothing to score",
        "steps --benchmarks toy": 'no benchmark "toy"',
        "icons --benchmarks heldout": "eval.clip_scores",
        "steps --steps soon": '"soon"',
        "damaged --benchmarks heldout": "damaged/run.json is ",
        "--steps all": "name run folders",
        "steps base --steps all": "base is not a run folder",
        "file --steps all": "file is not a run folder",
    },
    "landscape": {
        "base": "no training images",
        "text": "not a run on images",
        "icons/pytorch_lora_weights.safetensors": "not a run on images",  # a file has no record
        "icons other-images": "differ in images",
        "icons small": "differ in --resolution",
        "icons weighted": "--snr_weighting",
        "full --space lora": "has no adapter",
        "newer": "warp_factor",
        "damaged": "damaged/run.json is ",
    },
    "dynamics": {
        "": "no runs",
        "a ../runs/a": "twice",
        "a --output_dir file": "file",
        "bare": "--log_dynamics",
        "a late": "no recorded step in common",
        "torn": "step-5.safetensors",
        "unseeded": "unseeded/run.json is ",
        "nested": "nested/metrics.jsonl is ",
    },
    "generalization": {
        "": "no runs",
        "a": "heldout_loss",
        "words": "words/metrics.jsonl is ",
    },
    "sweep": {
        "none.yaml": 'there is no experiment "none.yaml"',
        f"{EXPERIMENT} --set metod=lora": 'unknown option "--metod"',
        f"{EXPERIMENT} --runs_dir file": "is not a writable folder",
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write runs that are each wrong in one way, and some good ones."""
    root = tmp_path_factory.mktemp("inputs") / "runs"
    images = {**two_icons(root), "validation_dataset": "none"}
    icons_run(root / "icons", images)
    icons_run(root / "full", images, "full")
    icons_run(root / "newer", images, warp_factor=9)  # an option of a later version
    icons_run(root / "small", images, resolution=32)
    icons_run(root / "weighted", images, snr_weighting="diffusers")
    icons_run(root / "other-images", images, dataset_name=str(root / "validation_dataset"))
    (icons_run(root / "unfinished", images) / "pytorch_lora_weights.safetensors").unlink()
    text_run(root / "text")
    save_record(root / "empty")
    checkpointed(root / "steps")
    recorded_runs.make(root / "a", steps=(0, 2, 4))
    recorded_runs.make(root / "late", seed=1, steps=(1, 3, 5))
    recorded_runs.make(root / "bare", "lora", steps=())
    torn_snapshot = snapshots.steps(recorded_runs.make(root / "torn", steps=(0, 5, 6)))[5]
    torn_snapshot.write_bytes(torn_snapshot.read_bytes()[:-40])
    change_record(recorded_runs.make(root / "damaged"), config=None)
    change_record(recorded_runs.make(root / "unseeded"), seed="x")
    lines = {"nested": "[" * 100_000, "words": '{"step": 1, "heldout_loss": "x"}'}
    for name, line in lines.items():
        run = recorded_runs.make(root / name, losses={0: (1.0, 1.0), 10: (0.5, 0.5)})
        with (run / "metrics.jsonl").open("a") as file:
            file.write(f"{line}\n")
    (root / "file").touch()
    save_file({"weight": torch.zeros(2)}, root / "plain.safetensors")
    return root


def change_record(run, **changes):
    file = run / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cases():
    """Yield each command with each of its command lines, as parameters of a test."""
    for command, lines in CASES.items():
        for line in lines:
            # The harness's list of benchmarks takes seconds to load.
            marks = [pytest.mark.slow] if line == "steps --benchmarks toy" else []
            yield pytest.param(command, line, marks=marks)


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("command", "line"), cases())
def test_bad_input_is_refused_in_one_sentence(command, line, place, monkeypatch, capsys):
    before = modification_times(place)
    monkeypatch.chdir(place)
    words = line.split()
    if "--output_dir" not in words:
        words += ["--output_dir", "out"]
    assert import_module(f"eval.{command}").main(words) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert CASES[command][line] in sentence
    assert modification_times(place) == before
