"""How a command line is resolved: defaults, presets, recipes, the machine, and precedence."""

import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
from PIL import Image

from bilora_diffusion.adapters import ALL_LINEAR
from bilora_diffusion.config import derived
from bilora_diffusion.config.machine import device_type
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import default_of, options_of
from bilora_diffusion.image.base_model import SDXL_BASE
from bilora_diffusion.image.config import DreamBoothConfig, resolve
from bilora_diffusion.text.config import TextConfig

ICONS = "a TOK icon, in the style of TOK"
GROUPS = ["attention", "feed-forward"]


def mini(words=""):
    return resolve(f"--dataset mini {words}".split())


def icons(words=""):
    return resolve(f"--dataset linoyts/3d_icon {words}".split())


def text(words=""):
    return TextConfig.resolve(f"--model_name_or_path smollm2 --task sst2 {words}".split())


MEANINGS: list[Any] = [
    # Table A8
    (icons, "", {"learning_rate": 2e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0}),
    (icons, "", {"train_batch_size": 1, "gradient_accumulation_steps": 4, "seed": 0}),
    (icons, "", {"max_train_steps": 500, "num_train_epochs": None, "validation_epochs": None}),
    (icons, "", {"rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "rho": 0.05}),
    (icons, "", {"method": "bilora", "init_lora_weights": "default", "rho_norm": "scaled"}),
    (icons, "", {"pretrained_model_name_or_path": SDXL_BASE, "resolution": 1024}),
    (icons, "", {"instance_prompt": ICONS, "caption_column": None, "text_encoder_lr": None}),
    # Tables A4 to A7
    (text, "", {"rank": 8, "lora_alpha": 16.0, "learning_rate": 5e-4, "lr_scheduler": "cosine"}),
    (text, "", {"rho": 0.05, "method": "bilora", "adam_weight_decay": 0.0, "warmup_ratio": 0.03}),
    (text, "", {"max_length": 256, "task_type": "causal", "targets": ALL_LINEAR}),
    (text, "", {"max_train_steps": None, "num_train_epochs": 3}),
    # accumulation does not change the default batch size of text models
    (text, "--gradient_accumulation_steps 4", {"train_batch_size": 8}),
    # the default radius depends on method and modality
    (mini, "--method lora", {"rho": None}),
    (mini, "--method bilora", {"rho": 0.05}),
    (mini, "--method lora-sam", {"rho": 0.05}),
    (mini, "--method flat-lora", {"rho": 0.1}),
    (text, "--method lora", {"rho": None}),
    (text, "--method bilora", {"rho": 0.05}),
    (text, "--method lora-sam", {"rho": 0.01}),
    (text, "--method flat-lora", {"rho": 0.05}),
    # the miniature, and options that override its defaults
    (mini, "", {"pretrained_model_name_or_path": "mini", "validation_dataset": "mini-heldout"}),
    (mini, "", {"resolution": 64, "caption_column": "prompt", "report_to": "tensorboard"}),
    (mini, "--instance_prompt icon", {"instance_prompt": "icon", "caption_column": None}),
    (mini, "--validation_dataset none", {"validation_dataset": None}),
    (
        mini,
        "--validation_prompt one --validation_prompts two --validation_prompts three",
        {"validation_prompts": ["one", "two", "three"], "num_validation_images": 4},
    ),
    # measurements that choose the weights: 5 per run with samples, 20 with the loss alone
    (mini, "--keep_best --max_train_steps 500", {"validation_loss_steps": 100}),
    (mini, "--keep_best --choose_by loss --max_train_steps 500", {"validation_loss_steps": 25}),
    (mini, "--keep_best --max_train_steps 9", {"validation_loss_steps": 1}),
    (mini, "--keep_best --validation_loss_steps 3", {"validation_loss_steps": 3}),
    # booleans
    (mini, "--no_output_kohya_format", {"output_kohya_format": False}),
    (mini, "--method full", {"output_kohya_format": False}),  # it exports a full model
    (mini, "--optimizer Prodigy", {"optimizer": "prodigy", "learning_rate": 1.0}),
    (mini, "--lora_target_modules attention+feed-forward", {"lora_layers": GROUPS}),
    # steps and epochs of text models; test_diffusers_command_lines.py compares those of images
    (text, "--max_train_steps 9", {"max_train_steps": 9, "num_train_epochs": None}),
]


@pytest.mark.parametrize(("read", "words", "expected"), MEANINGS)
def test_a_command_line_is_resolved_to_these_values(read, words, expected):
    cfg = read(words)
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_all_spellings_are_equivalent_and_a_data_set_sets_its_prompts():
    assert resolve(["--dataset_name=mini"]) == resolve(["--dataset-name", "mini"]) == mini()
    prompts = icons().validation_prompts
    assert (prompts[0], len(prompts)) == ("a TOK icon of a rabbit, in the style of TOK", 6)


CUDA = {"kind": "cuda"}
OLD_CUDA = {"kind": "cuda", "bf16": False}
CPU = {"kind": "cpu"}
THREE_PROCESSES = {"LOCAL_RANK": "0", "WORLD_SIZE": "3"}
SCALED = "--scale_lr --train_text_encoder"
FP16 = {"mixed_precision": "fp16"}
BF16 = {"mixed_precision": "bf16"}
FP32 = {"mixed_precision": "no"}


def launched(precision):
    return {"ACCELERATE_MIXED_PRECISION": precision}


ETA_2 = "auxiliary_learning_rate"
ON_MACHINES: list[Any] = [
    (CUDA, {}, mini, "--resolution 512", {"gradient_checkpointing": True}),
    (CUDA, {}, mini, "--resolution 504", {"gradient_checkpointing": False}),
    (CPU, {}, mini, "--resolution 512", {"gradient_checkpointing": False}),
    (CPU, {}, icons, "", FP32),
    (CUDA, {}, icons, "", BF16),
    (OLD_CUDA, {}, icons, "", FP16),
    (OLD_CUDA, {}, mini, "", FP16),
    (CUDA, launched("no"), icons, "", BF16),
    (CUDA, launched("fp16"), icons, "--mixed_precision no", FP32),
    (CPU, launched("bf16"), icons, "", BF16),
    # --scale_lr multiplies by batch (1), accumulation (4) and processes (3), but not the text
    # encoders' rate
    (CUDA, THREE_PROCESSES, mini, SCALED, {ETA_2: None, "learning_rate": 24e-4}),
    (
        CUDA,
        THREE_PROCESSES,
        mini,
        f"{SCALED} --{ETA_2} 1e-4",
        {ETA_2: 12e-4, "text_encoder_lr": 5e-6},
    ),
    # Prodigy has a single rate
    (
        CUDA,
        THREE_PROCESSES,
        mini,
        f"{SCALED} --optimizer prodigy",
        {"learning_rate": 12.0, "text_encoder_lr": 12.0},
    ),
    (CUDA, THREE_PROCESSES, text, "--scale_lr", {"learning_rate": 5e-4 * 8 * 3}),
    ({**CPU, "missing": {"tensorboard"}}, {}, mini, "", {"report_to": "none"}),
]


@pytest.mark.parametrize(("device", "launch", "read", "words", "expected"), ON_MACHINES)
def test_some_defaults_depend_on_the_machine(
    device, launch, read, words, expected, machine, monkeypatch
):
    machine(**device)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    cfg = read(words)
    assert {name: getattr(cfg, name) for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "steps", "warmup_steps"),
    [
        ("", 101, 4),  # 0.03 * 101 is rounded up, as in Transformers
        ("--warmup_ratio 0.5", 10, 5),
        ("--lr_warmup_steps 7", 100, 7),
        ("--lr_scheduler constant", 100, 0),
    ],
)
def test_a_warm_up_is_given_as_a_ratio_or_in_steps(words, steps, warmup_steps):
    assert text(words).warmup_steps(steps) == warmup_steps


def test_local_folders_take_precedence_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "mini").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mini" / "a.png")
    monkeypatch.chdir(tmp_path)
    model = "--pretrained_model_name_or_path mini"
    cfg = resolve(f"--dataset ./mini --instance_prompt x {model}".split())
    assert cfg.dataset_name == "./mini"
    folder = f"--instance_data_dir mini {model}".split()  # a folder, not the miniature
    with pytest.raises(UserError, match=r"no prompt: .*--instance_prompt.*\.txt"):
        resolve(folder)
    (tmp_path / "mini" / "a.txt").write_text("a square")
    cfg = resolve(folder)
    assert cfg.instance_data_dir == "./mini"
    for name in ("dataset_name", "instance_prompt", "caption_column"):
        assert getattr(cfg, name) is None


