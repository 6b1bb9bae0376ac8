"""Images on disk: the same noise for all, made once, whatever the order, batch and processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.seeds import seed_of
from eval.scores import store as store_module
from eval.scores.adapters import Adapter, parse
from eval.scores.prompts import Prompt
from eval.scores.store import Job, Sampling, Store, jobs
from tests.export.mini_loras import write_lora

PROMPTS = [Prompt(f"a ToK icon of a {name}, in the style of ToK") for name in ("Owl", "Cat", "Sun")]
SAMPLING = Sampling("mini", size=64, steps=2, guidance_scale=4.0)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("mini", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("loras")
    zero = write_lora(folder / "zero", pipeline, size=0.0)
    random = write_lora(folder / "random", pipeline)
    text = write_lora(folder / "text", pipeline, size=3.0, components=("text_encoder",))
    return parse(["base", f"Zero={zero}", f"Random={random}", f"Text={text}"])


@pytest.fixture(scope="module")
def made(
    pipeline: Any, adapters: list[Adapter], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, list[Job]]:
    """All adapters, three prompts, two seeds; tests only read it."""
    store = Store(tmp_path_factory.mktemp("store"), SAMPLING)
    todo = jobs(adapters, PROMPTS, [0, 7])
    assert store.generate(todo, pipeline=pipeline, progress=False) == 24
    return store, todo


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the sampler was asked for; the sampler itself is the real."""
    calls: list[int] = []

    def counted(pipeline: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompts))
        return generate(pipeline, prompts, *args, **kwargs)

    monkeypatch.setattr(store_module, "generate", counted)
    return calls


def pixels(store: Store, found: list[Job]) -> list[bytes]:
    return [store.open(job).tobytes() for job in found]


def of(found: list[Job], label: str) -> list[Job]:
    return [job for job in found if job.adapter.label == label]


def test_jobs_are_ordered_and_named_apart(made: tuple[Store, list[Job]]) -> None:
    store, todo = made
    assert len({job.file for job in todo}) == len(todo) == 24
    assert [(job.prompt, job.seed) for job in todo[:3]] == [
        (PROMPTS[0], 0),
        (PROMPTS[0], 7),
        (PROMPTS[1], 0),
    ]
    assert todo[0].file == Path("base-model/seed-0/001-a-tok-icon-of-a-owl-in-the-style-of-tok.png")
    assert sorted(path.relative_to(store.root) for path in store.root.rglob("*.*")) == sorted(
        job.file for job in todo
    )


def test_every_adapter_starts_from_the_same_noise(made: tuple[Store, list[Job]]) -> None:
    store, todo = made
    base = pixels(store, of(todo, "base model"))
    assert pixels(store, of(todo, "Zero")) == base
    for label in ("Random", "Text"):
        assert all(a != b for a, b in zip(pixels(store, of(todo, label)), base, strict=True))
    assert len(set(base)) == 6


def test_an_image_is_the_samplers_for_that_seed(
    made: tuple[Store, list[Job]], pipeline: Any
) -> None:
    store, todo = made
    job = todo[3]
    seed = seed_of("image", job.seed, job.prompt.text)
    (image,) = generate(pipeline, [job.prompt.text], [seed], size=64, steps=2, guidance_scale=4.0)
    ours, theirs = (np.asarray(picture).astype(int) for picture in (store.open(job), image))
    assert np.abs(ours - theirs).max() <= 1  # another size of batch rounds differently


def test_the_file_says_what_it_was_made_from(made: tuple[Store, list[Job]]) -> None:
    store, todo = made
    with Image.open(store.root / of(todo, "Random")[1].file) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
        found = json.loads(image.info["parameters"])
    assert found["versions"]["diffusers"]
    assert found["adapter"] == of(todo, "Random")[1].adapter.digest
    assert (found["seed"], found["prompt"]) == (7, PROMPTS[0].text)
    assert {"base_model", "base_digest", "steps", "size", "scale", "dtype", "lanes"} < set(found)


def test_order_batch_and_processes_change_no_bit(
    made: tuple[Store, list[Job]], pipeline: Any, tmp_path: Path
) -> None:
    store, todo = made
    expected = dict(zip([job.file for job in todo], pixels(store, todo), strict=True))
    backwards = Store(tmp_path / "backwards", SAMPLING)
    torch.set_num_threads(2)
    try:
        assert backwards.generate(todo[::-1], pipeline=pipeline, batch=5, progress=False) == 24
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    shared = Store(tmp_path / "shared", SAMPLING)
    halves = [
        shared.generate(todo, pipeline=pipeline, batch=3, progress=False, process=(rank, 2))
        for rank in (1, 0)
    ]
    assert halves == [12, 12]
    assert shared.missing(todo) == []
    for other in (backwards, shared):
        found = dict(zip([job.file for job in todo], pixels(other, todo), strict=True))
        assert found == expected


