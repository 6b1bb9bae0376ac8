"""A command line of diffusers' DreamBooth script has the same meaning here.

The differences are in one table, which is also tested to be correct and complete.
"""

import dataclasses
import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from bilora_diffusion.config import constraints
from bilora_diffusion.config.command_line import CommandLine
from bilora_diffusion.config.options import LR_SCHEDULERS
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import DreamBoothConfig, resolve
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.train.optimizers import (
    StepLayout,
    build_optimizer,
    build_scheduler,
    total_steps,
)
from tests.references.diffusers_flags import (
    DEFAULTS,
    TABLES,
    Meaning,
    default_here,
    meaning,
    refuses,
)

FOREIGN = constraints.table().foreign["image"]
RECORD = Path(__file__).parents[1] / "references" / "diffusers_flags.json"
OF_ALL_SCRIPTS = json.loads(RECORD.read_text(encoding="utf-8"))["flags"]
# Options for the sources of images and models, for resuming and for uploads.
PLACES = """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant cache_dir
    instance_data_dir instance_prompt dataset_name caption_column
    resume_from_checkpoint push_to_hub hub_token
"""
# Values to choose from for each flag: those of the record, or True for a bare flag.
VALUES: dict[str, Any] = {}
for flag_name in DEFAULTS:
    if flag_name not in PLACES.split():
        VALUES[flag_name] = OF_ALL_SCRIPTS[flag_name]["given"] or (True,)
VALUES |= {
    "repeats": (1, 3, 10),
    "class_data_dir": ("class-images",),
    "num_class_images": (4, 100, 1000),
    "resolution": (512, 1024),
    "train_batch_size": (1, 2, 3, 4),
    "num_train_epochs": (1, 4, 7),
    "max_train_steps": (5, 40, 300),
    "gradient_accumulation_steps": (1, 2, 5),
    "learning_rate": (1e-4, 5e-5, 1.0),
    "text_encoder_lr": (5e-6, 1e-5),
    "lr_scheduler": LR_SCHEDULERS,
    "lr_warmup_steps": (0, 2, 100),
    "lr_num_cycles": (1, 3),
    "lr_power": (0.5, 2.0),
    "optimizer": ("AdamW", "adamw", "prodigy", "Prodigy"),
    "rank": (4, 16, 64),
}


class Images(list[None]):
    """Stand-in for a set of images: only their number counts."""

    label = "dog"

    @property
    def entries(self):
        entry = SimpleNamespace(name="", size=(1024, 1024), caption="a dog", concept=0)
        return [entry] * len(self)

    def values_of_images(self, values):
        return values * len(self)


@pytest.fixture(autouse=True)
def images(machine, monkeypatch, tmp_path):
    """Simulate a GPU and create a folder with an image."""
    machine("cuda")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.png").touch()


def random_flags(seed):
    """Return about a third of the flags with random values, and a number of processes."""
    random_numbers = random.Random(seed)
    flags = {}
    for name, values in VALUES.items():
        if random_numbers.random() < 0.35:
            flags[name] = random_numbers.choice(values)
    return flags, random_numbers.choice((1, 2, 3))


def words(flags):
    argv = [
        "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0",
        "--instance_data_dir=dog",
        "--instance_prompt=a photo of a TOK dog",
    ]
    for name, value in flags.items():
        argv.append(f"--{name}" if value is True else f"--{name}={value}")
    return argv


