"""Runs with LoRA files: an assistant that is active only in training, and a start from a file."""

import re
import shutil

import pytest
import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import hash_of_file
from bilora_diffusion.core.lora_names import FILE_NAME, WEIGHTS
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.reader import compare, read
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.run import checkpoint, runlog
from bilora_diffusion.train.variants import control_folder
from tests.export.export_models import rewrite, write_lora
from tests.scripts.runs import (
    assert_same_run,
    column,
    resumed,
    resumes_exactly,
    train,
    train_once,
    two_icons,
)
from tests.text.text_builders import material, train_text

SHARED = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write a LoRA of rank 2 and alpha 4 for queries and values of the miniature's UNet."""
    pipeline = load_pipeline("mini", dtype=torch.float32)
    return write_lora(tmp_path_factory.mktemp("style"), pipeline, size=0.5)


def test_an_assistant_is_recorded_and_neither_exported_nor_trained(file, tmp_path):
    options = {"max_train_steps": 1, "checkpointing_steps": 1, "train_batch_size": 1}
    run = train(tmp_path / "run", assistant_lora=f"{file}:0.7", **options)
    sha256 = hash_of_file(file)
    recorded = {"assistant_lora_sha256": sha256, "assistant_lora_strength": 0.7}
    assert recorded.items() <= runlog.read_run(run)["config"].items()
    saved = checkpoint.load(run / "checkpoints" / "step-1")
    assert recorded.items() <= saved.extra["config"].items()
    assert inspect(run / FILE_NAME).metadata["bilora.assistant_lora_sha256"] == sha256
    card = (run / "README.md").read_text()
    assert sha256 in card
    assert "do not include it" in card
    assert {key.split("/")[1] for key in saved.tensors} == {"default", "auxiliary"}

    # The file has the primary's s B A for each trained layer, and nothing else.
    layers = []
    (part,) = read(run / FILE_NAME).parts.values()
    for layer in part.layers:
        prefix = f"unet/default/{layer.name}"
        B = saved.tensors[f"{prefix}.lora_B.weight"].double() * 2
        layers.append(layer._replace(A=saved.tensors[f"{prefix}.lora_A.weight"], B=B))
    assert len(layers) == 56
    assert compare(run / FILE_NAME, {"unet": layers})["max_relative_difference"] < 1e-6


@pytest.mark.slow
def test_an_assistant_of_strength_0_changes_nothing(file, tmp_path):
    plain = train_once("plain-steps", **SHARED)
    run = train(tmp_path / "run", assistant_lora=f"{file}:0", **SHARED)
    assert_same_run(plain, run, "grad_norm", "auxiliary_norm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"quantize": "nf4", "method": "lora-sam", "guided_target": 2},
        {"use_dora": True, "hold_unconditional": 1, "hold_unconditional_every": 3},
    ],
    ids=str,
)
def test_a_run_with_an_assistant_resumes_exactly(file, tmp_path, options):
    options = {**SHARED, "assistant_lora": f"{file}:-0.5", **options}
    run = train(tmp_path / "run", **options)
    # The file may be moved: only its content counts.
    moved = shutil.copy(file, tmp_path / "moved.safetensors")
    resumes_exactly(run, 2, **{**options, "assistant_lora": f"{moved}:-0.5"})


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_file_or_strength(file, tmp_path):
    options = {**SHARED, "init_from": file, "rank": 2, "lora_alpha": 4, "lora_layers": "to_q,to_v"}
    options["assistant_lora"] = file
    run = train(tmp_path / "run", **options)

    def change(tensors, _):
        next(iter(tensors.values())).mul_(1.01)

    changed_file = rewrite(file, tmp_path / "changed.safetensors", change)
    for changes, words in (
        ({"assistant_lora": changed_file}, "assistant_lora_sha256"),
        ({"assistant_lora": f"{file}:0.5"}, "assistant_lora_strength was 1.0 and is 0.5"),
        ({"assistant_lora": None}, "assistant_lora_sha256"),
        ({"init_from": changed_file}, "init_from_sha256"),
    ):
        with pytest.raises(UserError, match=words):
            resumed(run, 2, **{**options, **changes})
        shutil.rmtree(tmp_path / "run-parts")


