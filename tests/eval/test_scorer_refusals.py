"""Scorers and captioners that can't be had, as the command refuses them: in one sentence."""

from __future__ import annotations

import pickle
from collections.abc import Callable
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
    to_open_clip,
)

OURS = "open_clip_model.safetensors"
THEIRS = "model.safetensors"


class Boom:
    """Running this is what reading a pickle can do."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("exploded"), "x"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders "ours" (open_clip), "theirs" (transformers) and "blip", where a test works."""
    model = make_hf_clip()
    save_open_clip(tmp_path / "ours", to_open_clip(model), quick_gelu=True)
    save_hf_clip(tmp_path / "theirs", model)
    save_blip(tmp_path / "blip")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Boom()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str, scorer: str = "open_clip:ours", captioner: str | None = None) -> None:
    """Each of the words stands in the sentence; a word before "@" is a revision."""
    names, revisions = [], []
    for name in (scorer, captioner):
        revision, at, rest = (name or "").partition("@")
        names.append(rest if at else name)
        revisions.append(revision if at else None)
    with pytest.raises(UserError) as caught:
        load_models(names[0], names[1], revisions=(revisions[0], revisions[1]))
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
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
        ("open_clip:theirs", [OURS, "hf:FOLDER"]),
        ("hf:./nowhere", ['"hf:./nowhere"']),
        ("hf:", ['"hf:"']),
        ("hf:tests/absent", ['"hf:tests/absent"', "connection"]),
        ("hf:ours", ['"hf:ours"']),
        (f"hf:{pipeline_dir()}/text_encoder", ["clip_text_model", "not clip"]),
        ("v1@open_clip:ours", ['"v1"', "hf:ID"]),
        ("v1@embedded", ['"v1"', '"embedded"']),
        ("v1@hf:theirs", ['"v1"', '"theirs"']),
    ],
)
def test_scorers(name: str, words: list[str], models: Path) -> None:
    refused(*words, scorer=name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blib:x", ['"blib:x"', 'did you mean "blip"']),
        ("embedded:x", ['"embedded:x"', "blip:ID_OR_FOLDER"]),
        ("blip:", ['"blip:"']),
        ("blip:tests/absent", ['"blip:tests/absent"']),
        ("blip:theirs", ["type clip", "not blip"]),
        ("coca:coca_ViT-L-14", ["mscoco_finetuned_laion2b_s13b_b90k"]),
        ("coca:coca_ViT-L-14/mscoco", ['"mscoco"']),
        ("coca:coca_base/x", ["safetensors"]),
        ("coca:coca_VIT-L-14/x", ['"coca_VIT-L-14/x"']),
        ("coca:ours", ["no CoCa", "coca_ViT-B-32"]),
        ("v1@coca:ours", ['"v1"']),
        ("v1@embedded", ['"v1"']),
        ("v1@blip:blip", ['"v1"']),
    ],
)
def test_captioners(name: str, words: list[str], models: Path) -> None:
    refused(*words, captioner=name)


def altered(file: str, change: Callable[[dict[str, Any], str], Any]) -> Callable[[], Any]:
    def spoil() -> None:
        tensors = load_file(file)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, file, {"format": "pt"})

    return spoil


def pickled(file: str, name: str) -> Callable[[], Any]:
    return lambda: (Path("pickle.pt").rename(Path(file).parent / name), Path(file).unlink())


FILES = {
    "open_clip": [f"ours/{OURS}", "ours/open_clip_config.json", "ours/tokenizer.json"],
    "hf": [f"theirs/{THEIRS}", "theirs/config.json", "theirs/tokenizer.json"],
    "blip": ["blip/tokenizer.json"],
}
DAMAGE: list[tuple[str, Callable[[], Any]]] = [
    *((scheme, Path(file).unlink) for scheme, files in FILES.items() for file in files),
    ("hf", Path("theirs/processor_config.json").unlink),
    ("open_clip", pickled(f"ours/{OURS}", "open_clip_pytorch_model.bin")),
    ("hf", pickled(f"theirs/{THEIRS}", "pytorch_model.bin")),
    *(
        (scheme, altered(FILES[scheme][0], change))
        for scheme in ("open_clip", "hf")
        for change in (
            lambda tensors, key: tensors.pop(key),
            lambda tensors, key: tensors.update({key: torch.zeros(3, 5)}),
        )
    ),
    *(
        (scheme, lambda file=Path(FILES[scheme][0]): file.write_bytes(file.read_bytes()[:500]))
        for scheme in ("open_clip", "hf")
    ),
    *(
        ("open_clip", lambda text=text: Path("ours/open_clip_config.json").write_text(text))
        for text in ("{}", "[]", "{", '{"model_cfg": {"embed_dim": 8}}')
    ),
    ("hf", lambda: Path("theirs/config.json").write_text("[]")),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_folders(number: int, models: Path) -> None:
    scheme, spoil = DAMAGE[number]
    spoil()
    folder = {"open_clip": "ours", "hf": "theirs", "blip": "blip"}[scheme]
    name = f"{scheme}:{folder}"
    if scheme == "blip":
        refused(folder, captioner=name)
    else:
        refused(folder, scorer=name)


def test_a_pickle_on_the_hub_is_not_read(models: Path) -> None:
    (models / "theirs" / THEIRS).unlink()
    (models / "pickle.pt").rename(models / "theirs" / "pytorch_model.bin")
    put_on_hub("tests/pickled", models / "theirs", "a" * 40)
    refused('"hf:tests/pickled"', scorer="hf:tests/pickled")


@pytest.mark.parametrize("name", ["open_clip:ours", "hf:theirs"])
def test_embeddings_that_are_not_finite(name: str, models: Path) -> None:
    for file in (f"ours/{OURS}", f"theirs/{THEIRS}"):
        altered(file, lambda tensors, _: [tensor.mul_(torch.nan) for tensor in tensors.values()])()
    scorer, _ = load_models(name, None)
    with pytest.raises(UserError, match="not finite"):
        scorer.images(pictures(1))
