"""The command line: the reference's flags, presets, recipes, and which value wins."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision.transforms import InterpolationMode

from bilora_diffusion.config import DreamBoothConfig, parse
from bilora_diffusion.config import resolve as resolve_module
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.inputs import INTERPOLATIONS, SDXL_BASE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    """Makes the machine look as if it trained on another kind of device."""

    def pretend(kind: str, *, bf16: bool = True) -> None:
        monkeypatch.setattr(resolve_module, "device_type", lambda: kind)
        monkeypatch.setattr("bilora_diffusion.config.environment.device_type", lambda: kind)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: bf16)

    pretend("cpu")
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return pretend


def test_interpolations_are_those_that_images_knows() -> None:
    assert set(INTERPOLATIONS) == {mode.value.replace("-", "_") for mode in InterpolationMode}


def test_defaults_are_table_a8(device) -> None:
    cfg = parse(["--dataset", "linoyts/3d_icon"])
    assert (cfg.learning_rate, cfg.train_batch_size, cfg.gradient_accumulation_steps) == (
        2e-4,
        1,
        4,
    )
    assert (cfg.max_train_steps, cfg.num_train_epochs) == (500, None)
    assert (cfg.lr_scheduler, cfg.lr_warmup_steps, cfg.validation_epochs) == ("constant", 0, 25)
    assert (cfg.rank, cfg.lora_alpha, cfg.lora_dropout, cfg.rho) == (4, 8, 0.0, 0.05)
    assert (cfg.method, cfg.init_lora_weights, cfg.rho_norm) == ("bilora", "default", "scaled")
    assert (cfg.pretrained_model_name_or_path, cfg.resolution) == (SDXL_BASE, 1024)
    assert cfg.instance_prompt == "a TOK icon, in the style of TOK"
    assert cfg.caption_column is None
    assert cfg.validation_prompts[0] == "a TOK icon of a rabbit, in the style of TOK"
    assert len(cfg.validation_prompts) == 6
    assert cfg.seed == 0


def test_kohyas_file_is_written_unless_told_otherwise() -> None:
    def wanted(*arguments: str) -> bool:
        return parse(["--dataset", "mini", *arguments]).output_kohya_format

    assert wanted()
    assert wanted("--output_kohya_format")  # as in diffusers' script
    assert not wanted("--no_output_kohya_format")
    assert not wanted("--method", "full")  # which leaves whole models


def test_dora_beside_kohyas_file_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    parse(["--dataset", "mini", "--use_dora"])
    assert [line for line in caplog.messages if "0.3.30" in line and "A1111" in line]
    caplog.clear()
    parse(["--dataset", "mini", "--use_dora", "--no_output_kohya_format"])
    assert not [line for line in caplog.messages if "A1111" in line]


def test_mini_alone_is_enough(device) -> None:
    cfg = parse(["--dataset", "mini"])
    assert cfg.pretrained_model_name_or_path == "mini"
    assert (cfg.resolution, cfg.caption_column) == (64, "prompt")
    assert cfg.validation_dataset == "mini-heldout"
    assert cfg.gradient_checkpointing is False
    assert parse(["--dataset_name=mini"]) == parse(["--dataset-name", "mini"]) == cfg


def test_what_is_given_wins_over_a_preset() -> None:
    data = ["--dataset", "mini", "--instance_prompt", "an icon", "--resolution", "128"]
    validation = ["--validation_dataset", "none", "--validation_prompt", "a lion"]
    cfg = parse([*data, *validation])
    assert (cfg.instance_prompt, cfg.caption_column) == ("an icon", None)
    assert cfg.validation_dataset is None
    assert (cfg.validation_prompts, cfg.num_validation_images) == (["a lion"], 4)
    assert cfg.resolution == 128


def test_a_hub_model_decides_its_resolution_later(device) -> None:
    device("cuda")
    cfg = parse(["--dataset", "mini", "--pretrained_model_name_or_path", "some/sdxl"])
    assert (cfg.resolution, cfg.gradient_checkpointing) == (None, None)
    completed = cfg.for_pipeline(1024)
    assert (completed.resolution, completed.gradient_checkpointing) == (1024, True)
    assert completed.for_pipeline(64) == completed


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("cuda", ["--resolution", "512"], True),
        ("cuda", ["--resolution", "504"], False),
        ("cpu", ["--resolution", "512"], False),
        ("cuda", ["--resolution", "512", "--gradient_checkpointing", "False"], False),
        ("cpu", ["--resolution", "64", "--gradient_checkpointing"], True),
    ],
)
def test_gradient_checkpointing(device, kind: str, arguments: list[str], expected: bool) -> None:
    device(kind)
    assert parse(["--dataset", "mini", *arguments]).gradient_checkpointing is expected


@pytest.mark.parametrize(
    ("kind", "bf16", "launched", "given", "expected"),
    [
        ("cpu", True, None, None, "no"),
        ("cuda", True, None, None, "bf16"),
        ("cuda", False, None, None, "fp16"),
        ("cuda", True, "no", None, "bf16"),
        ("cuda", True, "fp16", None, "fp16"),
        ("cuda", True, "fp16", "no", "no"),
        ("cpu", True, "bf16", None, "bf16"),
        ("mps", True, None, None, "no"),
    ],
)
def test_mixed_precision(
    device,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bf16: bool,
    launched: str | None,
    given: str | None,
    expected: str,
) -> None:
    device(kind, bf16=bf16)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    arguments = ["--mixed_precision", given] if given else []
    assert parse(["--dataset", "mini", *arguments]).mixed_precision == expected


def test_accelerate_on_the_cpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: pytest.fail("asked"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert resolve_module.device_type() == "cpu"


def test_the_fp16_autoencoder_is_for_sdxl_base_in_fp16_only(device) -> None:
    device("cuda")
    icons = ["--dataset", "linoyts/3d_icon", "--mixed_precision"]
    assert parse([*icons, "fp16"]).pretrained_vae_model_name_or_path == resolve_module.FP16_FIX
    assert parse([*icons, "bf16"]).pretrained_vae_model_name_or_path is None
    mini = parse(["--dataset", "mini", "--mixed_precision", "fp16"])
    assert mini.pretrained_vae_model_name_or_path is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (500, None)),
        (["--num_train_epochs", "7"], (None, 7)),
        (["--max_train_steps", "9"], (9, None)),
        (["--max_train_steps", "9", "--num_train_epochs", "7"], (9, None)),
    ],
)
def test_steps_and_epochs(arguments: list[str], expected: tuple[int | None, int | None]) -> None:
    cfg = parse(["--dataset", "mini", *arguments])
    assert (cfg.max_train_steps, cfg.num_train_epochs) == expected


def test_booleans_take_a_value_too() -> None:
    prodigy = ["--dataset", "mini", "--optimizer", "Prodigy"]
    assert parse(prodigy).prodigy_decouple is True
    assert parse([*prodigy, "--prodigy_decouple", "False"]).prodigy_decouple is False
    assert parse([*prodigy, "--no_prodigy_decouple"]).prodigy_decouple is False
    assert parse(["--dataset", "mini", "--center_crop"]).center_crop is True
    assert parse(["--dataset", "mini", "--center_crop", "false"]).center_crop is False


def test_learning_rates() -> None:
    assert parse(["--dataset", "mini", "--optimizer", "ADAMW"]).learning_rate == 2e-4
    prodigy = ["--dataset", "mini", "--optimizer", "prodigy"]
    assert parse(prodigy).learning_rate == 1.0
    assert parse([*prodigy, "--learning_rate", "0.5"]).learning_rate == 0.5
    assert parse([*prodigy, "--train_text_encoder"]).text_encoder_lr == 1.0
    assert parse(["--dataset", "mini", "--train_text_encoder"]).text_encoder_lr == 5e-6
    assert parse(["--dataset", "mini"]).text_encoder_lr is None


def test_scale_lr_counts_batch_accumulation_and_processes() -> None:
    cfg = parse(["--dataset", "mini", "--train_batch_size", "2", "--scale_lr"])
    assert cfg.for_processes(3).learning_rate == pytest.approx(2e-4 * 2 * 3)
    plain = parse(["--dataset", "mini"])
    assert plain.for_processes(3) is plain


def test_scale_lr_keeps_the_ratio_of_the_auxiliary_rate() -> None:
    scaled = ["--dataset", "mini", "--scale_lr", "--train_text_encoder"]
    cfg = parse([*scaled, "--auxiliary_learning_rate", "1e-4"]).for_processes(3)
    assert cfg.learning_rate == pytest.approx(2e-4 * 4 * 3)
    assert cfg.auxiliary_learning_rate == pytest.approx(1e-4 * 4 * 3)
    assert cfg.text_encoder_lr == 5e-6  # as in diffusers' script
    assert parse(scaled).for_processes(3).auxiliary_learning_rate is None


def test_validation_prompts_from_a_list_and_a_file(tmp_path: Path) -> None:
    both = ["--validation_prompt", "one", "--validation_prompts", "two", "three"]
    assert parse(["--dataset", "mini", *both]).validation_prompts == ["one", "two", "three"]
    (tmp_path / "prompts.txt").write_text("a lion\n\n  a frog \n")
    cfg = parse(["--dataset", "mini", "--validation_prompts", str(tmp_path / "prompts.txt")])
    assert cfg.validation_prompts == ["a lion", "a frog"]


def test_local_folders_take_the_place_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    model = ["--pretrained_model_name_or_path", "mini", "--instance_prompt", "TOK"]
    assert parse(["--dataset", str(tmp_path), *model]).dataset_name == str(tmp_path)
    cfg = parse(["--instance_data_dir", str(tmp_path), *model])
    assert (cfg.instance_data_dir, cfg.dataset_name) == (str(tmp_path), None)


def test_a_folder_called_mini_is_not_the_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    arguments = ["--pretrained_model_name_or_path", "mini", "--instance_prompt", "TOK"]
    cfg = parse(["--instance_data_dir", "mini", *arguments])
    assert cfg.instance_data_dir == "./mini"


def test_the_default_tracker_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_module, "is_installed", lambda name: name != "tensorboard")
    cfg = parse(["--dataset", "mini"])
    assert (cfg.report_to, cfg.log_with) == ("none", None)
    monkeypatch.setattr(resolve_module, "is_installed", lambda name: True)
    assert parse(["--dataset", "mini"]).log_with == "tensorboard"


def test_the_record_is_json_without_the_token(tmp_path: Path) -> None:
    cfg = parse(["--dataset", "mini", "--push_to_hub", "--hub_token", "hf_secret"])
    assert cfg.hub_token == "hf_secret"
    record = cfg.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert "hf_secret" not in json.dumps(record)
    assert set(record) == {f.name for f in dataclasses.fields(cfg)} - {"hub_token"}


def test_the_fingerprint_holds_what_is_learned_and_no_more() -> None:
    cfg = parse(["--dataset", "mini"])
    harmless = ["--output_dir", "elsewhere", "--checkpointing_steps", "7", "--report_to", "none"]
    assert parse(["--dataset", "mini", *harmless]).fingerprint() == cfg.fingerprint()
    for change in (["--rho", "0.1"], ["--seed", "1"], ["--method", "lora"], ["--random_flip"]):
        assert parse(["--dataset", "mini", *change]).fingerprint() != cfg.fingerprint()


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(["--dataset", "mini"]).rank = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_help_groups_and_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for field in dataclasses.fields(DreamBoothConfig):
        assert f"  --{field.name}" in text
        assert field.metadata["help"]
    for group in ("base model:", "training images:", "adapters and method:", "output:"):
        assert f"\n{group}\n" in text


def test_parsing_loads_nothing_heavy() -> None:
    code = (
        "import sys; from bilora_diffusion.config import parse; parse(['--dataset', 'mini']);"
        # not bitsandbytes: where it is installed, PEFT imports it
        "print(*{'diffusers', 'datasets', 'gradio'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_a_launcher_that_says_fp8_is_refused(device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8"):
        parse(["--dataset", "mini"])
