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
from transformers import AutoTokenizer, CLIPModel

from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.mini import scorer as mini
from eval.scores import scorers
from eval.scores.schema import ModelEntry
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


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return make_hf_clip()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, clip: CLIPModel) -> dict[str, str]:
    """The same weights for both backends, by scheme."""
    root = tmp_path_factory.mktemp("clip")
    ours = save_open_clip(root / "ours", to_open_clip(clip), quick_gelu=True)
    theirs = save_hf_clip(root / "theirs", clip)
    return {"open_clip": f"open_clip:{ours}", "hf": f"hf:{theirs}"}


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
@pytest.mark.parametrize("size", [SIZE, None], ids=["as it is", "resized"])
def test_i2t_equals_an_independent_computation(
    tmp_path: Path, activation: str, size: int | None
) -> None:
    model = make_hf_clip(activation, seed=3)
    quick = activation == "quick_gelu"
    folder = save_open_clip(tmp_path / "clip", to_open_clip(model), quick_gelu=quick)
    scorer = scorers.load(f"open_clip:{folder}")
    images, texts = pictures(50, size), sentences(50)
    ours = scorer.images(images) @ scorer.texts(texts).T
    expected = cosines(model, images, texts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05  # so that the line before could fail


@pytest.mark.parametrize("scheme", ["open_clip", "hf"])
def test_the_batch_size_does_not_show(folders: dict[str, str], scheme: str) -> None:
    images, texts = pictures(50, None), sentences(50)
    made = [scorers.load(folders[scheme], batch=batch) for batch in (1, 7, 50)]
    for embed in (lambda s: s.images(images), lambda s: s.texts(texts)):
        first, *others = (embed(scorer) for scorer in made)
        assert first.shape == (50, DIMENSION)
        assert first.dtype == torch.float32
        torch.testing.assert_close(first.norm(dim=1), torch.ones(50))
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


def test_hf_equals_direct_use_of_transformers(folders: dict[str, str], clip: CLIPModel) -> None:
    from transformers import CLIPProcessor

    processor: Any = CLIPProcessor.from_pretrained(folders["hf"].removeprefix("hf:"))
    images, texts = pictures(12, None), sentences(12)
    inputs = processor(
        text=texts, images=images, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = clip(**inputs)
    scorer = scorers.load(folders["hf"])
    torch.testing.assert_close(scorer.images(images), expected.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(scorer.texts(texts), expected.text_embeds, rtol=0, atol=1e-6)


def test_each_text_is_encoded_once(folders: dict[str, str], monkeypatch: Any) -> None:
    scorer: Any = scorers.load(folders["open_clip"], batch=4)
    encode, seen = scorer._embed_texts, []
    monkeypatch.setattr(scorer, "_embed_texts", lambda part: (seen.extend(part), encode(part))[1])
    texts = sentences(6)
    once = scorer.texts(texts)
    again = scorer.texts([*texts[::-1], "something new", texts[0]])
    assert seen == [*texts, "something new"]
    assert torch.equal(again[:6].flip(0), once)
    assert torch.equal(again[-1], once[0])


@pytest.mark.parametrize("scheme", ["open_clip", "hf"])
def test_tokens_are_counted_before_they_are_cut(
    folders: dict[str, str], scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = scorers.load(folders[scheme])
    assert scorer.context_length == CONTEXT
    lengths = scorer.tokens(["", "rabbit", "tok " * (CONTEXT - 2), "tok " * 100])
    assert lengths == [2, 3, CONTEXT, 102]
    cut, whole = scorer.texts(["tok " * 100, "tok " * (CONTEXT - 2)])
    torch.testing.assert_close(cut, whole)
    assert not caplog.records


def test_any_mode_of_image_is_taken_as_rgb(folders: dict[str, str]) -> None:
    (image,) = pictures(1)
    for scheme in folders:
        scorer = scorers.load(folders[scheme])
        for mode in ("RGBA", "L", "P"):
            other = image.convert(mode)
            expected = scorer.images([other.convert("RGB")])
            assert torch.equal(scorer.images([other]), expected)


def test_nothing_gives_no_rows(folders: dict[str, str]) -> None:
    for scheme in folders:
        scorer = scorers.load(folders[scheme])
        assert scorer.images([]).shape == scorer.texts([]).shape == (0, DIMENSION)


@pytest.mark.parametrize("scheme", ["open_clip", "hf"])
def test_a_folder_is_named_by_its_weights(folders: dict[str, str], scheme: str) -> None:
    entry = scorers.load(folders[scheme]).entry
    folder = Path(folders[scheme].partition(":")[2])
    assert entry.name == f"{scheme}:{folder.name}"
    assert entry.model == folder.name
    (weights,) = folder.glob("*.safetensors")
    assert scorers.pretrained.digest(weights) == entry.revision
    assert len(str(entry.revision)) == 12
    assert str(folder.parent) not in json.dumps(entry.__dict__)


def test_a_hub_id_is_named_by_its_commit(folders: dict[str, str]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    put_on_hub("tests/small-clip", Path(folders["hf"].removeprefix("hf:")), commit)
    for revision in (None, "main", commit):
        scorer = scorers.load("hf:tests/small-clip", revision=revision)
        name = "tests/small-clip"
        assert scorer.entry == ModelEntry(f"hf:{name}", "transformers", name, commit)
    expected = scorers.load(folders["hf"]).texts(["a lion"])
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
    folder = save_open_clip(
        tmp_path / "clip",
        to_open_clip(clip),
        {"mean": [0.5, 0.4, 0.3], "resize_mode": "squash"},
        quick_gelu=True,
    )
    tag = pretrained._pcfg(hf_hub="tests/small-tag/", mean=(0.5, 0.4, 0.3), resize_mode="squash")
    tags = {"hub": tag | {"quick_gelu": True}, "plain": {"file": str(folder / WEIGHTS)}}
    monkeypatch.setitem(pretrained._PRETRAINED, "small", tags)
    put_on_hub("tests/small-tag", folder, "f" * 40)
    return folder


WEIGHTS = "open_clip_model.safetensors"


def test_a_tag_brings_its_own_preprocessing_and_activation(registered: Path) -> None:
    scorer = scorers.load("open_clip:small/hub")
    expected = scorers.load(f"open_clip:{registered}")
    images = pictures(4, None)
    torch.testing.assert_close(scorer.images(images), expected.images(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(scorer.texts(["a"]), expected.texts(["a"]), rtol=0, atol=1e-6)
    name, revision = "open_clip:small/hub", f"hub@{'f' * 40}"
    note = "QuickGELU is on, as the weights were trained with it."
    assert scorer.entry == ModelEntry(name, "open_clip", "small", revision, note)


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
    scorer = scorers.load("embedded")
    expected = scorers.load(f"open_clip:{registered}")
    images = pictures(3)
    assert torch.equal(scorer.images(images), expected.images(images))
    assert scorer.tokens(["tok " * 40]) == [42]
    entry = scorer.entry
    assert (entry.name, entry.kind, entry.revision) == (
        mini.NAME,
        "embedded",
        expected.entry.revision,
    )
    assert "cannot be set beside the paper's" in entry.note


def test_open_clips_own_tokenizer_is_counted() -> None:
    from open_clip import get_tokenizer

    tokenize = get_tokenizer("ViT-B-32")
    count = scorers.open_clip_loading.token_count
    for text in ("", "a ToK icon of a <rabbit>, in the style of ToK", "ant " * 75):
        row = tokenize([text])[0]
        assert count(tokenize, text) == int(row.argmax()) + 1  # the end token is the largest
    assert count(tokenize, "ant " * 100) == 102
    with pytest.raises(TypeError, match="is no tokenizer of open_clip"):
        count(str.split, "a")
