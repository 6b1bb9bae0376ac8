"""Scorers and captioners on small random models: against the libraries alone, and refused."""

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
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor

from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import scorer as mini
from eval.clip_scores import captioners, load_models, models
from eval.clip_scores.models import ModelEntry
from eval.clip_scores.names import BLIP
from eval.digests import of_files
from tests.eval import clip_models
from tests.eval.clip_models import DIMENSION, pictures, put_on_hub, save_open_clip, sentences

WEIGHTS = "open_clip_model.safetensors"
KINDS = {"open_clip": "open_clip", "hf": "transformers", "blip": "blip"}
scorer_schemes = pytest.mark.parametrize("scheme", ["open_clip", "hf"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model of each kind, by scheme."""
    root = tmp_path_factory.mktemp("models")
    return {
        "open_clip": save_open_clip(root / "ours"),
        "hf": clip_models.save_hf_clip(root / "theirs"),
        "blip": clip_models.save_blip(root / "blip"),
    }


def test_a_model_is_named_by_its_weights_or_its_commit(folders):
    loaders: dict[str, Any] = {"open_clip": models, "hf": models}
    for scheme, folder in folders.items():
        (weights,) = folder.glob("*.safetensors")
        entry = loaders.get(scheme, captioners).load(f"{scheme}:{folder}").entry
        named = ModelEntry(f"{scheme}:{folder.name}", KINDS[scheme], folder.name, of_files(weights))
        assert replace(entry, note="") == named
        assert ("search" in entry.note) == (scheme == "blip")
    commit, default = "0123456789abcdef0123456789abcdef01234567", BLIP
    put_on_hub("tests/small-clip", folders["hf"], commit)
    put_on_hub(default, folders["blip"], commit)  # in the real one's place
    for revision in (None, "main", commit):
        entry = models.load("hf:tests/small-clip", revision=revision).entry
        assert entry == ModelEntry(
            "hf:tests/small-clip", "transformers", "tests/small-clip", commit
        )
        entry = captioners.load("blip", revision=revision).entry
        assert (entry.model, entry.revision) == (default, commit)


@torch.no_grad()
def i2t(scheme, folder, image, text):
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


@scorer_schemes
def test_i2t_is_the_librarys_whatever_the_batch_and_the_mode(folders, scheme):
    images, texts = [*pictures(3), *pictures(4, None)], sentences(7)
    one, many = (models.load(f"{scheme}:{folders[scheme]}", batch=batch) for batch in (3, 20))
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


def test_blip_is_generate_of_transformers(folders, tmp_path):
    """With three beams and 5 to 30 tokens, whatever the checkpoint's own settings are."""
    model: Any = BlipForConditionalGeneration.from_pretrained(folders["blip"])
    processor: Any = BlipProcessor.from_pretrained(folders["blip"])
    folder = clip_models.save_blip(tmp_path / "blip")
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


def test_retrieval_takes_the_nearest_caption(tmp_path, monkeypatch):
    folder = save_open_clip(tmp_path / "clip")
    (folder / "captions.txt").write_text("\n".join(sentences(20)))
    monkeypatch.setattr(mini, "scorer_dir", lambda: folder)  # a random model of the same form
    scorer, bank, images = models.load("embedded"), sentences(20), pictures(9)
    captioner, other = (captioners.retrieval(scorer, [*own, *own]) for own in (bank, bank[1:]))
    captions = captioner(images)
    nearest = (scorer.images(images) @ scorer.texts(bank).T).argmax(dim=1)
    assert captions == [bank[index] for index in nearest.tolist()]
    assert len(set(captions)) > 1
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded twice"))
    embedded = captioners.load("embedded", scorer)
    assert embedded(images) == captions
    entry = embedded.entry
    assert entry == captioner.entry
    assert str(entry.revision).startswith(f"{scorer.entry.revision}, captions ")
    assert entry.revision != other.entry.revision
    assert entry.name == f"{mini.NAME} retrieval"
    assert "nearest of 20, not generated" in entry.note


WITHOUT_REVISIONS = ("open_clip:ours", "embedded", "hf:theirs", "blip:blip")


class Boom:
    """Running this is what reading a pickle can do."""

    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "x"))


@pytest.fixture
def models_here(folders, tmp_path, monkeypatch):
    """The same in the working folder, to be damaged, and a pickle."""
    for folder in folders.values():
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Boom()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoil(file, how):
    """Damage a file; ``how`` may be a new text."""
    path = Path(file)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif how in ("gone", "pickle"):
        path.unlink()
        if how == "pickle":
            Path("pickle.pt").rename(path.parent / "pytorch_model.bin")
    elif how == "incomplete":
        tensors = load_file(path)
        del tensors[min(tensors)]
        save_file(tensors, path, {"format": "pt"})
    else:
        path.write_text(how)


def refused(given, *words):
    """A model, or MODEL@REVISION, is refused in one sentence in which each of the words stands."""
    name, _, revision = given.partition("@")
    captions = name.startswith("bl")
    names = ("open_clip:ours", name) if captions else (name, None)
    revisions = (None, revision or None) if captions else (revision or None, None)
    with pytest.raises(UserError) as caught:
        load_models(*names, revisions=revisions)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("embeded", ['"embeded"', 'did you mean "embedded"', "hf:ID"]),
        ("open_clip:ViT-B-32/opnai", ['"opnai"', 'did you mean "openai"', "laion400m_e31"]),
        ("hf:tests/absent", ['"hf:tests/absent"', "connection"]),
        ("blip:theirs", ["type clip", "not blip"]),
        *((f"{name}@v1", ['"v1"']) for name in WITHOUT_REVISIONS),
    ],
)
def test_a_model_that_can_not_be_had_is_refused(name, words, models_here):
    refused(name, *words)


OURS, THEIRS = "ours/open_clip_model.safetensors", "theirs/model.safetensors"
SCHEMES = {"ours": "open_clip", "theirs": "hf", "blip": "blip"}
DAMAGES = ("cut", "pickle", "incomplete")


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *((file, how) for file in (OURS, THEIRS) for how in DAMAGES),
        *((f"{folder}/tokenizer.json", "gone") for folder in SCHEMES),
    ],
)
def test_a_damaged_model_is_refused(file, how, models_here):
    spoil(file, how)
    folder = file.partition("/")[0]
    refused(f"{SCHEMES[folder]}:{folder}", folder)
    if (file, how) == (THEIRS, "pickle"):
        put_on_hub("tests/pickled", models_here / "theirs", "a" * 40)
        refused("hf:tests/pickled", '"hf:tests/pickled"')
