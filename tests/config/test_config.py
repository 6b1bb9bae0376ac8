"""What a command line means: defaults, presets, recipes, the machine, and which value wins."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode

from bilora_diffusion.config import machine as machine_module
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.config import DreamBoothConfig, parse
from bilora_diffusion.image.inputs import FP16_FIX, SDXL_BASE
from bilora_diffusion.image.options import INTERPOLATIONS
from bilora_diffusion.methods import default_rho

ROOT = Path(__file__).resolve().parents[2]
Machine = Callable[..., None]


def mini(*arguments: str) -> DreamBoothConfig:
    return parse(["--dataset", "mini", *arguments])


def test_interpolations_are_those_that_torchvision_knows() -> None:
    assert {name.replace("_", "-") for name in INTERPOLATIONS} == {
        m.value for m in InterpolationMode
    }


def test_defaults_are_table_a8() -> None:
    cfg = parse(["--dataset", "linoyts/3d_icon"])
    assert (cfg.learning_rate, cfg.lr_scheduler, cfg.lr_warmup_steps) == (2e-4, "constant", 0)
    assert (cfg.train_batch_size, cfg.gradient_accumulation_steps) == (1, 4)
    assert (cfg.max_train_steps, cfg.num_train_epochs, cfg.validation_epochs) == (500, None, 25)
    assert (cfg.rank, cfg.lora_alpha, cfg.lora_dropout, cfg.rho) == (4, 8, 0.0, 0.05)
    assert (cfg.method, cfg.init_lora_weights, cfg.rho_norm) == ("bilora", "default", "scaled")
    assert (cfg.pretrained_model_name_or_path, cfg.resolution) == (SDXL_BASE, 1024)
    assert (cfg.instance_prompt, cfg.caption_column) == ("a TOK icon, in the style of TOK", None)
    assert cfg.validation_prompts[0] == "a TOK icon of a rabbit, in the style of TOK"
    assert (len(cfg.validation_prompts), cfg.seed) == (6, 0)


def test_the_radius_is_the_methods_own() -> None:
    help_of = DreamBoothConfig.__dataclass_fields__["rho"].metadata["option"].help
    for method in ("bilora", "lora-sam", "flat-lora"):
        rho = mini("--method", method).rho
        assert rho == default_rho(method, "image")
        assert f"{rho:g}" in help_of
    assert mini("--method", "lora").rho is None


def test_mini_alone_is_enough() -> None:
    cfg = mini()
    assert cfg.pretrained_model_name_or_path == "mini"
    assert (cfg.resolution, cfg.caption_column) == (64, "prompt")
    assert cfg.validation_dataset == "mini-heldout"
    assert parse(["--dataset_name=mini"]) == parse(["--dataset-name", "mini"]) == cfg


def test_what_is_given_wins_over_a_preset() -> None:
    data = ["--instance_prompt", "an icon", "--resolution", "128"]
    cfg = mini(*data, "--validation_dataset", "none", "--validation_prompt", "a lion")
    assert (cfg.instance_prompt, cfg.caption_column, cfg.resolution) == ("an icon", None, 128)
    assert cfg.validation_dataset is None
    assert (cfg.validation_prompts, cfg.num_validation_images) == (["a lion"], 4)


def test_kohyas_file_is_written_unless_told_otherwise() -> None:
    assert mini().output_kohya_format
    assert mini("--output_kohya_format").output_kohya_format  # as in diffusers' script
    assert not mini("--no_output_kohya_format").output_kohya_format
    assert not mini("--method", "full").output_kohya_format  # which leaves whole models


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("cuda", ["--resolution", "512"], True),
        ("cuda", ["--resolution", "504"], False),
        ("cpu", ["--resolution", "512"], False),
        ("cuda", ["--resolution", "512", "--gradient_checkpointing", "False"], False),
        ("cpu", ["--resolution", "64", "--gradient_checkpointing"], True),
        ("cuda", ["--pretrained_model_name_or_path", "some/sdxl"], True),
    ],
)
def test_the_model_decides_what_is_left(
    machine: Machine, kind: str, arguments: list[str], expected: bool
) -> None:
    machine(kind)
    cfg = mini(*arguments).completed(1, side=1024)
    assert cfg.gradient_checkpointing is expected
    assert cfg.resolution == (1024 if "some/sdxl" in arguments else int(arguments[1]))
    assert cfg.completed(1, side=64) == cfg


@pytest.mark.parametrize(
    ("kind", "bf16", "launched", "given", "expected"),
    [
        ("cpu", True, "", [], "no"),
        ("cuda", True, "", [], "bf16"),
        ("cuda", False, "", [], "fp16"),
        ("cuda", True, "no", [], "bf16"),
        ("cuda", True, "fp16", [], "fp16"),
        ("cuda", True, "fp16", ["--mixed_precision", "no"], "no"),
        ("cpu", True, "bf16", [], "bf16"),
        ("mps", True, "", [], "no"),
    ],
)
def test_mixed_precision(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bf16: bool,
    launched: str,
    given: list[str],
    expected: str,
) -> None:
    machine(kind, bf16=bf16)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert mini(*given).mixed_precision == expected


def test_the_fp16_autoencoder_is_for_sdxl_base_in_fp16_only(machine: Machine) -> None:
    machine("cuda")
    icons = ["--dataset", "linoyts/3d_icon", "--mixed_precision"]
    assert parse([*icons, "fp16"]).pretrained_vae_model_name_or_path == FP16_FIX
    assert parse([*icons, "bf16"]).pretrained_vae_model_name_or_path is None
    assert mini("--mixed_precision", "fp16").pretrained_vae_model_name_or_path is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (500, None)),
        (["--num_train_epochs", "7"], (None, 7)),
        (["--max_train_steps", "9", "--num_train_epochs", "7"], (9, None)),
    ],
)
def test_steps_and_epochs(arguments: list[str], expected: tuple[int | None, int | None]) -> None:
    cfg = mini(*arguments)
    assert (cfg.max_train_steps, cfg.num_train_epochs) == expected


def test_booleans_take_a_value_too() -> None:
    prodigy = ["--optimizer", "Prodigy"]
    assert mini(*prodigy).prodigy_decouple
    assert not mini(*prodigy, "--prodigy_decouple", "False").prodigy_decouple
    assert not mini(*prodigy, "--no_prodigy_decouple").prodigy_decouple
    assert mini("--center_crop").center_crop
    assert not mini("--center_crop", "false").center_crop


def test_learning_rates() -> None:
    assert mini("--optimizer", "ADAMW").learning_rate == 2e-4
    prodigy = ["--optimizer", "prodigy"]
    assert mini(*prodigy).learning_rate == 1.0
    assert mini(*prodigy, "--learning_rate", "0.5").learning_rate == 0.5
    assert mini(*prodigy, "--train_text_encoder").text_encoder_lr == 1.0
    assert mini("--train_text_encoder").text_encoder_lr == 5e-6
    assert mini().text_encoder_lr is None


def test_scale_lr_counts_batch_accumulation_and_processes() -> None:
    """The auxiliary's rate keeps its ratio; that of text encoders stays, as in diffusers."""
    scaled = ["--scale_lr", "--train_text_encoder"]
    cfg = mini(*scaled, "--auxiliary_learning_rate", "1e-4").completed(3, side=64)
    assert cfg.learning_rate == pytest.approx(2e-4 * 4 * 3)
    assert cfg.auxiliary_learning_rate == pytest.approx(1e-4 * 4 * 3)
    assert cfg.text_encoder_lr == 5e-6
    assert mini(*scaled).completed(3, side=64).auxiliary_learning_rate is None
    assert mini().completed(3, side=64).learning_rate == 2e-4


