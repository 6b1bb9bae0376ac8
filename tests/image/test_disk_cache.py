"""Latents and embeddings on disk: a second run encodes nothing and gets the same result."""

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
from tests.scripts.runs import assert_same_run, train

TENSORS = {"a": torch.rand(3, 5), "b": torch.rand(2).bfloat16(), "c": torch.arange(3)}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_tensors_are_restored_bit_for_bit_and_only_for_their_own_key(tmp_path):
    def write_and_read(_):
        DiskCache(tmp_path, ["model"]).put(TENSORS, "key")
        return DiskCache(tmp_path, ["model"]).get("key")

    with ThreadPoolExecutor(8) as pool:  # several threads share the folder
        for tensors in pool.map(write_and_read, range(40)):
            torch.testing.assert_close(tensors, TENSORS, rtol=0, atol=0)
    assert len(files(tmp_path)) == 1
    assert DiskCache(tmp_path, ["model"]).get("other") is None
    assert DiskCache(tmp_path, ["another model"]).get("key") is None
    assert DiskCache(tmp_path, ["modelkey"]).get() is None
    assert DiskCache(None, ["model"]).get("key") is None


def test_a_damaged_or_foreign_file_is_ignored_and_replaced(tmp_path):
    disk = DiskCache(tmp_path)
    disk.put(TENSORS, "another key")
    (other_file,) = files(tmp_path)
    foreign = other_file.read_bytes()
    other_file.unlink()
    disk.put(TENSORS, "key")
    (file,) = files(tmp_path)
    content = file.read_bytes()
    flipped_bit = content[:-1] + bytes([content[-1] ^ 1])
    for damaged in (content[:-1], b"not safetensors", flipped_bit, foreign):
        file.write_bytes(damaged)
        assert disk.get("key") is None
        disk.put(TENSORS, "key")
        assert disk.get("key") is not None


def test_the_option_or_the_system_sets_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_folder("auto") == tmp_path / "bilora-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert config.cache_folder("auto") == tmp_path / "home" / ".cache" / "bilora-diffusion"
    assert config.cache_folder("~/here") == tmp_path / "home" / "here"
    assert config.cache_folder("no") is None
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"--disk_cache .* can be written: give another"):
        resolve(["--dataset", "mini", "--disk_cache", str(tmp_path / "new" / "cache")])
    for place in ("auto", "no"):  # the default folder need not be writable
        assert resolve(["--dataset", "mini", "--disk_cache", place])


def test_files_are_hashed_by_content_and_not_by_date(tmp_path):
    def hash_of(content, file_name="weights", date=0):
        """Return the hash of a model whose file is a link to a blob, as in the Hub's cache."""
        blob = tmp_path / "blobs" / file_name
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        link = tmp_path / "vae" / "model.safetensors"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        os.utime(blob, (date, date))
        return disk_cache.hash_files([link.parent])

    hash_of_zero = hash_of(b"0")
    assert hash_of(b"1") != hash_of_zero
    assert hash_of(b"0", date=1) == hash_of_zero
    # The Hub names a blob by its content's hash, so the content is not read.
    hash_by_name = hash_of(b"0", "a" * 64)
    assert hash_of(b"1", "a" * 64) == hash_by_name
    assert hash_of(b"1", "b" * 64) != hash_by_name


def test_cached_latents_are_not_used_after_any_change_of_the_autoencoder(tmp_path):
    cfg: Any = SimpleNamespace(image_interpolation_mode="lanczos", allow_tf32=False, cache=tmp_path)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)

    def cache():
        return disk_cache.latent_cache(cfg, LatentSpace.from_config(vae), vae, torch.device("cpu"))

    cache().put(TENSORS, "image")
    assert cache().get("image")
    next(vae.parameters()).data.view(-1)[0] += 1
    assert cache().get("image") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["mini", pytest.param("StableDiffusion3Pipeline", marks=pytest.mark.matrix)]
)
def test_a_second_run_encodes_nothing_and_ends_bit_for_bit_the_same(kind, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name, size in {"a": (64, 64), "b": (90, 90)}.items():
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "images" / f"{name}.png")
    shared: dict[str, Any] = {
        "dataset": tmp_path / "images",
        "validation_dataset": tmp_path / "images",
        "instance_prompt": "a TOK icon",
        "resolution": 64,
        "train_batch_size": 2,
        "seed": 3,
        "max_train_steps": 1,
        "pretrained_model_name_or_path": "mini" if kind == "mini" else shared_base(kind),
    }
    uncached = train(tmp_path / "uncached", **shared, disk_cache="no")
    cold = train(tmp_path / "cold", **shared, disk_cache=tmp_path / "cache")
    assert_same_run(cold, uncached, "heldout_loss")
    # Encoding fails from here on.
    for encoder in (CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(encoder, "from_pretrained", None)
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    warm = train(tmp_path / "warm", **shared, disk_cache=tmp_path / "cache")
    assert_same_run(warm, uncached, "heldout_loss")


def test_an_unwritable_folder_gives_a_single_warning(tmp_path, caplog):
    (tmp_path / "full").write_text("a file where the folder should be")
    disk = DiskCache(tmp_path / "full")
    for key in "abc":
        disk.put(TENSORS, key)
        assert disk.get(key) is None
    (warning,) = caplog.messages
    assert "--disk_cache" in warning
