"""Latents and prompt embeddings on disk: a second run encodes nothing, and ends just alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion import identity
from bilora_diffusion.errors import UserError
from bilora_diffusion.image import places, shelves
from bilora_diffusion.image.config import parse
from bilora_diffusion.image.latents import Encoder, LatentSpace
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.prompts import PromptCache
from bilora_diffusion.image.resized import Resized
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.image.shelf import Shelf
from bilora_diffusion.image.visits import Visit, VisitStream
from tests.image.tiny import saved
from tests.scripts.runs import column, difference, flags, train

CPU = torch.device("cpu")
TENSORS = {"a": torch.rand(3, 5), "b": torch.rand(2).bfloat16(), "c": torch.arange(3)}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("mini", dtype=torch.float32)


def pictures(folder: Path) -> ImageSet:
    """Two squares, and one whose crops vary."""
    folder.mkdir()
    for name, size in {"a": (64, 64), "b": (90, 90), "odd": (96, 64)}.items():
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{name}.png")
    return open_images(str(folder))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_tensors_come_back_to_the_bit_for_their_own_key_only(tmp_path: Path) -> None:
    Shelf(tmp_path, "model").put(TENSORS, "key")
    found = Shelf(tmp_path, "model").get("key")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)
    assert Shelf(tmp_path, "model").get("other") is None
    assert Shelf(tmp_path, "another model").get("key") is None
    assert Shelf(tmp_path, "modelkey").get() is None
    assert Shelf(None, "model").get("key") is None


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "one bit": flip,
    "no tensors": lambda file: file.write_text("not safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_as_none_and_is_replaced(damage: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put(TENSORS, "key")
    DAMAGES[damage](files(tmp_path)[0])
    assert shelf.get("key") is None
    shelf.put(TENSORS, "key")
    assert shelf.get("key") is not None


def test_a_file_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put(TENSORS, "one")
    (one,) = files(tmp_path)
    shelf.put({"a": torch.zeros(1)}, "other")
    (other,) = set(files(tmp_path)) - {one}
    one.replace(other)
    assert shelf.get("other") is None


def test_many_write_the_same_at_a_time(tmp_path: Path) -> None:
    large = {"a": torch.rand(300, 300)}

    def both(_: int) -> bool:
        shelf = Shelf(tmp_path)
        shelf.put(large, "key")
        found = shelf.get("key")
        return found is not None and torch.equal(found["a"], large["a"])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(both, range(40)))
    assert len(files(tmp_path)) == 1


def test_what_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "full").write_text("a file where the folder should be")
    shelf = Shelf(tmp_path / "full")
    for key in "abc":
        shelf.put(TENSORS, key)
        assert shelf.get(key) is None
    assert [record.message.count("--disk_cache") for record in caplog.records] == [1]


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert places.folder("auto") == tmp_path / "bilora-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert places.folder("auto") == tmp_path / "home" / ".cache" / "bilora-diffusion"
    assert places.folder("~/here") == tmp_path / "home" / "here"
    assert places.folder("no") is None
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"new/cache.*is not writable: change its permissions"):
        places.check(str(tmp_path / "new" / "cache"))
    places.check("auto")  # is only missed
    places.check("no")


def test_a_model_is_known_by_every_bit_of_its_files_and_not_by_their_dates(tmp_path: Path) -> None:
    one, other = tmp_path / "x" / "vae", tmp_path / "y" / "vae"
    for folder in (one, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(1000))
    assert identity.of_files([one]) == identity.of_files([other])
    dates = (other / "model.safetensors").stat()
    flip(other / "model.safetensors")
    os.utime(other / "model.safetensors", ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert identity.of_files([one]) != identity.of_files([other])


def test_a_blob_of_the_hub_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    known = []
    for number, name in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        (tmp_path / "blobs" / name).write_bytes(bytes(8))
        part = tmp_path / str(number) / "vae"
        part.mkdir(parents=True)
        (part / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
        known.append(identity.of_files([part]))
    assert known[0] == known[1] != known[2]


class Words:
    """A kind of model that notes what it embeds, as rows of their own lengths and as a tensor."""

    encoders = ()

    def __init__(self) -> None:
        self.seen: list[str] = []

    def embed(self, pipeline: Any, prompts: Any) -> Any:
        self.seen += prompts
        rows = [torch.full((1 + len(prompt), 2), float(len(prompt))) for prompt in prompts]
        return {"sequence": rows, "pooled": torch.stack([row.sum(0) for row in rows])}


def test_prompts_are_embedded_one_by_one_and_only_those_that_lack(tmp_path: Path) -> None:
    family: Any = Words()
    read: list[int] = []

    def cache() -> PromptCache:
        return PromptCache(None, CPU, family, Shelf(tmp_path), lambda: read.append(1))

    first = cache()(["a cat", "a red dog"])
    assert family.seen == ["a cat", "a red dog"]
    second = cache()(["a red dog", "an owl", "a cat"])
    assert family.seen == ["a cat", "a red dog", "an owl"]
    assert len(read) == 2
    assert torch.equal(second["pooled"][[2, 0]], first["pooled"])
    assert [len(row) for row in second["sequence"]] == [10, 7, 6]
    cache()(["an owl", "a cat"])
    assert len(read) == 2


def test_one_odd_image_keeps_no_other_from_the_disk(pipeline: Any, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images")
    given = {"dataset": tmp_path / "images", "instance_prompt": "x", "random_flip": True}
    given |= {"pretrained_model_name_or_path": "mini", "disk_cache": tmp_path / "cache"}
    cfg = parse(flags(tmp_path / "run", **given))
    space, encoded = LatentSpace.of(pipeline.vae), []

    class Counting(Encoder):
        def _encoded(self, visits: Any, at_once: int) -> Any:
            encoded.extend(visit.name for visit in visits)
            return super()._encoded(visits, at_once)

    def posteriors() -> list[Any]:
        stream = VisitStream(cfg, images)
        shelf = shelves.of_latents(cfg, space, pipeline.vae, CPU)
        encode = Counting(pipeline.vae, space, CPU, stream.keeps, shelf)
        schedule = [(step, (0, 1, 2)) for step in range(4)]
        return [one for _, visits in stream.visits(schedule, 3) for one in encode(visits)]

    cold = posteriors()
    before, _ = len(encoded), encoded.clear()
    warm = posteriors()
    assert before > len(encoded)
    assert encoded == ["odd.png"] * 4
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(cold, warm, strict=True))
    assert all(torch.equal(a.std, b.std) for a, b in zip(cold, warm, strict=True))
    with torch.no_grad():
        first = next(pipeline.vae.parameters()).flatten()[:1]
        first += 1
        posteriors()  # of another autoencoder
        first -= 1
    assert sorted(set(encoded)) == ["a.png", "b.png", "odd.png"]


def test_resized_images_are_decoded_once_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, decoded = pictures(tmp_path / "images"), []
    image = ImageSet.image

    def counted(self: ImageSet, i: int) -> Any:
        decoded.append(i)
        return image(self, i)

    monkeypatch.setattr(ImageSet, "image", counted)
    cfg: Any = SimpleNamespace(image_interpolation_mode="lanczos")

    def seen(resized: Resized | None) -> list[torch.Tensor]:
        draw = [(0, False), (9, True), (32, False)]
        crops = [SimpleNamespace(top=0, left=left, flipped=flipped) for left, flipped in draw]
        visits: Any = [Visit(images, cfg, "", 2, 0, crop, (64, 64), "") for crop in crops]  # pyright: ignore[reportArgumentType]
        return [visit.read(resized)[0] for visit in visits]

    plain = seen(None)
    assert decoded == [2, 2, 2]
    assert all(map(torch.equal, seen(Resized(64 * 96 * 3)), plain))
    assert decoded == [2] * 4
    assert all(map(torch.equal, seen(Resized(64 * 96 * 3 - 1)), plain))
    assert decoded == [2] * 7


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of each encoder that was read or called, in order."""
    seen: list[str] = []

    def counted(kind: Any, name: str, word: str) -> None:
        before = getattr(kind, name)

        def after(*args: Any, **words: Any) -> Any:
            seen.append(f"{word} {kind.__name__}")
            return before(*args, **words)

        monkeypatch.setattr(kind, name, after)

    counted(AutoencoderKL, "encode", "called")
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        counted(kind, "forward", "called")
        counted(kind, "from_pretrained", "read")
    return seen


