"""Run folders as adapters, and an adapter's weights in a pipeline and out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.prompts import embed
from bilora_diffusion.image.sampling import generate
from eval.clip_scores.adapters import applied
from tests.export.mini_loras import one, rewrite, write_lora
from tests.scripts.runs import flags

PROMPT = "a ToK icon of a Owl, in the style of ToK"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("mini", dtype=torch.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of full fine-tuning, of two steps."""
    from accelerate.state import AcceleratorState

    from bilora_diffusion.image.script import main

    folder = tmp_path_factory.mktemp("runs") / "whole"
    AcceleratorState._reset_state()
    main(flags(folder, method="full"))
    return folder


@pytest.fixture(scope="module")
def files(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA files in the folders "unet" and "text" (both text encoders as well)."""
    root = tmp_path_factory.mktemp("files")
    write_lora(root / "unet", pipeline, kohya=True)
    every = ("unet", "text_encoder", "text_encoder_2")
    write_lora(root / "text", pipeline, size=1.0, components=every)
    return root


def picture(pipeline: Any) -> np.ndarray:
    """Its pixels as they come from the pipeline's text encoders and UNet, (64, 64, 3)."""
    (image,) = generate(pipeline, [PROMPT], [3], size=64, steps=2, guidance_scale=4.0)
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["unet", "text", "whole"])
def test_the_base_is_as_before_afterwards(
    name: str, pipeline: Any, files: Path, whole: Path
) -> None:
    adapter = one(whole if name == "whole" else files / name)
    own = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    state = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    image, text = picture(pipeline), embed(pipeline, [PROMPT])
    with applied(pipeline, adapter):
        assert not np.array_equal(picture(pipeline), image)
        inside = embed(pipeline, [PROMPT])
        assert torch.equal(inside.sequence, text.sequence) == (name != "text")
        assert not any(p.requires_grad for p in pipeline.unet.parameters())
        assert not pipeline.unet.training
    assert (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2) == own
    after = pipeline.unet.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert torch.equal(embed(pipeline, [PROMPT]).sequence, text.sequence)
    assert np.array_equal(picture(pipeline), image)


def test_the_adapter_acts_as_diffusers_loads_it(pipeline: Any, files: Path) -> None:
    other = load_pipeline("mini", dtype=torch.float32)
    other.load_lora_weights(str(files / "text"), weight_name="pytorch_lora_weights.safetensors")
    with applied(pipeline, one(files / "text")):
        assert np.array_equal(picture(pipeline), picture(other))


def test_full_fine_tuning_acts_as_its_unet(pipeline: Any, whole: Path) -> None:
    trained = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    with applied(pipeline, one(whole)):
        assert all(torch.equal(p, trained[k]) for k, p in pipeline.unet.named_parameters())


def test_the_scale_multiplies_the_adapter(pipeline: Any, files: Path, whole: Path) -> None:
    adapter, base = one(files / "unet"), picture(pipeline)
    with applied(pipeline, adapter, 0.0):
        assert np.array_equal(picture(pipeline), base)
    changes = []
    for scale in (0.05, 1.0):
        with applied(pipeline, adapter, scale):
            changes.append(np.abs(picture(pipeline) - base).mean())
    assert 0 < changes[0] < changes[1]
    with (
        pytest.raises(UserError, match="whole models, which have no scale"),
        applied(pipeline, one(whole), 0.5),
    ):
        pass


def test_kohyas_format_gives_the_same_images(pipeline: Any, files: Path) -> None:
    pictures = []
    for name in ("pytorch_lora_weights", "unet"):
        with applied(pipeline, one(files / "unet" / f"{name}.safetensors")):
            pictures.append(picture(pipeline))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_an_error_inside_passes_through_and_nothing_stays(pipeline: Any, files: Path) -> None:
    before = picture(pipeline)
    with pytest.raises(ZeroDivisionError), applied(pipeline, one(files / "text")):
        raise ZeroDivisionError
    assert np.array_equal(picture(pipeline), before)
    assert not any(pipeline.get_list_adapters().values())


def renamed(tensors: dict[str, Any], key: str) -> None:
    layer = key.partition("to_q")[0]
    for name in [name for name in tensors if name.startswith(f"{layer}to_q")]:
        tensors[name.replace("to_q", "to_z")] = tensors.pop(name)


MISFITS: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "another layer": (renamed, r"no layer for 1 of.*unet.*to_z"),
    "another width": (
        lambda t, key: t.update({key: torch.zeros(2, 640)}),
        r"bad.*(640|does not fit|can't be loaded)",
    ),
    "another model": (
        lambda t, key: t.update({key.replace("unet.", "transformer."): t.pop(key)}),
        "transformer",
    ),
    "an auxiliary": (
        lambda t, key: t.update({key.replace("lora_A", "lora_A.auxiliary"): t[key].clone()}),
        "more than one adapter.*auxiliary",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_file_that_does_not_fit_is_refused(
    kind: str, pipeline: Any, files: Path, tmp_path: Path
) -> None:
    change, message = MISFITS[kind]
    source = files / "unet" / "pytorch_lora_weights.safetensors"
    key = next(key for key in load_file(source) if "to_q.lora_A" in key)
    bad = rewrite(source, tmp_path / "bad.safetensors", lambda t, _: change(t, key))
    with pytest.raises(UserError, match=message), applied(pipeline, one(bad)):
        pass
    assert not any(pipeline.get_list_adapters().values())
