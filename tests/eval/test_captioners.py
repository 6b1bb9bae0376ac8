"""Captioners with small random models of the real classes, saved to folders and read from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import scorer as mini
from eval.scores import captioners, scorers
from eval.scores.names import DEFAULT_CAPTIONERS
from tests.eval.clip_models import (
    END,
    START,
    make_hf_clip,
    pictures,
    put_on_hub,
    save_blip,
    save_coca,
    save_hf_clip,
    save_open_clip,
    sentences,
    to_open_clip,
)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A captioner of each kind in a folder, by scheme."""
    root = tmp_path_factory.mktemp("captioners")
    blip, coca = save_blip(root / "small-blip"), save_coca(root / "small-coca")
    return {"blip": f"blip:{blip}", "coca": f"coca:{coca}"}


def folder_of(name: str) -> Path:
    return Path(name.partition(":")[2])


@pytest.mark.parametrize("scheme", ["blip", "coca"])
def test_captions_do_not_depend_on_the_batch(names: dict[str, str], scheme: str) -> None:
    images = pictures(7, None)
    five, one = (captioners.load(names[scheme], batch=batch) for batch in (5, 1))
    whole = five(images)
    assert len(whole) == 7
    assert len(set(whole)) > 3
    assert one(images) == whole
    assert five([image.convert("RGBA") for image in images[::-1]]) == whole[::-1]


def test_blip_is_generate_of_transformers(names: dict[str, str]) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    folder = folder_of(names["blip"])
    model: Any = BlipForConditionalGeneration.from_pretrained(folder)
    processor: Any = BlipProcessor.from_pretrained(folder)
    captioner = captioners.load(names["blip"])
    for image in pictures(3):
        inputs = processor(images=image, return_tensors="pt")
        tokens = model.generate(**inputs, num_beams=3, min_length=5, max_length=30)
        expected = processor.decode(tokens[0], skip_special_tokens=True)
        assert captioner([image]) == [expected.removeprefix("[DEC]").strip()]


def test_blips_own_generation_settings_do_not_show(names: dict[str, str], tmp_path: Path) -> None:
    expected = captioners.load(names["blip"])(pictures(4))
    folder = save_blip(tmp_path / "blip")
    changes = {"do_sample": True, "num_beams": 1, "max_length": 7, "repetition_penalty": 3.0}
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes  # where old checkpoints hold them
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | changes))
    assert captioners.load(f"blip:{folder}")(pictures(4)) == expected


@pytest.fixture
def coca(names: dict[str, str]) -> Any:
    return captioners.open_clip_loading.load("coca", str(folder_of(names["coca"]))).model


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
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    monkeypatch.setitem(coca_model.GENERATION_TYPES, "top_k", TopKLogitsWarper)
    images = pixels(pictures(6))
    tokens = {"sot_token_id": START, "eos_token_id": END, "pad_token_id": END}
    expected = coca.generate(images, generation_type="top_k", top_k=1, **tokens)
    assert torch.equal(captioners.greedy(coca, images, START, END), expected)


def test_open_clips_generate_still_does_not_run(coca: Any) -> None:
    """When this fails, open_clip's own beam search can be had again."""
    with pytest.raises(AssertionError, match="install transformers"):
        coca.generate(pixels(pictures(1)))


def test_coca_words_are_decoded_by_its_tokenizer(names: dict[str, str], coca: Any) -> None:
    from open_clip import get_tokenizer

    mine: Any = captioners.load(names["coca"])
    rabbit = mine._tokenize(["a red rabbit"])[0].tolist()
    assert mine._decode([*rabbit, START, 0, 0]) == "a red rabbit"
    parts: Any = SimpleNamespace(
        model=coca, preprocess=None, tokenize=get_tokenizer("coca_ViT-B-32")
    )
    other = captioners.Coca(parts, mine.entry)
    row = other._tokenize(["a red rabbit , in snow"])[0].tolist()
    assert other._decode(row) == "a red rabbit , in snow"


def test_entries_name_model_and_revision(names: dict[str, str]) -> None:
    for scheme, weights in (
        ("blip", "model.safetensors"),
        ("coca", "open_clip_model.safetensors"),
    ):
        entry = captioners.load(names[scheme]).entry
        label = f"small-{scheme}"
        assert (entry.name, entry.kind, entry.model) == (f"{scheme}:{label}", scheme, label)
        assert entry.revision == scorers.pretrained.digest(folder_of(names[scheme]) / weights)
        assert "search" in entry.note


