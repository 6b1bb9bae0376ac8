"""What a scorer refuses, and in which words."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import pipeline_dir
from eval.scores import scorers
from tests.eval.clip_models import (
    make_hf_clip,
    pictures,
    put_on_hub,
    save_hf_clip,
    save_open_clip,
    to_open_clip,
)

OURS = "open_clip_model.safetensors"
THEIRS = "model.safetensors"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return save_open_clip(tmp_path / "ours", to_open_clip(make_hf_clip()), quick_gelu=True)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return save_hf_clip(tmp_path / "theirs", make_hf_clip())


def refused(name: str, message: str, **options: str | int) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        scorers.load(name, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opneclip:ViT-B-32/openai", '"opneclip:ViT-B-32/openai" is unknown (did you mean "open_c'),
        ("embeded", 'scorer "embeded" is unknown (did you mean "embedded"?): give embedded, open_'),
        ("embedded:x", 'scorer "embedded:x" is unknown'),
        ("open_clip", 'scorer "open_clip" is unknown: give embedded, open_clip:MODEL/TAG,'),
        ("open_clip:", 'open_clip has no model "" and there is no such folder'),
        ("open_clip:ViT-B-33/openai", 'no model "ViT-B-33" (did you mean "ViT-B-32"?)'),
        ("open_clip:ViT-B-32/opnai", 'ViT-B-32 has no tag "opnai" (did you mean "openai"?)'),
        ("open_clip:ViT-B-32/opnai", "give one of its tags (openai, laion400m_e31,"),
        ("open_clip:ViT-B-32", "names no weights: add one of its tags (openai,"),
        ("open_clip:coca_base/x", 'has no tag "x" and there is no such file: give a safetensors f'),
        ("open_clip:./nowhere", '"open_clip:./nowhere": there is no such folder: correct the path'),
        ("hf:./nowhere", '"hf:./nowhere": there is no such folder: correct the path'),
        ("hf:", '"hf:": there is no such folder'),
        ("hf:tests/absent", '"hf:tests/absent" cannot be loaded ('),
        (f"hf:{pipeline_dir()}/text_encoder", "is a model of type 'clip_text_model', not 'clip'"),
        (f"hf:{pipeline_dir()}/model_index.json", "is a file: give the folder that holds it"),
    ],
)
def test_names(name: str, message: str) -> None:
    refused(name, message)


def test_options(ours: Path, theirs: Path) -> None:
    refused(f"open_clip:{ours}", "a batch of 0 holds nothing: give 1 or more", batch=0)
    refused(f"open_clip:{ours}", 'revision "v1" has no effect on "open_clip:', revision="v1")
    refused("embedded", 'revision "v1" has no effect on "embedded": drop it', revision="v1")
    refused(f"hf:{theirs}", 'revision "v1" has no effect on the folder of', revision="v1")


class Boom:
    """Running this is what reading a pickle can do."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("exploded"), "x"))


def test_pickles_are_not_read(
    ours: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, scheme, weights in ((ours, "open_clip", OURS), (theirs, "hf", THEIRS)):
        (folder / weights).unlink()
        bad = folder / ("pytorch_model.bin" if scheme == "hf" else "open_clip_pytorch_model.bin")
        bad.write_bytes(pickle.dumps(Boom()))
        message = f"the folder has no {weights}, and {bad.name} is a pickle, which can run code"
        refused(f"{scheme}:{folder}", message)
        refused(f"open_clip:ViT-B-32/{bad}", f"{bad.name} may be a pickle, which can run code")
    assert not Path("exploded").exists()


def test_a_hub_id_without_safetensors_is_refused(theirs: Path) -> None:
    state = load_file(theirs / THEIRS)
    (theirs / THEIRS).unlink()
    torch.save(state, theirs / "pytorch_model.bin")  # sound, and still not read
    put_on_hub("tests/pickled", theirs, "e" * 40)
    refused("hf:tests/pickled", '"hf:tests/pickled" cannot be loaded (')


def test_a_pickle_beside_the_weights_is_left_alone(ours: Path) -> None:
    expected = scorers.load(f"open_clip:{ours}").images(pictures(2))
    (ours / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    (ours / OURS).rename(ours / "open_clip_pytorch_model.safetensors")
    assert torch.equal(scorers.load(f"open_clip:{ours}").images(pictures(2)), expected)


@pytest.mark.parametrize(
    ("scheme", "file", "message"),
    [
        ("open_clip", "open_clip_config.json", "the folder has no open_clip_config.json: give one"),
        ("open_clip", OURS, f"the folder has no {OURS}: give a folder with config and weights"),
        ("open_clip", "tokenizer.json", '" knows no words: put its files beside'),
        ("hf", "config.json", "the folder has no config.json: give one that save_pretrained made"),
        ("hf", THEIRS, f"the folder has no {THEIRS}: give a folder with config and weights"),
        ("hf", "tokenizer.json", '" knows no words: put its files beside the weights'),
        ("hf", "processor_config.json", "cannot be loaded ("),
    ],
)
def test_missing_files(ours: Path, theirs: Path, scheme: str, file: str, message: str) -> None:
    folder = ours if scheme == "open_clip" else theirs
    (folder / file).unlink()
    refused(f"{scheme}:{folder}", message)


@pytest.mark.parametrize("scheme", ["open_clip", "hf"])
def test_weights_that_are_cut_do_not_fit_or_are_not_finite(
    ours: Path, theirs: Path, scheme: str
) -> None:
    folder, name = (ours, OURS) if scheme == "open_clip" else (theirs, THEIRS)
    path = folder / name
    whole = load_file(path)
    key = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != key}, path, {"format": "pt"})
    refused(f"{scheme}:{folder}", "incomplete (" if scheme == "hf" else "cannot be loaded as a")
    save_file(whole | {key: torch.zeros(3, 5)}, path, {"format": "pt"})
    refused(f"{scheme}:{folder}", "cannot be loaded")
    save_file({k: v * torch.nan for k, v in whole.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="gives embeddings that are not finite: its weights are"):
        scorers.load(f"{scheme}:{folder}").images(pictures(1))
    path.write_bytes(path.read_bytes()[:500])
    refused(f"{scheme}:{folder}", "cannot be loaded")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model_cfg": {"embed_dim": 8}}'])
def test_a_configuration_that_is_no_clip(ours: Path, content: str) -> None:
    (ours / "open_clip_config.json").write_text(content)
    refused(f"open_clip:{ours}", "cannot be loaded as a CLIP of open_clip (")


@pytest.mark.parametrize("content", ["[]", json.dumps({"model_type": "siglip"})])
def test_a_model_of_transformers_that_is_no_clip(theirs: Path, content: str) -> None:
    (theirs / "config.json").write_text(content)
    refused(f"hf:{theirs}", "not 'clip': give another")


def test_a_folder_of_the_other_kind(ours: Path, theirs: Path, tmp_path: Path) -> None:
    refused(f"open_clip:{theirs}", "or hf:FOLDER for a CLIP of transformers")
    refused(f"hf:{ours}", "the folder has no config.json")
    shutil.rmtree(ours)
    ours.mkdir()
    refused(f"open_clip:{ours}", "the folder has no open_clip_config.json")
