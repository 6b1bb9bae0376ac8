"""Scorers against direct use of the libraries: the same small weights, one image at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL.Image import Image
from transformers import CLIPModel, CLIPProcessor

from bilora_diffusion.mini import scorer as mini
from eval.clip_scores import scorers
from eval.clip_scores.models import ModelEntry, digest
from tests.eval.clip_models import (
    CONTEXT,
    DIMENSION,
    TEXT,
    make_hf_clip,
    open_clip_config,
    pictures,
    put_on_hub,
    save_hf_clip,
    save_open_clip,
    sentences,
)

WEIGHTS = "open_clip_model.safetensors"
both = pytest.mark.parametrize("scheme", ["open_clip", "hf"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each backend, by scheme."""
    root = tmp_path_factory.mktemp("clip")
    theirs = save_hf_clip(root / "theirs", make_hf_clip())
    return {"open_clip": save_open_clip(root / "ours"), "hf": theirs}


@torch.no_grad()
def i2t(scheme: str, folder: Path, image: Image, text: str) -> float:
    """The cosine of an image and a text, by the library alone."""
    if scheme == "hf":
        processor: Any = CLIPProcessor.from_pretrained(folder)
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        seen = CLIPModel.from_pretrained(folder)(**inputs)
        return float((seen.image_embeds @ seen.text_embeds.T).squeeze())
    created: Any = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model, preprocess = created
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([text])
    a, b = model.encode_image(preprocess(image)[None])[0], model.encode_text(tokens)[0]
    return float(a @ b / a.norm() / b.norm())


@both
def test_i2t_is_the_librarys_whatever_the_batch_and_the_mode(
    folders: dict[str, Path], scheme: str
) -> None:
    images, texts = [*pictures(3), *pictures(4, None)], sentences(7)
    one, many = (scorers.load(f"{scheme}:{folders[scheme]}", batch=batch) for batch in (3, 20))
    table = one.images(images) @ one.texts(texts).T
    for at in (0, 1, 6):
        expected = i2t(scheme, folders[scheme], images[at], texts[at])
        assert float(table[at, at]) == pytest.approx(expected, abs=1e-6)
    assert table.std() > 0.05  # so that the lines before could fail
    embeddings = many.images([image.convert("RGBA") for image in images])
    assert (embeddings.shape, embeddings.dtype) == ((7, DIMENSION), torch.float32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))
    again = embeddings @ many.texts(texts[::-1]).flip(0).T
    torch.testing.assert_close(again, table, atol=1e-6, rtol=0)


@both
def test_a_text_that_is_too_long_is_known(folders: dict[str, Path], scheme: str) -> None:
    scorer = scorers.load(f"{scheme}:{folders[scheme]}")
    texts = ["", "rabbit", "tok " * (CONTEXT - 2), "tok " * (CONTEXT - 1), "tok " * 100]
    assert [scorer.is_cut(text) for text in texts] == [False, False, False, True, True]
    whole, *longer = scorer.texts(texts)[2:]
    for cut in longer:
        torch.testing.assert_close(cut, whole)


def test_a_model_is_named_by_its_weights_or_its_commit(folders: dict[str, Path]) -> None:
    for scheme, kind, name in (
        ("open_clip", "open_clip", "ours"),
        ("hf", "transformers", "theirs"),
    ):
        (weights,) = folders[scheme].glob("*.safetensors")
        entry = scorers.load(f"{scheme}:{folders[scheme]}").entry
        assert entry == ModelEntry(f"{scheme}:{name}", kind, name, digest(weights))
    name, commit = "tests/small-clip", "0123456789abcdef0123456789abcdef01234567"
    put_on_hub(name, folders["hf"], commit)
    for revision in (None, "main", commit):
        entry = scorers.load(f"hf:{name}", revision=revision).entry
        assert entry == ModelEntry(f"hf:{name}", "transformers", name, commit)


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in open_clip's own list: with one tag on the hub, and one in a file here."""
    from open_clip import factory, pretrained

    config = open_clip_config(text_cfg=TEXT | {"hf_tokenizer_name": str(tmp_path / "clip")})
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    (tmp_path / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small.json")
    own = {"mean": [0.5, 0.4, 0.3], "resize_mode": "squash"}
    folder = save_open_clip(tmp_path / "clip", preprocess_cfg=own, quick_gelu=True)
    tag = pretrained._pcfg(hf_hub="tests/small-tag/", mean=(0.5, 0.4, 0.3), resize_mode="squash")
    tags = {"hub": tag | {"quick_gelu": True}, "plain": {"file": str(folder / WEIGHTS)}}
    monkeypatch.setitem(pretrained._PRETRAINED, "small", tags)
    put_on_hub("tests/small-tag", folder, "f" * 40)
    return folder


def test_a_tag_brings_its_own_preprocessing_and_activation(
    registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the folder has them, and a file or a tag without such facts has open_clip's usual ones."""
    names = [f"small/{tag}" for tag in ("hub", "plain", registered / WEIGHTS)]
    tag, plain, file, folder = (scorers.load(f"open_clip:{n}") for n in [*names, registered])
    images = pictures(4, None)
    torch.testing.assert_close(tag.images(images), folder.images(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(tag.texts(["a"]), folder.texts(["a"]), rtol=0, atol=1e-6)
    assert tag.entry.name == "open_clip:small/hub"
    assert tag.entry.revision == f"hub@{'f' * 40}"
    assert "QuickGELU" in tag.entry.note
    assert torch.equal(plain.images(images), file.images(images))
    assert (plain.images(images) - tag.images(images)).abs().max() > 1e-3
    assert file.entry.name == f"open_clip:small/{WEIGHTS}"
    assert plain.entry.revision == f"plain@{file.entry.revision}"
    monkeypatch.setattr(mini, "scorer_dir", lambda: registered)  # a random model of the same form
    embedded = scorers.load("embedded")
    assert torch.equal(embedded.images(images), folder.images(images))
    assert (embedded.entry.name, embedded.entry.kind) == (mini.NAME, "embedded")
    assert embedded.entry.revision == folder.entry.revision
    assert "cannot be set beside the paper's" in embedded.entry.note
