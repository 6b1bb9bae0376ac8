"""The grid of checkpoints against strengths, on a run of the miniature."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from app.catalog import Catalog
from app.generate import Work
from app.grid import Grid, spread
from app.parts import data_uri
from app.sampling import BaseChoice, Pipelines, Request, exported
from bilora_diffusion.run.checkpoint import CHECKPOINTS
from tests.app.folders import make_run
from tests.scripts.runs import copied, train_once

REQUEST: Any = SimpleNamespace(session_hash="me")
IMAGE = re.compile(r'<img src="([^"]*)" alt="([^"]*)"')


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid of a run of two steps, each with a checkpoint, beside a run without any."""
    monkeypatch.setattr("app.grid.usual", lambda _: (2, 4.0))
    copied(train_once(checkpointing_steps=1), tmp_path / "run")
    make_run(tmp_path / "young")
    with gr.Blocks() as page:
        return Grid(Work(Catalog(tmp_path), page, "cpu"), page.load)


def draw(grid, *, steps=(2, 1), strengths="0.5, 2", run="run", both=False):
    """What a grid of two sampler steps yields."""
    form = run, list(steps), strengths, "a fox", 3, both, REQUEST
    return grid.sample(grid.work.begin(REQUEST), *form, lambda *_, **__: None)


def test_each_image_is_that_of_its_checkpoint_at_its_strength(grid):
    *rows, (status, last) = draw(grid)
    assert [table.count("<img") for _, table in rows] == [0, 2]
    assert "a fox, seed 3, by run (Bi-LoRA, seed 0)" in status
    images = {name: address for address, name in IMAGE.findall(last)}
    names = [f"step {step}, strength {strength}" for step in (1, 2) for strength in ("0.5", "2")]
    assert ([*images], len({*images.values()})) == (names, 4)
    run = next(run for run in grid.catalog.scan.runs if run.path == "run")
    request = Request("a fox", 3, 2, 4.0, 2.0, run.record["config"]["resolution"])
    by_base = replace(request, guidance_from="base")
    with exported(grid.catalog, run, 1) as file:
        expected = Pipelines("cpu").sample(BaseChoice("mini"), file, [request, by_base], print)
    adapter, base = [data_uri(image) for image in expected]
    assert (images["step 1, strength 2"], file.exists()) == (adapter, False)
    *_, (_, last) = draw(grid, steps=[1], strengths="2", both=True)
    names = {f"step 1, guidance from the {kind}, strength 2" for kind in ("adapter", "base model")}
    images = {name: address for address, name in IMAGE.findall(last)}
    assert images.keys() == names
    assert list(images.values()) == [adapter, base]


def test_it_ends_between_steps_and_the_form_keeps_what_the_run_has(grid):
    next(going := draw(grid))
    grid.work.stop(REQUEST)
    assert "Cancelled." in next(going)[0]
    first, second = grid.choices(None, [], ""), grid.choices("run", [2, 9], "a cat")
    assert first[grid.run]["choices"] == [("run (Bi-LoRA, seed 0)", "run")]
    assert first[grid.steps]["value"] == [1, 2]
    assert (second[grid.steps]["value"], second[grid.prompt]) == ([2], "a cat")
    assert (spread(range(10, 101, 10), 4), spread([5], 4)) == ([10, 40, 70, 100], [5])


def test_bad_values_are_refused_in_one_sentence(grid):
    for words, values in {
        'the strength "x"': {"strengths": "1, x"},
        'the strength ""': {"strengths": ""},
        "a strength is nan": {"strengths": "nan"},
        "number of images is 66": {"strengths": ",".join(str(n / 10) for n in range(33))},
        "no checkpoint is chosen": {"steps": []},
        "checkpoint of step 7 has gone": {"steps": [1, 7]},
        'the run "young" has gone': {"run": "young"},
    }.items():
        with pytest.raises(gr.Error) as caught:
            list(draw(grid, **values))
        assert words in unescape(str(caught.value))
    checkpoint = grid.catalog.root / "run" / CHECKPOINTS / "step-1"
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(gr.Error, match=r"'run/checkpoints/step-1/state.json can"):
        list(draw(grid))
    checkpoint.rename(grid.catalog.root.parent / "outside")
    checkpoint.symlink_to(grid.catalog.root.parent / "outside")
    with pytest.raises(gr.Error, match="out of the root"):
        list(draw(grid))
