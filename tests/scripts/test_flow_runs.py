"""Flow-matching models through the script, on tiny random weights: each method, resume, engines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.image import task
from bilora_diffusion.image.flow import FlowMatching
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.run import runlog
from tests.image.tiny import FILES, saved
from tests.scripts.runs import (
    SCRIPT,
    TORCHRUN,
    column,
    difference,
    flags,
    process,
    resumes_exactly,
    train,
    two_icons,
    weights,
)

SD3 = "StableDiffusion3Pipeline"
SHARED: dict[str, Any] = {"resolution": 64, "train_batch_size": 2}
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != SD3)) for kind in FILES]
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of each kind's tiny pipeline, made when it is first asked for."""
    root = tmp_path_factory.mktemp("bases")

    def folder(kind: str) -> Path:
        found = root / kind
        return found if found.exists() else saved(kind, found)

    return folder


@each_kind
def test_methods_see_the_same_and_resume_exactly(kind: str, bases: Any, tmp_path: Path) -> None:
    shared = {**SHARED, "pretrained_model_name_or_path": bases(kind), "checkpointing_steps": 1}
    folders = [train(tmp_path / m, method=m, **shared) for m in ("lora", "bilora", "lora-sam")]
    assert len({tuple(column(folder, "digest")) for folder in folders}) == 1
    first = {column(folder, "loss")[0] for folder in folders}
    assert max(first) - min(first) < 1e-6
    resumes_exactly(folders[1], 1, method="bilora", **shared)


@each_kind
def test_a_run_measures_draws_and_leaves_what_its_pipeline_loads(
    kind: str, bases: Any, tmp_path: Path
) -> None:
    folder = train(
        tmp_path / "run",
        **SHARED,
        pretrained_model_name_or_path=bases(kind),
        learning_rate=3e-2,
        validation_dataset="mini-heldout",
        validation_part="1/32",
        validation_prompt="a TOK icon of a rabbit",
        num_validation_images=1,
        validation_loss_steps=1,
    )
    rows = [row for row in runlog.read_metrics(folder) if "heldout_loss" in row]
    levels = [int(name.rpartition("/")[2]) for name in rows[0] if "by_level/" in name]
    assert len(levels) == 10
    assert levels == sorted(levels, reverse=True)
    assert 0 < levels[-1] < levels[0] <= 1000
    assert all(math.isfinite(row["heldout_loss"]) for row in rows)
    assert len({row["heldout_loss"] for row in rows}) == 3
    assert len(list(folder.glob("validation/*/*.png"))) == 1
    assert all(name.startswith("transformer.") for name in weights(folder))
    pipeline = load_pipeline(str(bases(kind)), dtype=torch.float32)
    if not hasattr(pipeline, "load_lora_weights"):
        return
    before = generate(pipeline, ["a TOK icon"], [0], size=64, steps=2)[0].tobytes()
    pipeline.load_lora_weights(str(folder))
    assert generate(pipeline, ["a TOK icon"], [0], size=64, steps=2)[0].tobytes() != before


@each_kind
def test_masks_and_a_kept_class_are_learned_by(kind: str, bases: Any, tmp_path: Path) -> None:
    icons = two_icons(tmp_path / "icons")
    shared = {**SHARED, **icons, "validation_dataset": "none", "learning_rate": 3e-2}
    shared |= {"pretrained_model_name_or_path": bases(kind), "class_prompt": "an icon"}
    plain = column(train(tmp_path / "plain", **shared), "loss")
    kept = column(train(tmp_path / "kept", **shared, prior_prediction_weight=1.0), "loss")
    assert kept[0] == pytest.approx(plain[0], rel=1e-5)  # the adapters change nothing yet
    assert kept[1] > plain[1]
    for picture in Path(icons["dataset"]).glob("*.png"):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(picture.with_suffix(".mask.png"))
    hidden = column(train(tmp_path / "hidden", **shared), "loss")
    assert hidden[0] != plain[0]
    assert hidden[0] == pytest.approx(plain[0], rel=0.5)