@pytest.mark.slow
def test_runs_start_at_the_loss_of_a_file_with_and_without_an_assistant(file, tmp_path, caplog):
    """The held-out loss before the first step is that of the file applied once or twice."""
    shape = {"rank": 2, "lora_alpha": 4, "lora_layers": "to_q,to_v"}
    options = {**two_icons(tmp_path / "icons"), **shape, "max_train_steps": 1}
    measured = {}
    runs = {
        "base": {},
        "started": {"init_from": file},
        "assisted": {"assistant_lora": file},
        "both": {"init_from": file, "assistant_lora": file},
        "twice": {"assistant_lora": f"{file}:2"},
    }
    for name, values in runs.items():
        run = train(tmp_path / name, **options, **values)
        measured[name] = column(run, "heldout_loss")[0]
    assert measured["started"] == pytest.approx(measured["assisted"], rel=1e-4)
    assert measured["both"] == pytest.approx(measured["twice"], rel=1e-4)
    assert len({round(value, 4) for value in measured.values()}) == 3
    assert "effect these weights include" in (tmp_path / "started" / "README.md").read_text()


@pytest.mark.matrix
@pytest.mark.slow
def test_both_runs_of_a_comparison_start_from_the_file_with_the_assistant(file, tmp_path):
    options = {
        **two_icons(tmp_path / "icons"),
        "init_from": file,
        "assistant_lora": f"{file}:0.5",
        "rank": 2,
        "lora_alpha": 4,
        "lora_layers": "to_q,to_v",
    }
    run = train(tmp_path / "run", **options, compare="lora")
    control = control_folder(run, "lora")
    assert column(run, "heldout_loss")[0] == column(control, "heldout_loss")[0]
    # The auxiliary starts at 0, so the losses of the first step differ only by rounding.
    assert column(run, "loss")[0] == pytest.approx(column(control, "loss")[0], rel=1e-5)
    assert_same_run(control, train(tmp_path / "own", **options, method="lora"), "grad_norm")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_layers": "to_q,to_v"}, "--rank 2 --lora_alpha 4"),
        ({"rank": 2}, "lora_layers"),
        ({"rank": 2, "lora_layers": "to_q,to_v", "use_dora": True}, "drop --use_dora"),
        ({"rank": 2, "lora_layers": "to_q", "lora_alpha": 4}, "would be lost"),
        ({"init_lora_weights": "pissa"}, "both set the initial values of the primary"),
        ({"method": "full"}, "no adapter that could start"),
    ],
    ids=str,
)
def test_a_start_from_a_file_that_does_not_fit_the_options_is_refused(
    file, values, words, tmp_path
):
    with pytest.raises(UserError, match=words):
        train(tmp_path / "run", init_from=file, **values)
    assert not (tmp_path / "run").exists()


def test_the_memory_of_an_assistant_is_counted(file, capsys, tmp_path):
    train(tmp_path / "run", assistant_lora=file, dry_run=True)
    assert re.search(r"kB  adapters: assistant, frozen", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq2seq", "classification"])
def test_a_text_run_starts_where_another_ended(kind, tmp_path):
    flags = {**material(kind), "rank": 4, "lora_alpha": 8, "max_train_steps": 2}
    flags |= {"learning_rate": 1e-2, "validation_file": flags["train_file"]}
    first = train_text(tmp_path / "first", **flags, method="lora")
    second = train_text(tmp_path / "second", **flags, init_from=first)
    ended, started = column(first, "heldout_loss"), column(second, "heldout_loss")
    assert started[0] == pytest.approx(ended[-1], rel=1e-5)
    assert started[0] != pytest.approx(ended[0], rel=1e-3)
    assert inspect(second / WEIGHTS).metadata["bilora.init_from_sha256"] == hash_of_file(
        first / WEIGHTS
    )
    with pytest.raises(UserError, match="--rank 4 --lora_alpha 8"):
        train_text(tmp_path / "third", **{**flags, "rank": 8}, init_from=first)
