"""``--dry_run`` as a user runs it: every kind of model, without weights, and nothing is written."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from huggingface_hub.utils import filter_repo_objects

import train_dreambooth_bilora
import train_text_bilora
from bilora_diffusion.errors import UserError
from bilora_diffusion.image import pipeline
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.train.dry_run import main
from docs.memory import FOLDER, MODELS
from tests.image.tiny import shared
from tests.scripts.runs import SCRIPT, flags, process
from tests.text.text_builders import KINDS, material, text_flags

SD3 = "StableDiffusion3Pipeline"


def without_weights(model, folder):
    """A copy of a model's folder without its weights."""
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def image_run(capsys, folder, code=0, **values):
    """Output of a dry run of images, which writes nothing."""
    AcceleratorState._reset_state()
    argv = [*flags(folder, **values), "--dry_run"]
    assert train_dreambooth_bilora.main(argv) == code
    assert not folder.exists()
    return "".join(capsys.readouterr())


def parts_of(said):
    """The printed parts of the memory, by name."""
    lines = (line.split(maxsplit=2) for line in said.splitlines() if line.startswith("  "))
    return {name: f"{size} {unit}" for size, unit, name in lines}


def needed(said):
    """Bytes that a dry run says."""
    found = re.search(r"the run needs about ([\d.]+) (MB|GB),", said)
    assert found is not None, said
    return float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]


def sdxl(folder):
    """SDXL at its full size, of which there are configurations and small tokenizers only."""
    base = without_weights(pipeline_dir(), folder)
    published = MODELS["Stable Diffusion XL"]
    (_, unet), encoders = published["denoiser"], published["encoders"]
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    changes = {
        "unet": unet,
        "vae": vae,
        **dict(zip(StableDiffusionXL().encoders, (e[2] for e in encoders), strict=True)),
    }
    for part, values in changes.items():
        file = base / part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        if part == "unet":
            config = {"_class_name": config["_class_name"]}
        file.write_text(json.dumps({**config, **values}), encoding="utf-8")
    return base


def near(name, *words):
    """Hold the memory of a dry run in a process of its own to what the run took."""
    done = process(*words, "--dry_run")
    measured = json.loads((FOLDER / name).read_text(encoding="utf-8"))["measured_bytes"]
    assert needed(done.stdout) == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_the_miniature_is_near_what_a_run_takes(tmp_path):
    words = ("--config", "recipes/mini.yaml", "--max_train_steps", "3")
    near("mini.json", SCRIPT, *words, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sdxl_is_near_what_a_run_takes(tmp_path):
    base, row = sdxl(tmp_path / "sdxl"), json.loads((FOLDER / "sdxl_256.json").read_text())
    words = row["command"].replace("random_sdxl", str(base)).replace("sdxl_out", f"{tmp_path}/run")
    near("sdxl_256.json", *words.split())


def test_of_a_model_on_the_hub_no_weights_are_downloaded(capsys, tmp_path, monkeypatch):
    whole, here = shared(SD3), tmp_path / "here"

    def download(name, allow_patterns, **_):
        assert name == "somebody/sd3"
        names = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / file, here / file)
        return str(here)

    monkeypatch.setattr(pipeline, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, file, **__: whole / file)
    values = {"pretrained_model_name_or_path": "somebody/sd3", "resolution": 64}
    assert "It fits" in image_run(capsys, tmp_path / "run", **values)
    assert not list(here.rglob("*.safetensors"))
    assert list(here.rglob("tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_text_model_runs_dry(kind, capsys, tmp_path):
    AcceleratorState._reset_state()
    given = material(kind)
    given["model_name_or_path"] = without_weights(given["model_name_or_path"], tmp_path / "base")
    given["validation_file"] = given["train_file"]
    argv = [*text_flags(tmp_path / "run", **given), "--dry_run"]
    assert train_text_bilora.main(argv) == 0
    said = "".join(capsys.readouterr())
    assert "24 rows" in said
    assert ("logits" in parts_of(said)) == (kind != "classification")
    assert "It fits" in said
    assert not (tmp_path / "run").exists()


MINI = {
    "weights: unet": "69.3 MB",
    "adapters: primary": "358 kB",
    "adapters: auxiliary": "358 kB",
    "gradients": "717 kB",
    "the optimizer's state": "1.43 MB",
}
"""Of Bi-LoRA of rank 4 on the miniature: 89,600 numbers of 4 bytes in each adapter. These and those
below are what real models and methods hold.
"""


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, MINI),
        ({"auxiliaries": "sample"}, {"adapters: auxiliary": "8.24 MB", "gradients": "1.79 MB"}),
        ({"auxiliaries": "sample", "auxiliaries_on": "cpu"}, {"adapters: auxiliary": "1.43 MB"}),
        ({"use_ema": True, "use_dora": True}, {"adapters: primary": "403 kB"}),
        ({"optimizer": "adamw8bit"}, {"the optimizer's state": "358 kB"}),
        ({"init_lora_weights": "pissa"}, {"adapters: first values": "358 kB"}),
        ({"lora_layers": "convolutions"}, {"adapters: primary": "729 kB"}),
        (
            {"method": "full"},
            {"weights: unet": "69.3 MB", "gradients": "69.3 MB", "the optimizer's state": "139 MB"},
        ),
        (
            {"mixed_precision": "bf16", "method": "lora"},
            {"weights: unet": "34.6 MB", "gradients": "358 kB"},
        ),
        ({"quantize": "nf4"}, {"weights: unet": "43.8 MB"}),
    ],
    ids=str,
)
def test_what_options_keep_is_counted(values, parts, capsys, tmp_path):
    said = parts_of(image_run(capsys, tmp_path / "run", train_batch_size=4, **values))
    assert {name: said[name] for name in parts} == parts


def test_bad_input_is_one_sentence(capsys, tmp_path):
    accelerator: Any = SimpleNamespace(num_processes=2)
    with pytest.raises(UserError, match="one process"):
        main(lambda *_: None, None, resolve(["--dataset", "mini"]), accelerator)
    given = {
        "pretrained_model_name_or_path": without_weights(shared(SD3), tmp_path / "base"),
        "resolution": 64,
    }
    for wrong in ({"resolution": 72}, {"lora_layers": "to_z"}):
        said = image_run(capsys, tmp_path / "run", code=2, **{**given, **wrong})
        assert all(str(value) in said for value in wrong.values())