def test_the_noise_levels_in_the_log_are_those_that_were_drawn(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], FlowMatching.draw

    def drawing(self: FlowMatching, random: torch.Generator) -> torch.Tensor:
        index = draw(self, random)
        drawn.append(1000 * self.sigmas[index].item())
        return index

    monkeypatch.setattr(FlowMatching, "draw", drawing)
    shared = {**SHARED, "pretrained_model_name_or_path": bases(SD3), "max_train_steps": 3}
    whole = train(tmp_path / "whole", **shared)
    cut = train(
        tmp_path / "cut", **{**shared, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    )
    steps = [drawn[i : i + 2] for i in range(0, 6, 2)]
    assert len(drawn) == 12
    for name, of in {"mean": lambda pair: sum(pair) / 2, "min": min, "max": max}.items():
        logged = column(whole, f"noise_level_{name}")
        assert logged == pytest.approx([of(pair) for pair in steps], rel=1e-6)
        assert logged == column(cut, f"noise_level_{name}")


def test_images_are_drawn_as_the_command_line_says(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(task, "generate", lambda *_, **told: calls.append(told) or [])
    shared = {**SHARED, "pretrained_model_name_or_path": bases(SD3), "num_validation_images": 1}
    final = {**shared, "final_validation_prompt": "a TOK icon"}
    train(tmp_path / "usual", **final)
    given = {"validation_guidance_scale": 2.0, "validation_num_inference_steps": 3}
    train(tmp_path / "given", **final, **given)
    train(tmp_path / "skipped", **final, skip_final_inference=True)
    told = [(call["steps"], call["guidance_scale"]) for call in calls]
    assert told == [(None, None), (3, 2.0)]


def test_that_comfyui_leaves_out_magnitudes_is_a_line_and_in_the_card(
    bases: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = {**SHARED, "pretrained_model_name_or_path": bases(SD3), "use_dora": True}
    folder = train(tmp_path / "run", **shared, max_train_steps=1)
    for text in (caplog.text, (folder / "README.md").read_text(encoding="utf-8")):
        assert "magnitudes" in text
        assert "use_dora" in text


def test_a_guidance_that_no_model_is_told_is_a_line_and_no_part_of_the_record(
    bases: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind, told in ((SD3, None), ("FluxPipeline", 2.0)):
        caplog.clear()
        shared = {**SHARED, "pretrained_model_name_or_path": bases(kind), "guidance_scale": 2.0}
        folder = train(tmp_path / kind, **shared, max_train_steps=1)
        assert ("no embedding of guidance" in caplog.text) == (told is None)
        assert runlog.read_run(folder)["config"]["guidance_scale"] == told


@pytest.mark.slow
def test_an_autoencoder_at_rest_on_the_cpu_changes_nothing(bases: Any, tmp_path: Path) -> None:
    shared = {**SHARED, "pretrained_model_name_or_path": bases(SD3), "cache_latents": "no"}
    one, two = (train(tmp_path / str(o), **shared, offload=o) for o in (False, True))
    assert column(one, "loss") == column(two, "loss")
    assert difference(one, two) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_four_bits_and_two_processes(kind: str, bases: Any, tmp_path: Path) -> None:
    shared = {**SHARED, "pretrained_model_name_or_path": bases(kind)}
    folder = train(tmp_path / "nf4", **shared, quantize="nf4", checkpointing_steps=1)
    resumes_exactly(folder, 1, **shared, quantize="nf4", checkpointing_steps=1)
    assert all(math.isfinite(loss) for loss in column(folder, "loss"))
    assert max(value.abs().max() for value in weights(folder).values()) > 0
    one = train(tmp_path / "one", **shared)
    two = tmp_path / "two"
    argv = flags(two, **{**shared, "train_batch_size": 1})
    done = process(*TORCHRUN, 2, SCRIPT, *argv, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert column(one, "digest") == column(two, "digest")
    assert column(one, "loss") == pytest.approx(column(two, "loss"), abs=1e-5)
    assert difference(one, two) < 1e-5


def damaged(folder: Path, **values: Any) -> Path:
    """A pipeline's folder whose ``model_index.json`` says something else."""
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"resolution": 72}, r"72.*64"),
        ({"resolution": 512}, r"512.*positions.*192"),
        ({"train_text_encoder": True}, "train_text_encoder.*StableDiffusion3Pipeline"),
        ({"snr_gamma": 5}, "snr_gamma.*weighting_scheme"),
        ({"do_edm_style_training": True}, "do_edm_style_training"),
        ({"weighting_scheme": "cosine"}, "weighting_scheme.*cosmap"),
        ({"mode_scale": 3}, "mode_scale.*1.75"),
        ({"logit_std": 0}, "logit_std"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"lora_layers": "to_k,to_qq"}, 'lora_layers "to_qq".*did you mean "to_q"'),
        ({"lora_layers": "convolutions"}, "lora_layers convolutions.*all-linear"),
        ({"output_kohya_format": True}, "output_kohya_format.*ComfyUI"),
    ],
    ids=str,
)
def test_what_the_model_can_not_take_is_a_sentence(
    values: dict[str, Any], said: str, bases: Any, tmp_path: Path
) -> None:
    shared = {**SHARED, "pretrained_model_name_or_path": bases(SD3)}
    with pytest.raises(UserError, match=f"(?s){said}"):
        train(tmp_path / "run", **{**shared, **values})


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"_class_name": "PixArtSigmaPipeline"}, "PixArtSigmaPipeline.*FluxPipeline"),
        ({"_class_name": "StableDiffusion3Pipelin"}, "did you mean.*StableDiffusion3Pipeline"),
    ],
    ids=str,
)
def test_an_unknown_pipeline_is_told_the_known_ones(
    index: dict[str, str], said: str, tmp_path: Path
) -> None:
    folder = damaged(saved(SD3, tmp_path / "base"), **index)
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", **SHARED, pretrained_model_name_or_path=folder)