def test_the_record_gives_the_same_configuration_and_does_not_contain_the_token(tmp_path):
    flags = "--lora_target_modules q v --packing --rho 0.1 --push_to_hub --hub_token hf_secret"
    cfg = text(flags)
    assert cfg.hub_token == "hf_secret"
    record = json.loads(json.dumps(cfg.to_dict()))
    assert "hf_secret" not in json.dumps(record)
    assert set(record) == options_of(cfg.groups).keys() - {"hub_token"}
    recipe = tmp_path / "recipe.yaml"
    with recipe.open("w") as file:
        for name, value in record.items():
            if value is not None and name not in ("num_train_epochs", "config"):
                file.write(f"{name}: {json.dumps(value)}\n")
    repeated = TextConfig.resolve(["--config", str(recipe), "--hub_token", "hf_secret"])
    assert repeated.to_dict() == {**record, "config": str(recipe)}


RECORDING = "--allow_tf32 --cache_dir x --log_dynamics --dynamics_steps 3 --max_eval_samples 9"
MEASURING = "--eval_steps 5 --max_eval_samples 9 --eval_batch_size 2 --preprocessing_num_workers 2"


@pytest.mark.parametrize(
    ("read", "harmless", "changes"),
    [
        (mini, RECORDING, ["--rho 0.1", "--seed 1", "--method lora", "--random_flip"]),
        (text, MEASURING, ["--max_length 9", "--template plain", "--warmup_ratio 0.5"]),
    ],
)
def test_a_resumed_run_may_change_only_options_without_effect_on_training(read, harmless, changes):
    default = read().resume_settings()
    cfg = read(f"{harmless} --output_dir x --report_to none")
    assert cfg.resume_settings() == default
    for change in changes:
        assert read(change).resume_settings() != default
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.rank = 5
    # The workers that load images receive a pickled copy.
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_accelerates_cpu_setting_selects_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: torch.device("cuda"))
    assert device_type() == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert device_type() == "cpu"


def test_the_default_rates_match_the_docstring_of_the_derivation_rules():
    image, text = (
        default_of(options.__dataclass_fields__["learning_rate"])
        for options in (DreamBoothConfig, TextConfig)
    )
    table = " ".join((derived.__doc__ or "").split())
    for words in (f"{image:.0e} for images", f"{text:.0e} for text"):
        assert words.replace("e-0", "e-") in table
    assert f"Default: {derived.TEXT_ENCODER_RATE:.0e}".replace("e-0", "e-") in table
