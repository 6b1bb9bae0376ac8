"""Scorers and captioners with small random models, compared with the libraries; refused models."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    BlipForConditionalGeneration,
    BlipProcessor,
    Dinov2Model,
)

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.mini import scorer as mini
from eval.cache import hash_of_files
from eval.clip_scores import captioners, load_image_model, load_models, models
from eval.clip_scores.models import ModelEntry
from eval.clip_scores.settings import BLIP
from tests.eval import clip_models
from tests.eval.clip_models import DIMENSION, pictures, put_on_hub, save_open_clip, sentences


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a random model of each kind; return scheme -> folder."""
    root = tmp_path_factory.mktemp("models")
    return {
        "open_clip": save_open_clip(root / "ours"),
        "blip": clip_models.save_blip(root / "blip"),
        "dinov2": clip_models.save_dinov2(root / "dino"),
    }


def test_a_model_is_identified_by_its_weights_or_its_commit(folders):
    loaders: dict[str, Any] = {
        "open_clip": models.load,
        "blip": captioners.load,
        "dinov2": models.dinov2,
    }
    for scheme, folder in folders.items():
        (weights,) = folder.glob("*.safetensors")
        name = folder.name
        entry = loaders[scheme](f"{scheme}:{folder}").entry
        expected = ModelEntry(f"{scheme}:{name}", scheme, name, hash_of_files(weights))
        assert replace(entry, note="") == expected
        # The note says how captions are made.
        assert ("search" in entry.note) == (scheme == "blip")
    commit = "0123456789abcdef0123456789abcdef01234567"
    put_on_hub(BLIP, folders["blip"], commit)  # instead of the real model
    entry = captioners.load("blip").entry
    assert (entry.model, entry.revision) == (BLIP, commit)


@torch.no_grad()
def open_clip_cosine(folder, image, text):
    """Compute the cosine of an image and a text with open_clip itself."""
    created: Any = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model, preprocess = created
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([text])
    image_vector = model.encode_image(preprocess(image)[None])[0]
    text_vector = model.encode_text(tokens)[0]
    return float(image_vector @ text_vector / image_vector.norm() / text_vector.norm())


def test_i2t_equals_the_librarys_for_any_batch_size_and_image_mode(folders):
    images, texts = pictures(3) + pictures(4, None), sentences(7)
    folder = folders["open_clip"]
    scorer = models.load(f"open_clip:{folder}", batch=3)
    cosines = scorer.images(images) @ scorer.texts(texts).T  # (7, 7)
    for index in (0, 1, 6):
        expected = open_clip_cosine(folder, images[index], texts[index])
        assert float(cosines[index, index]) == pytest.approx(expected, abs=1e-6)
    assert cosines.std() > 0.05  # otherwise the checks above could not fail

    # One batch, images with an alpha channel, and texts in another order
    scorer = models.load(f"open_clip:{folder}", batch=20)
    embeddings = scorer.images([image.convert("RGBA") for image in images])
    assert (embeddings.shape, embeddings.dtype) == ((7, DIMENSION), torch.float32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))
    other_cosines = embeddings @ scorer.texts(texts[::-1]).flip(0).T
    torch.testing.assert_close(other_cosines, cosines, atol=1e-6, rtol=0)


def test_blip_captions_equal_those_of_transformers(folders, tmp_path):
    """Captions use three beams and 5 to 30 tokens, whatever the checkpoint's own settings are."""
    model: Any = BlipForConditionalGeneration.from_pretrained(folders["blip"])
    processor: Any = BlipProcessor.from_pretrained(folders["blip"])
    folder = clip_models.save_blip(tmp_path / "blip")
    changes = {"do_sample": True, "num_beams": 1, "max_length": 7, "repetition_penalty": 3.0}
    for name in ("config.json", "generation_config.json"):  # old checkpoints have only the first
        config = json.loads((folder / name).read_text())
        config.get("text_config", config).update(changes)
        (folder / name).write_text(json.dumps(config))
    captioner = captioners.load(f"blip:{folder}")
    for image in pictures(3):
        inputs = processor(images=image, return_tensors="pt")
        tokens = model.generate(**inputs, num_beams=3, min_length=5, max_length=30)
        expected = processor.decode(tokens[0], skip_special_tokens=True)
        assert captioner([image]) == [expected.removeprefix("[DEC]").strip()]