def test_validation_prompts_from_a_list_and_a_file(tmp_path: Path) -> None:
    both = ["--validation_prompt", "one", "--validation_prompts", "two", "three"]
    assert mini(*both).validation_prompts == ["one", "two", "three"]
    (tmp_path / "prompts.txt").write_text("a lion\n\n  a frog \n")
    cfg = mini("--validation_prompts", str(tmp_path / "prompts.txt"))
    assert cfg.validation_prompts == ["a lion", "a frog"]
    long = "a TOK icon of a frog, " * 20  # longer than a file's name
    assert mini("--validation_prompts", long).validation_prompts == [long]


def test_local_folders_take_the_place_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mini" / "a.png")
    monkeypatch.chdir(tmp_path)
    model = ["--pretrained_model_name_or_path", "mini"]
    assert parse(["--dataset", "./mini", "--instance_prompt", "x", *model]).dataset_name == "./mini"
    folder = ["--instance_data_dir", "mini", *model]  # not the miniature
    with pytest.raises(UserError, match=r"no prompt: .*--instance_prompt.*\.txt"):
        parse(folder)
    (tmp_path / "mini" / "a.txt").write_text("a square")
    cfg = parse(folder)
    assert (cfg.instance_data_dir, cfg.dataset_name) == ("./mini", None)
    assert (cfg.instance_prompt, cfg.caption_column) == (None, None)


def test_the_default_tracker_needs_no_package(machine: Machine) -> None:
    assert mini().log_with == "tensorboard"
    machine("cpu", missing=frozenset({"tensorboard"}))
    assert (mini().report_to, mini().log_with) == ("none", None)


def test_the_record_is_json_without_the_token() -> None:
    cfg = mini("--push_to_hub", "--hub_token", "hf_secret")
    assert cfg.hub_token == "hf_secret"
    record = cfg.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert "hf_secret" not in json.dumps(record)
    assert set(record) == {f.name for f in dataclasses.fields(cfg)} - {"hub_token"}


def test_the_fingerprint_holds_what_is_learned_and_no_more() -> None:
    fingerprint = mini().fingerprint()
    harmless = ["--output_dir", "elsewhere", "--checkpointing_steps", "7", "--report_to", "none"]
    assert mini(*harmless, "--allow_tf32", "--cache_dir", "x").fingerprint() == fingerprint
    for change in (["--rho", "0.1"], ["--seed", "1"], ["--method", "lora"], ["--random_flip"]):
        assert mini(*change).fingerprint() != fingerprint
    with pytest.raises(dataclasses.FrozenInstanceError):
        mini().rank = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_help_groups_and_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for field in dataclasses.fields(DreamBoothConfig):
        assert f"  --{field.name}" in text
        assert field.metadata["option"].help
    for section in ("base model:", "training images:", "adapters and method:", "output:"):
        assert text.count(f"\n{section}\n") == 1


@pytest.mark.slow
def test_parsing_loads_nothing_heavy() -> None:
    code = (
        "import sys; from bilora_diffusion.image.config import parse; parse(['--dataset', 'mini']);"
        # not bitsandbytes: where it is installed, PEFT imports it
        "print(*{'diffusers', 'datasets', 'gradio'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_accelerate_on_the_cpu_is_the_cpu() -> None:
    code = (
        "import os; os.environ['ACCELERATE_USE_CPU'] = 'True'; import torch;"
        "torch.accelerator.current_accelerator = None;"
        f"from {machine_module.__name__} import device_type; print(device_type())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "cpu"