def test_only_what_is_missing_is_made(
    pipeline: Any, adapters: list[Adapter], tmp_path: Path, count: list[int]
) -> None:
    store = Store(tmp_path, SAMPLING)
    todo = jobs(adapters[:2], PROMPTS, [0])
    store.generate(todo[:2], pipeline=pipeline, progress=False)
    before = {job.file: (tmp_path / job.file).stat().st_mtime_ns for job in todo[:2]}
    assert store.missing(todo) == todo[2:]
    assert store.generate(todo, pipeline=pipeline, progress=False) == 4
    assert {file: (tmp_path / file).stat().st_mtime_ns for file in before} == before
    count.clear()
    assert store.generate(todo, progress=False) == 0  # and no pipeline is loaded
    assert count == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: path.write_bytes(b"no picture"),
        lambda path: path.write_bytes(
            path.read_bytes()[:-300] + bytes(8) + path.read_bytes()[-292:]
        ),
        lambda path: Image.new("RGB", (64, 64)).save(path),
        lambda path: path.unlink(),
    ],
    ids=["cut at the end", "cut in half", "not PNG", "flipped bytes", "unlabelled", "deleted"],
)
def test_a_damaged_file_is_made_again(
    damage: Any, pipeline: Any, made: tuple[Store, list[Job]], tmp_path: Path, count: list[int]
) -> None:
    whole, todo = made
    store = Store(tmp_path, SAMPLING)
    for job in todo[:3]:
        (tmp_path / job.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / job.file).write_bytes((whole.root / job.file).read_bytes())
    assert store.missing(todo[:3]) == []
    damage(tmp_path / todo[1].file)
    assert store.missing(todo[:3]) == [todo[1]]
    assert store.generate(todo[:3], pipeline=pipeline, progress=False) == 1
    assert count == [4]  # one image, and what fills the denoiser's batch
    assert store.open(todo[1]).tobytes() == whole.open(todo[1]).tobytes()


def test_what_a_kill_left_half_written_is_no_image(
    pipeline: Any, made: tuple[Store, list[Job]], tmp_path: Path
) -> None:
    whole, todo = made
    half = (tmp_path / todo[0].file).with_name(".tmp-" + todo[0].file.name)
    half.parent.mkdir(parents=True)
    half.write_bytes((whole.root / todo[0].file).read_bytes()[:1000])
    store = Store(tmp_path, SAMPLING)
    assert store.generate(todo[:1], pipeline=pipeline, progress=False) == 1
    assert not half.exists()
    assert store.open(todo[0]).tobytes() == whole.open(todo[0]).tobytes()


def test_a_changed_parameter_makes_images_again(made: tuple[Store, list[Job]]) -> None:
    store, todo = made
    changes: list[dict[str, Any]] = [
        {"steps": 3},
        {"size": 72},
        {"guidance_scale": 5.0},
        {"dtype": "bfloat16"},
        {"lanes": 2},
        {"base_model": "owner/other"},
    ]
    for change in changes:
        assert Store(store.root, replace(SAMPLING, **change)).missing(todo) == todo
    rescaled = Store(store.root, replace(SAMPLING, scale=0.5)).missing(todo)
    assert rescaled == todo[6:]  # the base model has nothing to scale
    other = [replace(job, adapter=replace(job.adapter, digest="0" * 64)) for job in todo]
    assert store.missing(other) == other
    reworded = [replace(job, prompt=Prompt("a cat")) for job in todo]
    assert store.missing(reworded) == reworded


def test_progress_starts_with_what_is_there(
    pipeline: Any, adapters: list[Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, SAMPLING)
    todo = jobs(adapters[:1], PROMPTS, [0])
    store.generate(todo[:2], pipeline=pipeline, progress=False)
    assert capsys.readouterr().err == ""
    store.generate(todo, pipeline=pipeline)
    shown = capsys.readouterr().err
    assert "2/3" in shown
    assert "3/3" in shown


def test_bad_values_are_refused(made: tuple[Store, list[Job]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"flaot32" \(did you mean "float32"\?\)'):
        replace(SAMPLING, dtype="flaot32")
    with pytest.raises(UserError, match="size is 65"):
        replace(SAMPLING, size=65)
    with pytest.raises(UserError, match="steps is 0"):
        replace(SAMPLING, steps=0)
    with pytest.raises(UserError, match="seed 1 is negative or given twice"):
        jobs([], PROMPTS, [1, 1])
    with pytest.raises(UserError, match="batch is 0"):
        made[0].generate(made[1], batch=0)
    with pytest.raises(UserError, match="missing or damaged"):
        Store(tmp_path, SAMPLING).open(made[1][0])