@torch.no_grad()
def test_dinov2_embeddings_equal_those_of_transformers_for_any_batch_size(folders):
    """The model class is the one of transformers, but the weights are random."""
    images = pictures(2) + pictures(3, None)
    model = Dinov2Model.from_pretrained(folders["dinov2"])
    processor: Any = BitImageProcessor.from_pretrained(folders["dinov2"])
    embedded = models.dinov2(f"dinov2:{folders['dinov2']}", batch=2).images(images)
    for image, embedding in zip(images, embedded, strict=True):
        inputs = processor(images=image, return_tensors="pt")
        class_token = model(**inputs).last_hidden_state[0, 0]  # of (1, tokens, d)
        torch.testing.assert_close(embedding, class_token / class_token.norm())
    assert (embedded @ embedded.T).min() < 0.9  # otherwise the checks above could not fail


def test_retrieval_returns_the_nearest_caption(tmp_path, monkeypatch):
    folder = save_open_clip(tmp_path / "clip")
    (folder / "captions.txt").write_text("\n".join(sentences(20)))
    monkeypatch.setattr(mini, "scorer_dir", lambda: folder)  # a random model of the same kind
    scorer = models.load("embedded")
    bank, images = sentences(20), pictures(9)
    nearest = (scorer.images(images) @ scorer.texts(bank).T).argmax(dim=1)  # (images,)
    expected = [bank[index] for index in nearest.tolist()]
    assert len(set(expected)) > 1
    captioner = captioners.retrieval(scorer, bank + bank)  # repeated captions count once
    assert captioner(images) == expected
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded twice"))
    embedded = captioners.load("embedded", scorer)
    assert embedded(images) == expected
    entry = embedded.entry
    assert entry == captioner.entry
    assert str(entry.revision).startswith(f"{scorer.entry.revision}, captions ")
    assert entry.revision != captioners.retrieval(scorer, bank[1:]).entry.revision
    assert entry.name == f"{mini.NAME} retrieval"
    assert "nearest of 20 captions" in entry.note


class Boom:
    """A pickle of this object writes a file when it is loaded."""

    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "x"))


@pytest.fixture
def models_here(folders, tmp_path, monkeypatch):
    """Copy the models into the working folder, where tests may damage them."""
    for folder in folders.values():
        shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name):
    """Load a scorer, a captioner or an image model as the command does."""
    if name.startswith("blip"):
        load_models("open_clip:ours", name)
    elif name.startswith("dino"):
        load_image_model(name)
    else:
        load_models(name, None)


def check_refused(name, *words):
    """Check that a model is refused in one sentence with each of the words, and runs no code."""
    with pytest.raises(UserError) as caught:
        load(name)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
    assert not Path("exploded").exists()


def test_an_unavailable_or_unsupported_model_is_refused(models_here):
    check_refused("embeded", '"embeded"', 'did you mean "embedded"', "MODEL/TAG")
    check_refused("open_clip:ViT-B-32/opnai", '"opnai"', 'did you mean "openai"', "laion400m_e31")
    check_refused("blip:tests/absent", '"blip:tests/absent"', "connection")
    check_refused("dinov2:tests/absent", '"dinov2:tests/absent"', "connection")
    check_refused("dino:dino", '"dino:dino"', "dinov2:facebook/dinov2-base")
    check_refused("dinov2:blip", "a model of the kind blip", "dinov2:facebook/dinov2-base")


def test_code_in_a_models_folder_is_not_run(models_here):
    path = models_here / "dino" / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] = "boom"
    config["auto_map"] = {"AutoConfig": "boom.A", "AutoModel": "boom.B"}
    path.write_text(json.dumps(config))
    Path("dino/boom.py").write_text("open('exploded', 'w')")
    check_refused("dinov2:dino", '"dinov2:dino"')


@pytest.mark.parametrize("name", ["open_clip:ours", "blip:blip"])
def test_a_model_without_a_tokenizer_is_refused(name, models_here):
    folder = models_here / name.partition(":")[2]
    (folder / "tokenizer.json").unlink()
    check_refused(name, folder.name)


@pytest.mark.parametrize("damage", ["cut", "incomplete", "pickle"])
@pytest.mark.parametrize("name", ["open_clip:ours", "blip:blip", "dinov2:dino"])
def test_damaged_weights_are_refused(name, damage, models_here):
    folder = models_here / name.partition(":")[2]
    (file,) = folder.glob("*.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "incomplete":
        tensors = load_file(file)
        del tensors[min(tensors)]
        file.unlink()  # not overwritten: the loaded tensors still map it
        save_file(tensors, file, {"format": "pt"})
    else:
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
        if name == "blip:blip":
            put_on_hub("tests/pickled", folder, "a" * 40)
            check_refused("blip:tests/pickled", '"blip:tests/pickled"')
    check_refused(name, folder.name)
