"""Latents and prompt embeddings on disk: a second run encodes nothing, and ends just alike."""

import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image import config, disk_cache
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.disk_cache import DiskCache
from bilora_diffusion.image.latents import LatentSpace
from tests.image.tiny import shared as shared_base
from tests.scripts.runs import alike, train

TENSORS = {"a": torch.rand(3, 5), "b": torch.rand(2).bfloat16(), "c": torch.arange(3)}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_tensors_come_back_bit_exact_for_their_own_key_only(tmp_path):
    def write_and_read(_):
        DiskCache(tmp_path, ["model"]).put(TENSORS, "key")
        tensors = DiskCache(tmp_path, ["model"]).get("key") or {}
        return list(tensors) == list(TENSORS) and all(
            torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items()
        )

    with ThreadPoolExecutor(8) as pool:  # several share the folder
        assert all(pool.map(write_and_read, range(40)))
    assert len(files(tmp_path)) == 1
    assert DiskCache(tmp_path, ["model"]).get("other") is None
    assert DiskCache(tmp_path, ["another model"]).get("key") is None
    assert DiskCache(tmp_path, ["modelkey"]).get() is None
    assert DiskCache(None, ["model"]).get("key") is None


def test_a_damaged_or_foreign_file_is_made_anew(tmp_path):
    DiskCache(tmp_path / "other").put(TENSORS, "other key")
    disk = DiskCache(tmp_path / "own")
    disk.put(TENSORS, "key")
    (file,) = files(tmp_path / "own")
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    foreign = files(tmp_path / "other")[0].read_bytes()
    for damaged in (content[:-1], b"not safetensors", flipped, foreign):
        file.write_bytes(damaged)
        assert disk.get("key") is None
        disk.put(TENSORS, "key")
        assert disk.get("key") is not None


def test_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_folder("auto") == tmp_path / "bilora-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert config.cache_folder("auto") == tmp_path / "home" / ".cache" / "bilora-diffusion"
    assert config.cache_folder("~/here") == tmp_path / "home" / "here"
    assert config.cache_folder("no") is None
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"new/cache.*can be written: give another"):
        resolve(["--dataset", "mini", "--disk_cache", str(tmp_path / "new" / "cache")])
    for place in ("auto", "no"):  # is only missed
        assert resolve(["--dataset", "mini", "--disk_cache", place])


def test_weights_are_known_by_every_bit_and_not_by_dates(tmp_path):
    hashes = []
    for number, name in enumerate(("a" * 64, "a" * 64, "b" * 64, "plain", "changed")):
        blob = tmp_path / "blobs" / name  # what the hub names by its content is not read
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(bytes([number]))
        part = tmp_path / str(number) / "vae"
        part.mkdir(parents=True)
        (part / "model.safetensors").symlink_to(blob)
        hashes.append(disk_cache.hash_files([part]))
    os.utime(tmp_path / "blobs" / "plain", (0, 0))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert disk_cache.hash_files([tmp_path / "3" / "vae"]) == hashes[3]
    settings = {"image_interpolation_mode": "lanczos", "allow_tf32": False}
    cfg: Any = SimpleNamespace(**settings, cache=tmp_path)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    space, device = LatentSpace.from_config(vae), torch.device("cpu")
    disk_cache.of_latents(cfg, space, vae, device).put(TENSORS, "image")
    assert disk_cache.of_latents(cfg, space, vae, device).get("image")
    with torch.no_grad():
        next(vae.parameters()).view(-1)[:1].add_(1)
    assert disk_cache.of_latents(cfg, space, vae, device).get("image") is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mini", "StableDiffusion3Pipeline"])
def test_a_second_run_encodes_nothing_and_ends_bit_exact(kind, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name, size in {"a": (64, 64), "b": (90, 90)}.items():
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "images" / f"{name}.png")
    shared: dict[str, Any] = {
        **{"dataset": tmp_path / "images", "instance_prompt": "a TOK icon", "resolution": 64},
        **{"disk_cache": tmp_path / "cache", "train_batch_size": 2, "seed": 3},
        **{"validation_dataset": tmp_path / "images", "max_train_steps": 1},
        "pretrained_model_name_or_path": "mini" if kind == "mini" else shared_base(kind),
    }
    first = train(tmp_path / "without", **{**shared, "disk_cache": "no"})
    cold = train(tmp_path / "cold", **shared)
    for kind_of_encoder in (CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(kind_of_encoder, "from_pretrained", None)
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    for folder in (cold, train(tmp_path / "warm", **shared)):
        alike(folder, first, "heldout_loss")


def test_a_folder_that_can_not_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "full").write_text("a file where the folder should be")
    disk = DiskCache(tmp_path / "full")
    for key in "abc":
        disk.put(TENSORS, key)
        assert disk.get(key) is None
    assert [record.message.count("--disk_cache") for record in caplog.records] == [1]