@pytest.mark.parametrize("kind", ["mini", "StableDiffusion3Pipeline"])
def test_a_second_run_encodes_nothing_and_ends_to_the_bit_alike(
    kind: str, calls: list[str], tmp_path: Path
) -> None:
    pictures(tmp_path / "images")
    (tmp_path / "images" / "odd.png").unlink()
    shared: dict[str, Any] = {
        **{"dataset": tmp_path / "images", "instance_prompt": "a TOK icon", "resolution": 64},
        **{"disk_cache": tmp_path / "cache", "train_batch_size": 2, "seed": 3},
        "pretrained_model_name_or_path": "mini" if kind == "mini" else saved(kind, tmp_path / "m"),
    }
    measured = {**shared, "validation_dataset": tmp_path / "images", "validation_loss_steps": 1}
    folders = [train(tmp_path / "without", **{**measured, "disk_cache": "no"})]
    folders.append(train(tmp_path / "cold", **measured))
    assert any("called AutoencoderKL" in call for call in calls)
    assert any("called CLIP" in call for call in calls)
    calls.clear()
    folders.append(train(tmp_path / "warm", **measured))
    assert calls == []
    for folder in folders[1:]:
        for key in ("loss", "digest", "heldout_loss"):
            assert column(folder, key) == column(folders[0], key)
        assert difference(folder, folders[0]) == 0


@pytest.mark.slow
def test_trained_text_encoders_are_not_kept(tmp_path: Path) -> None:
    train(tmp_path / "run", disk_cache=tmp_path / "cache", train_text_encoder=True)
    assert files(tmp_path / "cache" / "latents")
    assert not (tmp_path / "cache" / "prompts").exists()