def test_the_default_blip_is_read_from_the_hub(names: dict[str, str]) -> None:
    folder, commit = folder_of(names["blip"]), "89abcdef" * 5
    put_on_hub(DEFAULT_CAPTIONERS["blip"], folder, commit)  # the small one in the real one's place
    for name in ("blip", f"blip:{DEFAULT_CAPTIONERS['blip']}"):
        captioner = captioners.load(name, revision="main")
        assert captioner.entry.model == DEFAULT_CAPTIONERS["blip"]
        assert captioner.entry.revision == commit
    assert captioner(pictures(2)) == captioners.load(names["blip"])(pictures(2))


def test_the_default_coca_exists() -> None:
    import open_clip

    architecture, _, tag = DEFAULT_CAPTIONERS["coca"].partition("/")
    assert open_clip.is_pretrained_cfg(architecture, tag)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the form of the embedded scorer, with random weights and a bank."""
    folder = tmp_path_factory.mktemp("space") / "clip"
    save_open_clip(folder, to_open_clip(make_hf_clip()), quick_gelu=True)
    (folder / "captions.txt").write_text("\n".join(sentences(20)))
    return folder


def test_retrieval_takes_the_nearest_caption(space: Path) -> None:
    scorer = scorers.load(f"open_clip:{space}")
    bank, images = sentences(20), pictures(9)
    captions = captioners.Retrieval(scorer, [*bank, *bank])(images)
    for image, caption in zip(images, captions, strict=True):
        scores = [float(scorer.images([image])[0] @ scorer.texts([text])[0]) for text in bank]
        assert caption == bank[max(range(20), key=scores.__getitem__)]
    assert len(set(captions)) > 1
    assert captioners.Retrieval(scorer, bank)([]) == []


def test_retrieval_is_named_by_scorer_and_bank(space: Path) -> None:
    scorer = scorers.load(f"open_clip:{space}")
    entry, other = (captioners.Retrieval(scorer, sentences(n)).entry for n in (20, 19))
    assert entry.name == "open_clip:clip retrieval"
    assert entry.revision != other.revision
    assert str(entry.revision).startswith(f"{scorer.entry.revision}, captions ")
    assert entry.note == "Captions are the nearest of 20, not generated."


def test_embedded_uses_the_loaded_scorer_again(space: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(mini, "scorer_dir", lambda: space)  # a random model of the same form
    scorer = scorers.load("embedded")
    expected = captioners.load("embedded")(pictures(3))
    monkeypatch.setattr(mini, "load", lambda: pytest.fail("loaded twice"))
    captioner = captioners.load("embedded", scorer=scorer)
    assert captioner(pictures(3)) == expected
    assert captioner.entry.kind == "retrieval"
    assert captioner.entry.name.startswith(mini.NAME)


def test_weights_that_are_not_finite_are_refused(coca: Any) -> None:
    projection = coca.text_decoder.text_projection
    with torch.no_grad():
        projection[0, 0] = torch.nan
    with pytest.raises(UserError, match="logits that are not finite: its weights are damaged"):
        captioners.greedy(coca, pixels(pictures(1)), START, END)


def test_an_empty_bank_is_refused(space: Path) -> None:
    with pytest.raises(UserError, match="the bank of captions is empty: give one"):
        captioners.Retrieval(scorers.load(f"open_clip:{space}"), [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blib:x", 'captioner "blib:x" is unknown (did you mean "blip"?): give embedded, blip:ID'),
        ("embedded:x", 'captioner "embedded:x" is unknown: give embedded, blip:ID_OR_FOLDER, coca'),
        ("blip:", '"blip:": there is no such folder'),
        ("blip:tests/absent", '"blip:tests/absent" cannot be loaded ('),
        ("blip:./nowhere", '"blip:./nowhere": there is no such folder: correct the path'),
        (
            "coca:coca_ViT-L-14",
            '"coca:coca_ViT-L-14/" names no weights: add one of its tags (',
        ),
        ("coca:coca_ViT-L-14/mscoco", 'coca_ViT-L-14 has no tag "mscoco"'),
        ("coca:coca_VIT-L-14/x", '(did you mean "coca_ViT-L-14"?)'),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        captioners.load(name)


def test_options_that_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(UserError, match="a batch of 0 holds nothing: give 1 or more"):
        captioners.load(names["blip"], batch=0)
    for name in (names["coca"], "embedded", names["blip"]):
        with pytest.raises(UserError, match='revision "v1" has no effect on'):
            captioners.load(name, revision="v1")


def test_models_that_cannot_caption_are_refused(space: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no CoCa and cannot caption: give one of coca_ViT-B-32"):
        captioners.load(f"coca:{space}")
    clip = save_hf_clip(tmp_path / "clip", make_hf_clip())
    with pytest.raises(UserError, match="is a model of type 'clip', not 'blip': give another"):
        captioners.load(f"blip:{clip}")
    (blip := save_blip(tmp_path / "blip")).joinpath("tokenizer.json").unlink()
    with pytest.raises(UserError, match="knows no words: put its files beside the weights"):
        captioners.load(f"blip:{blip}")
