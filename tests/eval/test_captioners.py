"""Captioners with small random models of the real classes, saved to folders and read from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

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
both = pytest.mark.parametrize("scheme", list(WEIGHTS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A captioner of each kind in a folder, by scheme."""
    root = tmp_path_factory.mktemp("captioners")
    return {
        "blip": save_blip(root / "small-blip"),
        "coca": save_open_clip(root / "small-coca", "CoCa"),
    }


@both
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
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model: Any = BlipForConditionalGeneration.from_pretrained(folders["blip"])
    processor: Any = BlipProcessor.from_pretrained(folders["blip"])
    folder = save_blip(tmp_path / "blip")
    changes = {"do_sample": True, "num_beams": 1, "max_length": 7, "repetition_penalty": 3.0}
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes  # where old checkpoints hold them
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | changes))
    captioner = captioners.load(f"blip:{folder}")
    for image in pictures(3):
        inputs = processor(images=image, return_tensors="pt")
        tokens = model.generate(**inputs, num_beams=3, min_length=5, max_length=30)
        expected = processor.decode(tokens[0], skip_special_tokens=True)
        assert captioner([image]) == [expected.removeprefix("[DEC]").strip()]


@pytest.fixture
def coca(folders: dict[str, Path]) -> Any:
    return from_open_clip("coca", str(folders["coca"])).model


def pixels(images: list[Image.Image]) -> torch.Tensor:
    from torchvision.transforms.functional import to_tensor

    return torch.stack([to_tensor(image) for image in images])


def naive(model: Any, image: torch.Tensor, end: int) -> list[int]:
    """Greedy search for one image, written plainly; the model sees no state from before."""
    tokens = [START]
    while tokens[-1] != end or len(tokens) == 1:
        with torch.no_grad():
            logits = model(image[None], torch.tensor([tokens]), output_labels=False)["logits"]
        order = logits[0, -1].argsort(descending=True).tolist()
        best = next(token for token in order if len(tokens) >= 5 or token != end)
        tokens.append(end if len(tokens) == 29 else best)
    return tokens


def test_greedy_search_is_the_plain_one(coca: Any) -> None:
    images = pixels(pictures(6))
    free = captioners.greedy(coca, images, START, END)
    common = int(free[:, 5:29].flatten().mode().values)
    lengths = set()
    for end in (END, common):  # the second ends captions early, and not all at once
        rows = captioners.greedy(coca, images, START, end).tolist()
        for image, row in zip(images, rows, strict=True):
            expected = naive(coca, image, end)
            assert row == expected + [coca.pad_id] * (len(row) - len(expected))
            lengths.add(len(expected))
    assert len(lengths) > 1


@pytest.mark.parametrize(("sign", "length"), [(1, 6), (-1, 30)])
def test_captions_have_four_to_28_words(coca: Any, sign: int, length: int) -> None:
    with torch.no_grad():  # the end becomes the most, or the least, probable token everywhere
        coca.text_decoder.ln_final.bias.fill_(10)
        coca.text_decoder.text_projection[:, END] = 10 * sign
    row = captioners.greedy(coca, pixels(pictures(1)), START, END)[0].tolist()
    assert len(row) == length
    assert row.index(END) == length - 1


def test_greedy_search_is_open_clips_generate(coca: Any, monkeypatch: Any) -> None:
    from open_clip import coca_model
    from transformers import TopKLogitsWarper

    # open_clip switches all of `generate` off beside transformers 5, as only the beam search of
    # transformers is missing; `top_k` needs nothing of it.
    with pytest.raises(AssertionError, match="install transformers"):  # else theirs can be had
        coca.generate(pixels(pictures(1)))
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    monkeypatch.setitem(coca_model.GENERATION_TYPES, "top_k", TopKLogitsWarper)
    images = pixels(pictures(6))
    tokens = {"sot_token_id": START, "eos_token_id": END, "pad_token_id": END}
    expected = coca.generate(images, generation_type="top_k", top_k=1, **tokens)
    assert torch.equal(captioners.greedy(coca, images, START, END), expected)


@pytest.mark.parametrize("model", ["", "coca_ViT-B-32"])
def test_coca_words_are_decoded_by_its_tokenizer(
    model: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's tokenizer of transformers, or open_clip's own."""
    from open_clip import get_tokenizer

    loaded = from_open_clip("coca", str(folders["coca"]))
    loaded = replace(loaded, tokenize=get_tokenizer(model)) if model else loaded
    row = loaded.tokenize(["a red rabbit"])  # with start, end and padding
    monkeypatch.setattr(captioners, "greedy", lambda *_: row)
    assert captioners.coca(loaded)(pictures(1)) == ["a red rabbit"]


def test_the_defaults_are_on_the_hub(folders: dict[str, Path]) -> None:
    import open_clip

    commit = "89abcdef" * 5
    put_on_hub(DEFAULT_CAPTIONERS["blip"], folders["blip"], commit)  # in the real one's place
    for name in ("blip", f"blip:{DEFAULT_CAPTIONERS['blip']}"):
        captioner = captioners.load(name, revision="main")
        assert captioner.entry.model == DEFAULT_CAPTIONERS["blip"]
        assert captioner.entry.revision == commit
    architecture, _, tag = DEFAULT_CAPTIONERS["coca"].partition("/")
    assert open_clip.is_pretrained_cfg(architecture, tag)


def test_retrieval_takes_the_nearest_caption(tmp_path: Path, monkeypatch: Any) -> None:
    folder = save_open_clip(tmp_path / "clip")
    (folder / "captions.txt").write_text("\n".join(sentences(20)))
    monkeypatch.setattr(mini, "scorer_dir", lambda: folder)  # a random model of the same form
    scorer, bank, images = scorers.load("embedded"), sentences(20), pictures(9)
    captions = captioners.retrieval(scorer, [*bank, *bank])(images)
    for image, caption in zip(images, captions, strict=True):
        scores = [float(scorer.images([image])[0] @ scorer.texts([text])[0]) for text in bank]
        assert caption == bank[max(range(20), key=scores.__getitem__)]
    assert len(set(captions)) > 1
    entry, other = (captioners.retrieval(scorer, sentences(n)).entry for n in (20, 19))
    assert str(entry.revision).startswith(f"{scorer.entry.revision}, captions ")
    assert entry.revision != other.revision
    monkeypatch.setattr(scorers, "load", lambda *_: pytest.fail("loaded twice"))
    embedded = captioners.load("embedded", scorer)
    assert embedded(images) == captions
    assert embedded.entry == entry
    assert entry.name == f"{mini.NAME} retrieval"
    assert "nearest of 20, not generated" in entry.note


def test_weights_that_are_not_finite_are_refused(coca: Any) -> None:
    with torch.no_grad():
        coca.text_decoder.text_projection[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        captioners.greedy(coca, pixels(pictures(1)), START, END)
