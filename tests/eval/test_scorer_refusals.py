"""Scorers and captioners that can't be had, as the command refuses them: in one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import pipeline_dir
from eval.clip_scores import load_models
from tests.eval.clip_models import (
    make_hf_clip,
    pictures,
    put_on_hub,
    save_blip,
    save_hf_clip,
    save_open_clip,
)

OURS, THEIRS = "ours/open_clip_model.safetensors", "theirs/model.safetensors"
CONFIG = "ours/open_clip_config.json"


class Boom:
    """Running this is what reading a pickle can do."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("exploded"), "x"))


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders "ours" (open_clip), "theirs" (transformers) and "blip", where a test works."""
    save_open_clip(tmp_path / "ours")
    save_hf_clip(tmp_path / "theirs", make_hf_clip())
    save_blip(tmp_path / "blip")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Boom()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(name: str, *words: str, revision: str | None = None) -> None:
    """A model is refused in one sentence in which each of the words stands."""
    captions = name.startswith(("bl", "coca"))
    scorer, captioner = ("open_clip:ours", name) if captions else (name, None)
    revisions = (None, revision) if captions else (revision, None)
    with pytest.raises(UserError) as caught:
        load_models(scorer, captioner, revisions=revisions)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("opneclip:ViT-B-32/openai", ['"opneclip:ViT-B-32/openai"', '"open_clip"', "hf:ID"]),
        ("embeded", ['"embeded"', 'did you mean "embedded"']),
        ("embedded:x", ['"embedded:x"']),
        ("open_clip", ["open_clip:MODEL/TAG"]),
        ("open_clip:", ["MODEL/TAG"]),
        ("open_clip:ViT-B-33/openai", ['"ViT-B-33/openai"', "MODEL/TAG"]),
        ("open_clip:ViT-B-32/opnai", ['"opnai"', 'did you mean "openai"', "laion400m_e31"]),
        ("open_clip:ViT-B-32", ["openai, laion400m_e31"]),
        ("open_clip:ViT-B-32/pickle.pt", ['"pickle.pt"', "a pickle can run code"]),
        ("open_clip:./nowhere", ['"./nowhere"']),
        ("open_clip:theirs", ['"theirs"', "hf:FOLDER"]),
        ("hf:./nowhere", ['"hf:./nowhere"']),
        ("hf:", ['"hf:"']),
        ("hf:tests/absent", ['"hf:tests/absent"', "connection"]),
        ("hf:ours", ['"hf:ours"']),
        (f"hf:{pipeline_dir()}/text_encoder", ["clip_text_model", "not clip"]),
        ("blib:x", ['"blib:x"', 'did you mean "blip"']),
        ("blip:", ['"blip:"']),
        ("blip:tests/absent", ['"blip:tests/absent"']),
        ("blip:theirs", ["type clip", "not blip"]),
        ("coca:coca_ViT-L-14/mscoco", ['"mscoco"', "mscoco_finetuned_laion2b_s13b_b90k"]),
        ("coca:coca_base/x", ['"x"', "safetensors"]),
        ("coca:ours", ["no CoCa", "coca_ViT-B-32"]),
    ],
)
def test_names(name: str, words: list[str]) -> None:
    refused(name, *words)


@pytest.mark.parametrize(
    "name", ["open_clip:ours", "embedded", "hf:theirs", "coca:ours", "blip:blip"]
)
def test_a_revision_of_what_has_none(name: str) -> None:
    refused(name, '"v1"', revision="v1")


def spoil(file: str, how: str) -> None:
    """Damage a file; ``how`` may be a new text."""
    path = Path(file)
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif how == "pickle":
        path.unlink()
        Path("pickle.pt").rename(path.parent / "pytorch_model.bin")
    elif how in ("incomplete", "misshapen", "nan"):
        tensors = load_file(path)
        key = sorted(tensors)[0]
        changed = {"misshapen": {key: torch.zeros(3, 5)}, "incomplete": {}}
        kept = {name: tensor for name, tensor in tensors.items() if name != key}
        broken = {name: tensor * torch.nan for name, tensor in tensors.items()}
        save_file(broken if how == "nan" else kept | changed[how], path, {"format": "pt"})
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    ("name", "file", "how"),
    [
        *(
            (name, file, how)
            for name, file in (("open_clip:ours", OURS), ("hf:theirs", THEIRS))
            for how in ("gone", "cut", "pickle", "incomplete", "misshapen")
        ),
        *(
            ("open_clip:ours", CONFIG, how)
            for how in ("gone", "{", "[]", '{"model_cfg": {"a": 1}}')
        ),
        *(("hf:theirs", "theirs/config.json", how) for how in ("gone", "[]")),
        ("hf:theirs", "theirs/processor_config.json", "gone"),
        *(
            (n, f"{n.split(':')[1]}/tokenizer.json", "gone")
            for n in ("open_clip:ours", "hf:theirs", "blip:blip")
        ),
    ],
)
def test_damaged_folders(name: str, file: str, how: str) -> None:
    spoil(file, how)
    refused(name, name.partition(":")[2])


def test_a_pickle_on_the_hub_is_not_read(models: Path) -> None:
    spoil(THEIRS, "pickle")
    put_on_hub("tests/pickled", models / "theirs", "a" * 40)
    refused("hf:tests/pickled", '"hf:tests/pickled"')


@pytest.mark.parametrize(("name", "file"), [("open_clip:ours", OURS), ("hf:theirs", THEIRS)])
def test_embeddings_that_are_not_finite(name: str, file: str) -> None:
    spoil(file, "nan")
    scorer, _ = load_models(name, None)
    with pytest.raises(UserError, match="not finite"):
        scorer.images(pictures(1))
