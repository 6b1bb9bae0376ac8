"""Captioners with small random models of the real classes, saved to folders and read from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import coca_model
from torchvision.transforms.functional import to_tensor
from transformers import BlipForConditionalGeneration, BlipProcessor, TopKLogitsWarper

from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import scorer as mini
from eval.clip_scores import captioners, scorers
from eval.clip_scores.models import digest, from_open_clip
from eval.clip_scores.names import DEFAULT_CAPTIONERS
from tests.eval.clip_models import (
    END,
    START,
    pictures,
    put_on_hub,
    save_blip,
    save_open_clip,
    sentences,
)

WEIGHTS = {"blip": "model.safetensors", "coca": "open_clip_model.safetensors"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A captioner of each kind in a folder, by scheme."""
    root = tmp_path_factory.mktemp("captioners")
    blip, coca = save_blip(root / "small-blip"), save_open_clip(root / "small-coca", "CoCa")
    return {"blip": blip, "coca": coca}


@pytest.mark.parametrize("scheme", list(WEIGHTS))
def test_captions_do_not_depend_on_the_batch(folders: dict[str, Path], scheme: str) -> None:
    images, name = pictures(7, None), f"{scheme}:{folders[scheme]}"
    five, one = (captioners.load(name, batch=batch) for batch in (5, 1))
    whole = five(images)
    assert len(whole) == 7
    assert len(set(whole)) > 3
    assert one(images) == whole
    assert five([image.convert("RGBA") for image in images[::-1]]) == whole[::-1]
    entry = five.entry
    assert (entry.name, entry.kind) == (f"{scheme}:small-{scheme}", scheme)
    assert entry.revision == digest(folders[scheme] / WEIGHTS[scheme])
    assert "search" in entry.note


def test_blip_is_generate_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    """With three beams and 5 to 30 tokens, whatever the checkpoint's own settings are."""
    model: Any = BlipForConditionalGeneration.from_pretrained(folders["blip"])
    processor: Any = BlipProcessor.from_pretrained(folders["blip"])
    folder = save_blip(tmp_path / "blip")
    changes = {"do_sample": True, "num_beams": 1, "max_length": 7, "repetition_penalty": 3.0}
    for name in ("config.json", "generation_config.json"):  # old checkpoints have the first only
        config = json.loads((folder / name).read_text())
        config.get("text_config", config).update(changes)
        (folder / name).write_text(json.dumps(config))
    captioner = captioners.load(f"blip:{folder}")
    for image in pictures(3):
        inputs = processor(images=image, return_tensors="pt")
        tokens = model.generate(**inputs, num_beams=3, min_length=5, max_length=30)
        expected = processor.decode(tokens[0], skip_special_tokens=True)
        assert captioner([image]) == [expected.removeprefix("[DEC]").strip()]


def test_cocas_search_is_open_clips_generate(folders: dict[str, Path], monkeypatch: Any) -> None:
    """Of four to 28 words, wherever the end comes; damaged weights are refused."""
    coca = from_open_clip("coca", str(folders["coca"])).model
    images = torch.stack([to_tensor(image) for image in pictures(6)])
    # open_clip switches all of `generate` off beside transformers 5, as only the beam search of
    # transformers is missing; `top_k` needs nothing of it.
    with pytest.raises(AssertionError):  # else theirs can be had
        coca.generate(images)
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    monkeypatch.setitem(coca_model.GENERATION_TYPES, "top_k", TopKLogitsWarper)

    def searched(end: int) -> torch.Tensor:
        rows = captioners.greedy(coca, images, START, end)
        tokens = {"sot_token_id": START, "eos_token_id": end, "pad_token_id": coca.pad_id}
        assert torch.equal(coca.generate(images, generation_type="top_k", top_k=1, **tokens), rows)
        return rows

    common = int(searched(END)[:, 5:29].flatten().mode().values)
    ends = (searched(common)[:, 1:] == common).int().argmax(dim=1)
    assert len(set(ends.tolist())) > 1  # so that some captions are padded
    text = coca.text_decoder
    for sign, length in ((1, 6), (-1, 30)):
        with torch.no_grad():  # the end becomes the most, or the least, probable token everywhere
            text.ln_final.bias.fill_(10)
            text.text_projection[:, END] = 10 * sign
        rows = searched(END)
        assert (rows == END).int().argmax(dim=1).tolist() == [length - 1] * 6
    with torch.no_grad():
        text.text_projection[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        captioners.greedy(coca, images, START, END)


@pytest.mark.parametrize("model", ["", "coca_ViT-B-32"])
def test_coca_words_are_decoded_by_its_tokenizer(
    model: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's tokenizer of transformers, or open_clip's own."""
    loaded = from_open_clip("coca", str(folders["coca"]))
    loaded = replace(loaded, tokenize=open_clip.get_tokenizer(model)) if model else loaded
    row = loaded.tokenize(["a red rabbit"])  # with start, end and padding
    monkeypatch.setattr(captioners, "greedy", lambda *_: row)
    assert captioners.coca(loaded)(pictures(1)) == ["a red rabbit"]


def test_the_defaults_are_on_the_hub(folders: dict[str, Path]) -> None:
    commit = "89abcdef" * 5
    put_on_hub(DEFAULT_CAPTIONERS["blip"], folders["blip"], commit)  # in the real one's place
    entry = captioners.load("blip", revision="main").entry
    assert (entry.model, entry.revision) == (DEFAULT_CAPTIONERS["blip"], commit)
    architecture, _, tag = DEFAULT_CAPTIONERS["coca"].partition("/")
    assert open_clip.is_pretrained_cfg(architecture, tag)


def test_retrieval_takes_the_nearest_caption(tmp_path: Path, monkeypatch: Any) -> None:
    folder = save_open_clip(tmp_path / "clip")
    (folder / "captions.txt").write_text("\n".join(sentences(20)))
    monkeypatch.setattr(mini, "scorer_dir", lambda: folder)  # a random model of the same form
    scorer, bank, images = scorers.load("embedded"), sentences(20), pictures(9)
    captioner, other = (captioners.retrieval(scorer, [*own, *own]) for own in (bank, bank[1:]))
    captions = captioner(images)
    nearest = (scorer.images(images) @ scorer.texts(bank).T).argmax(dim=1)
    assert captions == [bank[index] for index in nearest.tolist()]
    assert len(set(captions)) > 1
    monkeypatch.setattr(scorers, "load", lambda *_: pytest.fail("loaded twice"))
    embedded = captioners.load("embedded", scorer)
    assert embedded(images) == captions
    entry = embedded.entry
    assert entry == captioner.entry
    assert str(entry.revision).startswith(f"{scorer.entry.revision}, captions ")
    assert entry.revision != other.entry.revision
    assert entry.name == f"{mini.NAME} retrieval"
    assert "nearest of 20, not generated" in entry.note
