"""Bad command lines and recipes: one sentence each, with the value and the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bilora_diffusion import mini
from bilora_diffusion.config import parse
from bilora_diffusion.errors import UserError

MINI = ["--dataset", "mini"]
PRIOR = [*MINI, "--with_prior_preservation", "--class_data_dir", "class-images"]
PRODIGY = [*MINI, "--optimizer", "prodigy"]


def refusal(argv: list[str]) -> str:
    """The sentence with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message.replace("e.g. ", "")
    assert 20 < len(message) < 400
    return message


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without a launcher, a token, or any optional package."""
    for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    use_device(monkeypatch, "cpu")
    missing = {"bitsandbytes", "prodigyopt", "xformers", "wandb", "comet_ml"}
    monkeypatch.setattr(
        "bilora_diffusion.config.environment.is_installed", lambda name: name not in missing
    )


def use_device(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for module in ("resolve", "environment"):
        monkeypatch.setattr(f"bilora_diffusion.config.{module}.device_type", lambda: kind)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        # what argparse sees
        ([*MINI, "--rnk", "4"], ['"--rnk"', 'did you mean "--rank"']),
        ([*MINI, "--learning-rat=1"], ['"--learning-rat"', '"--learning_rate"']),
        ([*MINI, "--quantize", "nf8"], ['"nf8"', 'did you mean "nf4"']),
        ([*MINI, "stray"], ['"stray"', "flag"]),
        ([*MINI, "--rank", "four"], ["--rank", "'four'", "whole number"]),
        ([*MINI, "--rank", "4.5"], ["--rank", "'4.5'", "whole number"]),
        ([*MINI, "--rho", "small"], ["--rho", "'small'", "a number"]),
        ([*MINI, "--rho"], ["--rho has no value"]),
        ([*MINI, "--center_crop", "perhaps"], ["--center_crop", '"perhaps"', "True or False"]),
        ([*MINI, "--mixed_precision", "fp8"], ["--mixed_precision", '"fp8"', "bf16"]),
        ([*MINI, "--cache_latents", "maybe"], ["--cache_latents", '"maybe"', "auto"]),
        ([*MINI, "--rho_norm", "scalde"], ['"scalde"', 'did you mean "scaled"']),
        ([*MINI, "--init_lora_weights", "pisa"], ['"pisa"', 'did you mean "pissa"']),
        ([*MINI, "--lr_scheduler", "cosin"], ['"cosin"', 'did you mean "cosine"']),
        ([*MINI, "--image_interpolation_mode", "lancos"], ['"lancos"', '"lanczos"']),
        # names and ranges
        ([*MINI, "--method", "bilra"], ["--method", '"bilra"', 'did you mean "bilora"']),
        ([*MINI, "--method", "sam"], ['"sam"', "use one of"]),
        ([*MINI, "--optimizer", "adam"], ['"adam"', 'did you mean "adamw"']),
        ([*MINI, "--rho", "0"], ["--rho is 0.0", "above 0", "--method lora"]),
        ([*MINI, "--rho=-1"], ["--rho is -1.0"]),
        ([*MINI, "--rho", "nan"], ["--rho is nan"]),
        ([*MINI, "--rank", "0"], ["--rank is 0", "1 or more"]),
        ([*MINI, "--auxiliary_rank", "0"], ["--auxiliary_rank is 0"]),
        ([*MINI, "--lora_alpha", "0"], ["--lora_alpha is 0.0"]),
        ([*MINI, "--auxiliary_alpha=-8"], ["--auxiliary_alpha is -8.0"]),
        ([*MINI, "--learning_rate", "0"], ["--learning_rate is 0.0"]),
        ([*MINI, "--learning_rate", "inf"], ["--learning_rate is inf"]),
        ([*MINI, "--auxiliary_learning_rate=-1"], ["--auxiliary_learning_rate is -1.0"]),
        ([*MINI, "--lora_dropout", "1"], ["--lora_dropout is 1.0"]),
        ([*MINI, "--max_train_steps", "0"], ["--max_train_steps is 0"]),
        ([*MINI, "--num_train_epochs", "0"], ["--num_train_epochs is 0"]),
        ([*MINI, "--train_batch_size", "0"], ["--train_batch_size is 0"]),
        ([*MINI, "--gradient_accumulation_steps", "0"], ["--gradient_accumulation_steps is 0"]),
        ([*MINI, "--repeats", "0"], ["--repeats is 0"]),
        ([*MINI, "--seed=-1"], ["--seed is -1"]),
        ([*MINI, "--resolution", "100"], ["--resolution is 100", "multiple of 8", "96"]),
        ([*MINI, "--resolution", "0"], ["--resolution is 0"]),
        ([*MINI, "--validation_epochs", "0"], ["--validation_epochs is 0"]),
        ([*MINI, "--checkpoints_total_limit=-1"], ["--checkpoints_total_limit is -1"]),
        ([*MINI, "--snr_gamma", "0"], ["--snr_gamma is 0.0"]),
        ([*MINI, "--adam_beta2", "1"], ["--adam_beta2 is 1.0"]),
        ([*MINI, "--max_grad_norm", "0"], ["--max_grad_norm is 0.0"]),
        ([*MINI, "--output_dir", ""], ['--output_dir is ""']),
        # sources and prompts
        ([], ["no images", "--dataset", "--instance_data_dir"]),
        ([*MINI, "--instance_data_dir", "photos"], ['"mini"', '"photos"', "only one"]),
        (["--dataset", "some/set"], ['"some/set"', "--instance_prompt", "--caption_column"]),
        ([*MINI, "--caption_column", "image"], ['"image"', "both"]),
        (["--dataset", "not a set", "--instance_prompt", "x"], ['"not a set"', "hub id"]),
        (["--dataset", "./nowhere", "--instance_prompt", "x"], ['"./nowhere"', "not exist"]),
        (["--dataset", "a/b/c", "--instance_prompt", "x"], ['"a/b/c"', "not exist"]),
        (["--instance_data_dir", "nowhere", "--instance_prompt", "x"], ['"nowhere"', "exist"]),
        ([*MINI, "--validation_dataset", "./none"], ['--validation_dataset "./none"']),
        # prior preservation
        ([*MINI, "--with_prior_preservation"], ["--class_data_dir"]),
        (PRIOR, ["--class_prompt"]),
        ([*PRIOR, "--class_prompt", "x", "--num_class_images", "0"], ["--num_class_images is 0"]),
        # combinations
        ([*MINI, "--do_edm_style_training", "--snr_gamma", "5"], ["--snr_gamma 5.0", "edm"]),
        ([*PRODIGY, "--auxiliary_learning_rate", "0.1"], ["--auxiliary_learning_rate 0.1", "1.0"]),
        (
            [*MINI, "--overwrite_output_dir", "--resume_from_checkpoint", "latest"],
            ['"latest"', "--overwrite_output_dir"],
        ),
        (
            [*MINI, "--push_to_hub", "--hub_token", "hf_x", "--report_to", "wandb"],
            ["--hub_token", "wandb", "hf auth login"],
        ),
        # the machine
        (PRODIGY, ["prodigyopt", "pip install"]),
        ([*MINI, "--use_8bit_adam"], ["--use_8bit_adam", "pip install bitsandbytes"]),
        ([*MINI, "--quantize", "nf4"], ["--quantize nf4", 'pip install "bitsandbytes']),
        ([*MINI, "--report_to", "wandb"], ["--report_to wandb", "pip install wandb"]),
        ([*MINI, "--report_to", "tensorbord"], ['"tensorbord"', '"tensorboard"']),
        ([*MINI, "--enable_xformers_memory_efficient_attention"], ["pip install xformers"]),
        ([*MINI, "--mixed_precision", "fp16"], ["fp16", "GPU"]),
        ([*MINI, "--push_to_hub"], ["--push_to_hub", "hf auth login"]),
        ([*MINI, "--local_rank", "1"], ["--local_rank 1", "torchrun"]),
        # models
        ([*MINI, "--variant", "fp16"], ['--variant "fp16"', "mini"]),
        ([*MINI, "--pretrained_model_name_or_path", "./nothing"], ['"./nothing"', "not exist"]),
        ([*MINI, "--pretrained_model_name_or_path", "a b"], ['"a b"', "hub id"]),
        ([*MINI, "--pretrained_vae_model_name_or_path", "../vae"], ['"../vae"', "not exist"]),
        # recipes
        ([*MINI, "--config", "nowhere.yaml"], ['"nowhere.yaml"', "--config"]),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else None,
)
def test_bad_command_lines(argv: list[str], parts: list[str]) -> None:
    message = refusal(argv)
    for part in parts:
        assert part in message
    assert "hf_x" not in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dataset: mini\nrnk: 4\n", ['"rnk"', 'did you mean "rank"']),
        ("dataset: mini\nrank: four\n", ["--rank", "'four'", "whole number"]),
        ("dataset: mini\nrank: [1, 2]\n", ['"rank"', "[1, 2]", "single value"]),
        ("dataset: mini\nrank: {a: 1}\n", ['"rank"', "single value"]),
        ("dataset: mini\nrank: null\n", ['"rank"', "single value"]),
        ("dataset: mini\nrank: yes\n", ["--rank", "'yes'"]),
        ("dataset: mini\nrho_norm: scale\n", ['"scale"', 'did you mean "scaled"']),
        ("dataset: mini\ndataset_name: x/y\n", ['"dataset_name"', "second time"]),
        ("dataset: mini\nconfig: other.yaml\n", ['unknown key "config"']),
        ("dataset: mini\n  rank: 4\n", ["not valid YAML", "line"]),
        ("- mini\n", ["holds no options"]),
        ("", ["holds no options"]),
        ("rank: 0\ndataset: mini\n", ["--rank is 0"]),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refusal(["--config", str(path)])
    for part in parts:
        assert part in message


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00rank")
    assert "not UTF-8" in refusal(["--config", str(tmp_path / "recipe.yaml")])
    assert "of --config is a folder" in refusal(["--config", str(tmp_path)])


Build = Callable[[Path], list[str]]


def empty_images(folder: Path) -> list[str]:
    return ["--instance_data_dir", str(folder), "--instance_prompt", "x"]


def file_as_folder(folder: Path) -> list[str]:
    (folder / "a.png").touch()
    return ["--instance_data_dir", str(folder / "a.png"), "--instance_prompt", "x"]


def file_as_dataset(folder: Path) -> list[str]:
    (folder / "a.zip").touch()
    return ["--dataset", str(folder / "a.zip"), "--instance_prompt", "x"]


def file_as_class_folder(folder: Path) -> list[str]:
    (folder / "a").touch()
    return [*PRIOR[:3], "--class_data_dir", str(folder / "a"), "--class_prompt", "x"]


def class_folder_is_instance_folder(folder: Path) -> list[str]:
    (folder / "a.png").touch()
    prior = ["--with_prior_preservation", "--class_data_dir", str(folder), "--class_prompt", "x"]
    return ["--instance_data_dir", str(folder), "--instance_prompt", "x", *prior]


def no_pipeline(folder: Path) -> list[str]:
    (folder / "README.md").touch()
    return [*MINI, "--pretrained_model_name_or_path", str(folder)]


def other_pipeline(folder: Path) -> list[str]:
    index = json.loads((mini.pipeline_dir() / "model_index.json").read_text())
    del index["text_encoder_2"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("unet", "vae", "text_encoder", "tokenizer", "tokenizer_2"):
        (folder / part).mkdir()
    return [*MINI, "--pretrained_model_name_or_path", str(folder)]


def empty_prompts(folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("\n\n")
    return [*MINI, "--validation_prompts", str(folder / "prompts.txt")]


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (empty_images, "empty folder"),
        (file_as_folder, "is a file"),
        (file_as_dataset, "is a file"),
        (file_as_class_folder, "is a file"),
        (class_folder_is_instance_folder, "folder of their own"),
        (no_pipeline, "no Stable Diffusion XL pipeline"),
        (other_pipeline, "it has no text_encoder_2"),
        (empty_prompts, "empty file"),
    ],
)
def test_bad_folders(tmp_path: Path, build: Build, part: str) -> None:
    message = refusal(build(tmp_path))
    assert part in message
    assert str(tmp_path) in message


def test_bf16_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    use_device(monkeypatch, "mps")
    assert "bf16 does not work on MPS" in refusal([*MINI, "--mixed_precision", "bf16"])


def test_options_at_their_defaults_are_never_refused() -> None:
    defaults = ["--lr_num_cycles", "1", "--lr_power", "1.0", "--lr_warmup_steps", "0"]
    parse([*MINI, *defaults, "--num_class_images", "100", "--prodigy_decouple", "True"])


def test_options_of_the_other_method_may_stand() -> None:
    parse([*MINI, "--method", "lora", "--rho", "0.1", "--auxiliary_rank", "2"])