def ours(flags, processes, images, class_images):
    """Return the command line's meaning here, from the functions that the training itself calls."""
    launch = {"LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
    with mock.patch.dict(os.environ, launch):
        cfg = resolve(words(flags))
    cfg = dataclasses.replace(cfg, cache_latents="no", optimizer=cfg.optimizer.replace("8bit", ""))
    instance: Any = Images([None] * images)
    classes: Any = Images([None] * class_images) if cfg.with_prior_preservation else None
    samples = TrainingStream(cfg, instance, classes).num_samples
    batch = StepLayout(cfg.train_batch_size, cfg.gradient_accumulation_steps, processes).step_size
    steps = total_steps(cfg, samples, batch)
    names = ["unet"]
    if cfg.train_text_encoder:
        names += ["text_encoder", "text_encoder_2"]
    family = StableDiffusionXL()
    task: Any = SimpleNamespace(
        cfg=cfg,
        family=family,
        layers=family.targets,
        models={name: nn.Identity() for name in names},
        frozen=dict.fromkeys(names, ()),
        start={},
    )
    unet, *encoders = DreamBooth.targets(task)
    assert len({encoder.lr for encoder in encoders}) <= 1
    return Meaning(
        batch=batch,
        steps=steps,
        epochs=math.ceil(steps / math.ceil(samples / batch)),
        alpha=unet.spec.alpha,
        rate=unet.lr,
        text_encoder_rate=encoders[0].lr if encoders else None,
        warmup=cfg.warmup_steps(steps),
        course=course(cfg, unet.lr, steps),
    )


def course(cfg, rate, steps):
    """Return the schedule's factor on the rate at each step."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate, "weight_decay": 0.0}]
    optimizer = build_optimizer(cfg, groups)
    scheduler = build_scheduler(cfg, optimizer, steps)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"] / rate)
        optimizer.step()
        scheduler.step()
    return tuple(factors)


def require_equal(meaning, expected):
    assert dataclasses.replace(meaning, course=()) == dataclasses.replace(expected, course=())
    assert meaning.course == pytest.approx(expected.course, abs=1e-9)


@pytest.mark.parametrize("seed", range(15))
def test_a_random_command_line_means_the_same_as_in_diffusers(seed):
    flags, processes = random_flags(seed)
    theirs = {**DEFAULTS, **flags}
    if refuses(theirs):
        with pytest.raises(UserError):
            resolve(words(flags))
        flags |= {
            "do_edm_style_training": False,
            "class_data_dir": "class-images",
            "class_prompt": "a photo of a dog",
        }
        theirs |= flags
    counts = {"images": 5, "class_images": 200, "processes": processes}
    differing = default_here(theirs, frozenset(flags))
    require_equal(ours(flags, **counts), meaning({**theirs, **differing}, **counts))
    # If every default that differs is set to diffusers' value, the runs agree. Alpha's is the rank.
    spelled = {name: theirs.get(name, theirs["rank"]) for name in differing}
    if spelled.pop("max_train_steps", 0) is None:
        spelled["num_train_epochs"] = theirs["num_train_epochs"]
    require_equal(ours({**flags, **spelled}, **counts), meaning(theirs, **counts))


def test_the_larger_of_instance_and_class_images_defines_an_epoch():
    flags = {
        "with_prior_preservation": True,
        "class_data_dir": "class-images",
        "class_prompt": "x",
        "num_class_images": 200,
        "num_train_epochs": 4,
        "train_batch_size": 1,
    }
    assert ours(flags, 1, images=5, class_images=200).steps == 800
    assert ours(flags, 1, images=5, class_images=300).steps == 800  # 200 of the 300 are used
    # 5 * 60 = 300 instance samples are more than 200 class images.
    assert ours({**flags, "repeats": 60}, 1, images=5, class_images=200).steps == 1200


@pytest.mark.parametrize("name", OF_ALL_SCRIPTS)
def test_every_flag_of_diffusers_scripts_is_read_or_refused_with_an_alternative(name, tmp_path):
    value = OF_ALL_SCRIPTS[name]["given"]
    line = CommandLine(DreamBoothConfig.groups, "", "", FOREIGN)
    argv = [f"--{name}", *value, "--method", "lora"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: {value[0] if value else 'true'}\nmethod: lora\n")
    for command_line in (argv, ["--config", str(recipe)]):
        if name in FOREIGN:
            _, instead = FOREIGN[name]
            with pytest.raises(UserError, match=f"{name}.*{re.escape(instead.replace('`', ''))}"):
                line.read(command_line)
            continue
        values, given_options = line.read(command_line)
        assert given_options - {"config"} == {name, "method"}
        if not value:
            assert values[name] in (True, "yes")


@pytest.mark.parametrize("twice", [True, False])
def test_a_quantization_file_with_nf4_equals_quantize_nf4(twice, tmp_path):
    file = tmp_path / "bnb.json"
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": twice}
    file.write_text(json.dumps(nf4))
    cfg = resolve(words({"bnb_quantization_config_path": file}))
    assert cfg.quantize == "nf4"
    assert cfg.resume_settings() == resolve(words({"quantize": "nf4"})).resume_settings()
    file.write_text(json.dumps({**nf4, "llm_int8_skip_modules": ["proj_out"]}))
    with pytest.raises(UserError, match=r"bnb.json.*llm_int8_skip_modules"):
        resolve(words({"bnb_quantization_config_path": file}))


def test_images_of_the_final_prompt_are_generated_only_at_the_end():
    final = {"final_validation_prompt": "a dog"}
    cfg = resolve(words(final))
    assert cfg.validation_prompts == ["a dog"]
    assert not cfg.validates_at_checkpoints
    assert cfg.num_validation_images == DEFAULTS["num_validation_images"]
    assert resolve(words({**final, "validation_epochs": 5})).validation_epochs == 5
    both = resolve(words({**final, "validation_prompt": "a cat"}))
    assert both.validation_prompts == ["a cat"]
    assert both.validates_at_checkpoints


def test_the_tables_have_every_flag_and_every_default_that_differs():
    names = list(DEFAULTS) + list(TABLES["flow"]) + list(FOREIGN)
    assert sorted(names) == sorted(OF_ALL_SCRIPTS)
    for name, flag in OF_ALL_SCRIPTS.items():
        assert (name in DEFAULTS) == (flag["of"] == "all" or "sdxl" in flag["of"]), name
    defaults = {field.name: field.default for field in dataclasses.fields(DreamBoothConfig)}
    for name, flag in (TABLES["sdxl"] | TABLES["flow"]).items():
        assert flag.get("here") or defaults[name] == flag.get("default")
