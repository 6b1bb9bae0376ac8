"""Scorers against computations of their own: the same small weights, run another way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.mini import scorer as mini
from eval.clip_scores import scorers
from eval.clip_scores.models import ModelEntry, digest
from tests.eval.clip_models import (
    CONTEXT,
    DIMENSION,
    SIZE,
    TEXT,
    make_hf_clip,
    open_clip_config,
    pictures,
    put_on_hub,
    save_hf_clip,
    save_open_clip,
    sentences,
    to_open_clip,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHTS = "open_clip_model.safetensors"
both = pytest.mark.parametrize("scheme", ["open_clip", "hf"])


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return make_hf_clip()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, clip: CLIPModel) -> dict[str, Path]:
    """The same weights for both backends, by scheme."""
    root = tmp_path_factory.mktemp("clip")
    ours = save_open_clip(root / "ours", to_open_clip(clip), quick_gelu=True)
    return {"open_clip": ours, "hf": save_hf_clip(root / "theirs", clip)}


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """CLIP's preprocessing by hand: shorter edge to SIZE by bicubic, centre, normalize."""
    rows = []
    for image in images:
        scale = SIZE / min(image.size)
        width, height = (max(SIZE, int(edge * scale)) for edge in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        values = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)), np.float64) / 255
        rows.append(((values - MEAN) / STD).transpose(2, 0, 1))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


