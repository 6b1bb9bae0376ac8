"""Scorers and captioners that can't be had, as the command refuses them: in one sentence."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bilora_diffusion.errors import UserError
from eval.clip_scores import load_models
from tests.eval.clip_models import make_hf_clip, put_on_hub, save_blip, save_hf_clip, save_open_clip

OURS, THEIRS = "ours/open_clip_model.safetensors", "theirs/model.safetensors"
WITHOUT_REVISIONS = ("open_clip:ours", "embedded", "hf:theirs", "blip:blip")


class Boom:
    """Running this is what reading a pickle can do."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("exploded"), "x"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders "ours" (open_clip), "theirs" (transformers) and "blip", and a pickle."""
    root = tmp_path_factory.mktemp("models")
    save_open_clip(root / "ours")
    save_hf_clip(root / "theirs", make_hf_clip())
    save_blip(root / "blip")
    (root / "pickle.pt").write_bytes(pickle.dumps(Boom()))
    return root


@pytest.fixture(autouse=True)
def models(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same to be spoiled, where a test works."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoil(file: str, how: str) -> None:
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


def refused(given: str, *words: str) -> None:
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
def test_names(name: str, words: list[str]) -> None:
    refused(name, *words)


SCHEMES = {"ours": "open_clip", "theirs": "hf", "blip": "blip"}
DAMAGES = ("cut", "pickle", "incomplete")


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *((file, how) for file in (OURS, THEIRS) for how in DAMAGES),
        *((f"{folder}/tokenizer.json", "gone") for folder in SCHEMES),
    ],
)
def test_damaged_folders(file: str, how: str, models: Path) -> None:
    spoil(file, how)
    folder = file.partition("/")[0]
    refused(f"{SCHEMES[folder]}:{folder}", folder)
    if (file, how) == (THEIRS, "pickle"):
        put_on_hub("tests/pickled", models / "theirs", "a" * 40)
        refused("hf:tests/pickled", '"hf:tests/pickled"')
