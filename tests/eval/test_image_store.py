"""The image store: the same noise for all subjects, and each image is generated only once."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from eval.clip_scores import images as images_module
from eval.clip_scores.images import ImageBar, Store, jobs
from eval.clip_scores.prompts import Prompt
from eval.clip_scores.sampling import Sampling
from eval.subjects import single
from tests.export.export_models import write_lora

PROMPTS = [Prompt(f"a ToK icon of a {name}, in the style of ToK") for name in ("Owl", "Cat", "Sun")]
SEEDS = (0, 7)
SAMPLING = Sampling("mini", size=64, steps=2, guidance_scale=4.0)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("mini", dtype=torch.float32)


def new_store(root, pipeline, **changes):
    store = Store(root, replace(SAMPLING, **changes))
    store.pipeline = pipeline
    return store


@pytest.fixture(scope="module")
def store_and_jobs(pipeline, tmp_path_factory):
    """Return a store of four subjects' images, and label -> jobs of three prompts and two seeds.

    Tests must not change it.
    """
    folder = tmp_path_factory.mktemp("loras")
    zero = write_lora(folder / "zero", pipeline, size=1e-20)
    random = write_lora(folder / "random", pipeline)
    text = write_lora(folder / "text", pipeline, size=3.0, components=("text_encoder",))
    subjects = single(["base", f"Zero={zero}", f"Random={random}", f"Text={text}"])
    store = new_store(tmp_path_factory.mktemp("store"), pipeline)
    by_label = {subject.label: jobs(subject, PROMPTS, SEEDS) for subject in subjects}
    assert store.generate(all_jobs(by_label)) == 24
    return store, by_label


def all_jobs(by_label):
    return [job for subject_jobs in by_label.values() for job in subject_jobs]


def pixels(store, image_jobs):
    return [store.open(job).tobytes() for job in image_jobs]


def test_jobs_are_ordered_and_every_adapter_starts_from_the_same_noise(store_and_jobs):
    store, by_label = store_and_jobs
    files = [job.file for job in all_jobs(by_label)]
    assert len(set(files)) == 24
    files_of_store = [path.relative_to(store.root) for path in store.root.rglob("*.*")]
    assert sorted(files_of_store) == sorted(files)
    base, zero = by_label["base model"], by_label["Zero"]
    expected = list(itertools.product(PROMPTS, SEEDS))
    assert [(job.prompt, job.seed) for job in base] == expected
    assert base[0].file == Path("base-model/seed-0/001-a-tok-icon-of-a-owl-in-the-style-of-tok.png")
    assert zero[0].file.parts[0] == f"lora-{zero[0].subject.digest[:8]}"
    general = replace(PROMPTS[0], general=True)  # not the file of the scored prompt
    assert jobs(base[0].subject, [general], [0])[0].file != base[0].file
    base_pixels = pixels(store, base)
    assert len(set(base_pixels)) == 6
    # An adapter close to zero gives the base model's images, so the noise is the same.
    assert pixels(store, zero) == base_pixels
    for label in ("Random", "Text"):
        for image, base_image in zip(pixels(store, by_label[label]), base_pixels, strict=True):
            assert image != base_image
    with pytest.raises(UserError, match=r"gone\.png"):
        store.open(replace(base[0], file=Path("gone.png")))


def test_rounded_weights_give_different_images(store_and_jobs, pipeline, tmp_path):
    plain_store, by_label = store_and_jobs
    todo = [by_label["Random"][0], by_label["base model"][0], by_label["Zero"][0]]
    rounded = new_store(tmp_path, pipeline, base_precision="int3")
    rounded.generate(todo)
    random_image, base_image, zero_image = pixels(rounded, todo)
    # For each subject, the base model's original weights are rounded.
    assert base_image == zero_image != random_image
    for image, plain_image in zip(pixels(rounded, todo), pixels(plain_store, todo), strict=True):
        assert image != plain_image


def test_only_missing_or_damaged_images_are_generated_again(
    store_and_jobs, pipeline, tmp_path, monkeypatch, capsys
):
    counts: list[int] = []

    def counting_generate(pipeline, prompts, *args, **kwargs):
        counts.append(len(prompts))
        return generate(pipeline, prompts, *args, **kwargs)

    monkeypatch.setattr(images_module, "generate", counting_generate)
    whole_store, by_label = store_and_jobs
    shutil.copytree(whole_store.root, tmp_path, dirs_exist_ok=True)
    store, todo = new_store(tmp_path, pipeline), by_label["Zero"]
    assert store.missing(todo) == []

    intact, cut, flipped, unlabelled, unfinished, no_picture = (tmp_path / j.file for j in todo)
    before = intact.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-20])
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-300] + bytes(8) + content[-292:])  # the size stays
    Image.new("RGB", (64, 64)).save(unlabelled)
    unfinished.rename(unfinished.with_name(f".tmp-{unfinished.name}"))  # as after a kill
    no_picture.write_bytes(b"no picture")
    assert store.missing(todo) == todo[1:]
    with ImageBar(store, store.missing(todo)) as bar:
        # The second of two processes finishes first. The bar also counts its images.
        assert store.generate(todo, batch=3, process=(1, 2)) == 3
        assert store.generate(todo, batch=3, process=(0, 2), bar=bar) == 2
    assert counts == [4, 4]  # five images, and the padding of the denoiser's batches
    progress = capsys.readouterr().err
    assert "0/5" in progress  # missing images only
    assert "5/5" in progress
    assert pixels(store, todo) == pixels(whole_store, todo)
    assert intact.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob(".tmp-*"))
    monkeypatch.setattr(store, "pipeline", None)  # no pipeline is needed for 0 images
    assert store.generate(todo) == 0


def test_images_are_generated_again_if_a_parameter_has_changed(store_and_jobs, pipeline):
    store, by_label = store_and_jobs
    todo = all_jobs(by_label)
    changes: dict[str, Any] = {
        "steps": 3,
        "size": 72,
        "guidance_scale": 5.0,
        "dtype": "bfloat16",
        "lanes": 2,
        "base_model": "owner/other",
        "base_precision": "int8",
        "weight_noise": 0.1,
    }
    for name, value in changes.items():
        assert new_store(store.root, pipeline, **{name: value}).missing(todo) == todo
    # The base model, whose six jobs come first, has no adapter to scale or to leave out.
    for name, value in (("scale", 0.5), ("guidance_from", "base"), ("guidance_from", 0.5)):
        assert new_store(store.root, pipeline, **{name: value}).missing(todo) == todo[6:]
    # Images from before these options existed stay valid.
    newer_names = {"guidance_from", "base_precision", "weight_noise"}
    assert newer_names.isdisjoint(store.parameters(todo[-1]))
    for job in todo:
        other_weights = replace(job.subject, digest="0" * 64)
        for changed_job in (replace(job, subject=other_weights), replace(job, prompt=Prompt("a"))):
            assert store.missing([changed_job]) == [changed_job]
