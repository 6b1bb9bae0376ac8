"""What the Generate tab asks for, and drawing that can be stopped, on the miniature."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from app.catalog import Catalog
from app.drawing import (
    BASE,
    BaseChoice,
    Pipelines,
    Request,
    Stopped,
    Work,
    checked,
    drawable,
    local,
    sides,
)
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from tests.app.test_app_catalog import make_run

PROMPT = "a TOK icon of a rabbit, in the style of TOK"
REQUEST = Request(PROMPT, seed=3, steps=2, guidance_scale=4.0, scale=1.0)


@pytest.fixture(scope="module")
def models() -> Pipelines:
    """The miniature, loaded once."""
    return Pipelines("cpu")


def test_an_image_is_that_of_the_evaluation(models: Pipelines) -> None:
    steps: list[int] = []
    image = models.draw(
        BaseChoice("mini"), None, REQUEST, stop=threading.Event(), on_step=steps.append
    )
    assert steps == [1, 2]
    pipeline = load_pipeline("mini", dtype=torch.float32)
    (expected,) = generate(pipeline, [PROMPT], [3], size=64, steps=2, guidance_scale=4.0)
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_a_stop_ends_the_work_at_the_next_step_and_frees_the_pipeline(models: Pipelines) -> None:
    stop, steps = threading.Event(), []

    def on_step(step: int) -> None:
        steps.append(step)
        if step == 2:
            stop.set()

    many = Request(PROMPT, seed=0, steps=50, guidance_scale=4.0, scale=1.0)
    with pytest.raises(Stopped):
        models.draw(BaseChoice("mini"), None, many, stop=stop, on_step=on_step)
    assert steps == [1, 2]
    loaded = models._pipeline
    models.draw(BaseChoice("mini"), None, REQUEST, stop=threading.Event(), on_step=steps.append)
    assert steps == [1, 2, 1, 2]  # the hook of the first has gone with it
    assert models._pipeline is loaded  # and the pipeline stays


def test_turns_come_in_order_and_who_waits_can_be_stopped(models: Pipelines) -> None:
    works = [Work([("one", None)], BaseChoice("mini"), REQUEST, "/place/") for _ in range(3)]
    threads = []
    with models.turn(threading.Event(), lambda ahead: None):
        for number, work in enumerate(works, start=1):
            threads.append(threading.Thread(target=work.run, args=(models,)))
            threads[-1].start()
            assert work.news.get(timeout=120) == ("wait", number)
        works[0].stop.set()
        assert works[0].news.get(timeout=120) == ("stopped", "Cancelled.")
        for number, work in enumerate(works[1:], start=1):
            assert work.news.get(timeout=120) == ("wait", number)
    for thread in threads:
        thread.join(60)
    for work in works[1:]:
        news = [work.news.get_nowait() for _ in range(work.news.qsize())]
        assert news[-1] == ("end", "Done.")


def test_work_reports_its_course_and_what_is_wrong_without_places(
    models: Pipelines, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "lora")  # its weights are an empty file
    sides: list[tuple[str, Path | None]] = [("one", None), ("other", None), ("lora", folder)]
    work = Work(sides, BaseChoice("mini"), REQUEST, f"{tmp_path}/")
    work.run(models)
    news = [work.news.get_nowait() for _ in range(work.news.qsize())]
    course = ["begun", "step", "step", "image"] * 2
    assert [kind for kind, _ in news] == [*course, "begun", "error"]
    assert [value for kind, value in news if kind == "step"] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    sentence = news[-1][1]
    assert "lora" in sentence
    assert str(tmp_path) not in sentence


def test_two_choices_become_a_base_and_folders(tmp_path: Path) -> None:
    config = {"pretrained_model_name_or_path": "mini", "resolution": 64}
    make_run(tmp_path / "a", config=config)
    make_run(tmp_path / "b", seed=1, config={"pretrained_model_name_or_path": "owner/other"})
    catalog = Catalog(tmp_path)
    base, chosen, size = sides(catalog, "a", BASE)
    assert (base, size) == (BaseChoice("mini"), 64)
    assert chosen == [("LoRA, seed 0", (tmp_path / "a").resolve()), ("base model", None)]
    with pytest.raises(UserError, match="different base models, mini and owner/other"):
        sides(catalog, "a", "b")
    with pytest.raises(UserError, match='the run "c" has gone'):
        sides(catalog, "c", "a")


def test_only_runs_with_weights_for_sdxl_below_the_root_can_be_drawn(tmp_path: Path) -> None:
    weights, root = "pytorch_lora_weights.safetensors", tmp_path / "root"
    text = make_run(root / "text")
    (text / weights).rename(text / "adapter_model.safetensors")
    (make_run(root / "young") / weights).unlink()
    (make_run(root / "icons") / weights).unlink()
    (root / "icons" / weights).symlink_to(make_run(tmp_path / "outside") / weights)
    catalog = Catalog(root)
    assert [run.path for run in catalog.runs() if drawable(run)] == ["icons"]
    with pytest.raises(UserError, match="leads out of the root"):
        sides(catalog, "icons", BASE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((" ", 0, 25, 4, 1), "prompt is empty"),
        ((PROMPT, None, 25, 4, 1), "the seed is None"),
        ((PROMPT, -1, 25, 4, 1), "the seed is -1"),
        ((PROMPT, 2**32, 25, 4, 1), "the seed is 4294967296"),
        ((PROMPT, 0, 0, 4, 1), "number of steps is 0"),
        ((PROMPT, 0, 10_000, 4, 1), "number of steps is 10000"),
    ],
)
def test_bad_values_are_refused(values: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        checked(*values)


def test_a_model_that_is_not_here_and_a_device_that_is_not_here_are_refused() -> None:
    with pytest.raises(UserError, match="hf download owner/absent"):
        local(BaseChoice("owner/absent"))
    with pytest.raises(UserError, match='--device "abacus"'):
        Pipelines("abacus")