@torch.no_grad()
def cosines(model: CLIPModel, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """I2T of every pair by transformers, one image and one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(pipeline_dir() / "tokenizer")
    table = torch.empty(len(images), len(texts))
    seen = [model.vision_model(pixels([i])).pooler_output[0] for i in images]
    read = [model.text_model(**tokenizer(t, return_tensors="pt")).pooler_output[0] for t in texts]
    for row, image in enumerate(seen):
        for column, text in enumerate(read):
            a, b = model.visual_projection.weight @ image, model.text_projection.weight @ text
            table[row, column] = (a @ b) / (a.norm() * b.norm())
    return table


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_i2t_equals_an_independent_computation(tmp_path: Path, activation: str) -> None:
    model = make_hf_clip(activation, seed=3)
    quick = activation == "quick_gelu"
    folder = save_open_clip(tmp_path / "clip", to_open_clip(model), quick_gelu=quick)
    scorer = scorers.load(f"open_clip:{folder}")
    images, texts = [*pictures(10), *pictures(10, None)], sentences(20)
    ours = scorer.images(images) @ scorer.texts(texts).T
    expected = cosines(model, images, texts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05  # so that the line before could fail


def test_hf_equals_direct_use_of_transformers(folders: dict[str, Path], clip: CLIPModel) -> None:
    processor: Any = CLIPProcessor.from_pretrained(folders["hf"])
    images, texts = pictures(12, None), sentences(12)
    inputs = processor(
        text=texts, images=images, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = clip(**inputs)
    scorer = scorers.load(f"hf:{folders['hf']}")
    torch.testing.assert_close(scorer.images(images), expected.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(scorer.texts(texts), expected.text_embeds, rtol=0, atol=1e-6)


@both
def test_neither_batch_nor_mode_of_an_image_shows(folders: dict[str, Path], scheme: str) -> None:
    images, texts = pictures(20, None), sentences(20)
    one, many = (scorers.load(f"{scheme}:{folders[scheme]}", batch=batch) for batch in (3, 20))
    for first, other in (
        (one.images(images), many.images([image.convert("RGBA") for image in images])),
        (one.texts(texts), many.texts(texts[::-1]).flip(0)),
    ):
        assert first.shape == (20, DIMENSION)
        assert first.dtype == torch.float32
        torch.testing.assert_close(first.norm(dim=1), torch.ones(20))
        torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


def test_each_text_is_encoded_once() -> None:
    asked: list[str] = []

    def embed(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    scorer = scorers.Scorer(ModelEntry("x", "x", "x"), lambda _: torch.empty(0), embed, bool, 2)
    once = scorer.texts(["a", "bb", "ccc"])
    assert torch.equal(scorer.texts(["ccc", "dddd", "a"])[[2, 0]], once[[0, 2]])
    assert asked == ["a", "bb", "ccc", "dddd"]


@both
def test_a_text_that_is_too_long_is_known(folders: dict[str, Path], scheme: str) -> None:
    scorer = scorers.load(f"{scheme}:{folders[scheme]}")
    texts = ["", "rabbit", "tok " * (CONTEXT - 2), "tok " * (CONTEXT - 1), "tok " * 100]
    assert [scorer.is_cut(text) for text in texts] == [False, False, False, True, True]
    _, _, whole, cut, longer = scorer.texts(texts)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(longer, whole)


@both
def test_a_folder_is_named_by_its_weights(folders: dict[str, Path], scheme: str) -> None:
    folder = folders[scheme]
    (weights,) = folder.glob("*.safetensors")
    kind = "transformers" if scheme == "hf" else scheme
    entry = scorers.load(f"{scheme}:{folder}").entry
    assert entry == ModelEntry(f"{scheme}:{folder.name}", kind, folder.name, digest(weights))
    assert len(str(entry.revision)) == 12


def test_a_hub_id_is_named_by_its_commit(folders: dict[str, Path]) -> None:
    name, commit = "tests/small-clip", "0123456789abcdef0123456789abcdef01234567"
    put_on_hub(name, folders["hf"], commit)
    for revision in (None, "main", commit):
        scorer = scorers.load(f"hf:{name}", revision=revision)
        assert scorer.entry == ModelEntry(f"hf:{name}", "transformers", name, commit)
    expected = scorers.load(f"hf:{folders['hf']}").texts(["a lion"])
    assert torch.equal(scorer.texts(["a lion"]), expected)


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: CLIPModel) -> Path:
    """A small model in open_clip's own list: with one tag on the hub, and one in a file here."""
    import open_clip
    from open_clip import factory, pretrained

    config = open_clip_config(text_cfg=TEXT | {"hf_tokenizer_name": str(tmp_path / "clip")})
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    (tmp_path / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small.json")
    own = {"mean": [0.5, 0.4, 0.3], "resize_mode": "squash"}
    folder = save_open_clip(tmp_path / "clip", to_open_clip(clip), own, quick_gelu=True)
    tag = pretrained._pcfg(hf_hub="tests/small-tag/", mean=(0.5, 0.4, 0.3), resize_mode="squash")
    tags = {"hub": tag | {"quick_gelu": True}, "plain": {"file": str(folder / WEIGHTS)}}
    monkeypatch.setitem(pretrained._PRETRAINED, "small", tags)
    put_on_hub("tests/small-tag", folder, "f" * 40)
    return folder


def test_a_tag_brings_its_own_preprocessing_and_activation(registered: Path) -> None:
    scorer = scorers.load("open_clip:small/hub")
    expected = scorers.load(f"open_clip:{registered}")
    images = pictures(4, None)
    torch.testing.assert_close(scorer.images(images), expected.images(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(scorer.texts(["a"]), expected.texts(["a"]), rtol=0, atol=1e-6)
    assert scorer.entry.name == "open_clip:small/hub"
    assert scorer.entry.revision == f"hub@{'f' * 40}"
    assert "QuickGELU" in scorer.entry.note


def test_a_local_file_stands_for_a_tag(registered: Path) -> None:
    tag, file = (scorers.load(f"open_clip:small/{t}") for t in ("plain", registered / WEIGHTS))
    images = pictures(3)
    assert torch.equal(tag.images(images), file.images(images))
    assert file.entry.name == f"open_clip:small/{WEIGHTS}"
    assert tag.entry.revision == f"plain@{file.entry.revision}"
    squashed = scorers.load("open_clip:small/hub").images(images)
    assert (squashed - tag.images(images)).abs().max() > 1e-3  # GELU, and the usual mean


def test_the_embedded_scorer_is_the_miniatures(registered: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(mini, "scorer_dir", lambda: registered)  # a random model of the same form
    scorer, expected = (scorers.load(name) for name in ("embedded", f"open_clip:{registered}"))
    assert torch.equal(scorer.images(pictures(3)), expected.images(pictures(3)))
    entry = scorer.entry
    assert (entry.name, entry.kind) == (mini.NAME, "embedded")
    assert entry.revision == expected.entry.revision
    assert "cannot be set beside the paper's" in entry.note
