"""``--dry_run`` as a user runs it: for every kind of model, without weights or written files."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

import train_dreambooth_bilora
import train_text_bilora
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image import pipeline
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.pipeline import memory_by_phase
from bilora_diffusion.image.script import DREAMBOOTH
from bilora_diffusion.train import dry_run
from bilora_diffusion.train.dry_run import STEP, attach_copy, complete
from docs import memory
from docs.memory import FOLDER
from tests.image.tiny import shared
from tests.scripts.runs import flags, run_python
from tests.text.text_builders import KINDS, material, text_flags

SD3 = "StableDiffusion3Pipeline"


def without_weights(model, folder):
    """Copy a model's folder without its weights, and return the copy."""
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def image_run(capsys, folder, exit_code=0, **values):
    """Return the output of an image dry run, after checking that it wrote nothing."""
    argv = [*flags(folder, **values), "--dry_run"]
    assert train_dreambooth_bilora.main(argv) == exit_code
    assert not folder.exists()
    return "".join(capsys.readouterr())


def parts_of(output):
    """Return the size of each printed part of the memory, by the part's name."""
    parts = {}
    for line in output.splitlines():
        if line.startswith("  "):
            size, unit, name = line.split(maxsplit=2)
            parts[name] = f"{size} {unit}"
    return parts


@pytest.mark.slow
def test_the_estimated_memory_is_near_the_measured_memory(tmp_path):
    """The estimates are for the miniature, in a separate process, and for SDXL at full size."""
    mini = json.loads((FOLDER / "mini.json").read_text())
    command = mini["command"].replace("mini_run", f"{tmp_path}/run")
    output = run_python(f"{command} --dry_run".split()).stdout
    needed = re.search(r"the run needs about (\d+) MB,", output)
    assert float(needed[1]) * 1e6 == pytest.approx(mini["measured_bytes"], rel=0.15)
    assert not (tmp_path / "run").exists()

    sdxl = json.loads((FOLDER / "sdxl_256.json").read_text())
    words = re.findall(r"--(?:resolution|mixed_precision|train_batch_size) \w+", sdxl["command"])
    run = memory.empty_task("Stable Diffusion XL", *" ".join(words).split())
    phases = memory_by_phase(run, torch.device("cpu"))
    # The process with its libraries is assumed to take 600 MB.
    phases = complete(phases, attach_copy(run, 2)[1], process=600_000_000)
    assert sum(phases[STEP].values()) == pytest.approx(sdxl["measured_bytes"], rel=0.15)


def test_no_weights_are_downloaded_from_the_hub(capsys, tmp_path, monkeypatch):
    model = shared(SD3)
    cache = tmp_path / "cache"

    def download(name, allow_patterns, **_):
        assert name == "somebody/sd3"
        names = [str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model / file, cache / file)
        return str(cache)

    monkeypatch.setattr(pipeline, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, file, **__: model / file)
    values = {"pretrained_model_name_or_path": "somebody/sd3", "resolution": 64}
    assert "It fits" in image_run(capsys, tmp_path / "run", **values)
    assert not list(cache.rglob("*.safetensors"))
    assert list(cache.rglob("tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_text_model_has_a_dry_run(kind, capsys, tmp_path):
    settings = material(kind)
    base = settings["model_name_or_path"]
    settings["model_name_or_path"] = without_weights(base, tmp_path / "base")
    settings["validation_file"] = settings["train_file"]
    # A run would refuse this folder, but a dry run does not look at it.
    occupied = tmp_path / "run"
    occupied.mkdir()
    (occupied / "metrics.jsonl").touch()
    argv = [*text_flags(occupied, **settings), "--dry_run"]
    assert train_text_bilora.main(argv) == 0
    output = "".join(capsys.readouterr())
    assert "24 rows" in output
    # Logits over a vocabulary are large enough to be listed; those of two classes are not.
    assert ("logits" in parts_of(output)) == (kind != "classification")
    assert "It fits" in output
    assert [file.name for file in occupied.iterdir()] == ["metrics.jsonl"]


MINI = {
    "weights: unet": "69.3 MB",
    "adapters: primary": "358 kB",
    "adapters: auxiliary": "358 kB",
    "gradients": "717 kB",
    "the optimizer's state": "1.43 MB",
}
"""Parts of the memory of Bi-LoRA with rank 4 on the miniature.

Each adapter has 89,600 values of 4 bytes. These sizes and those below are those of real models and
methods.
"""


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, MINI),
        ({"use_dora": True}, {"adapters: primary": "403 kB"}),
        (
            {"optimizer": "adamw8bit", "quantize": "nf4"},
            {"the optimizer's state": "358 kB", "weights: unet": "43.8 MB"},
        ),
        (
            {"method": "full"},
            {"weights: unet": "69.3 MB", "gradients": "69.3 MB", "the optimizer's state": "139 MB"},
        ),
        (
            {"mixed_precision": "bf16", "method": "lora", "init_lora_weights": "pissa"},
            {"weights: unet": "34.6 MB", "gradients": "358 kB", "adapters: first values": "358 kB"},
        ),
    ],
    ids=str,
)
def test_the_memory_that_options_need_is_counted(values, parts, capsys, tmp_path):
    output = parts_of(image_run(capsys, tmp_path / "run", train_batch_size=4, **values))
    assert {name: output[name] for name in parts} == parts


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(dry_run, "build_accelerator", lambda _: SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match="single process"):
        dry_run.run(DREAMBOOTH, [resolve(["--dataset", "mini"])])


def test_the_larger_of_two_runs_is_named(capsys, tmp_path):
    output = image_run(capsys, tmp_path / "run", method="lora", compare="bilora")
    assert "two runs" in output
    assert "Bi-LoRA on unet" in output


def test_a_dry_run_reports_enlarged_images_and_the_run_time(capsys, tmp_path):
    folder = tmp_path / "icons"
    folder.mkdir()
    for name, size in {"low": (90, 60), "exact": (64, 64), "large": (200, 65)}.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
    values = {"dataset": folder, "instance_prompt": "a TOK icon", "max_train_steps": 1800}
    values["pretrained_model_name_or_path"] = "mini"
    output = image_run(capsys, tmp_path / "run", resolution=64, **values)
    assert "data: 3 images at 64 px, 1 of them smaller and enlarged\n" in output
    assert "0.5 hours for each second that a step takes" in output
