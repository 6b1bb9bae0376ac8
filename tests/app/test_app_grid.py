"""The grid of checkpoints and strengths, with a run of the miniature."""

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
from app.grid import Grid, evenly_spaced
from app.parts import data_uri
from app.sampling import BaseChoice, Request, Sampler, temporary_export
from bilora_diffusion.run.checkpoint import CHECKPOINTS
from tests.app.folders import make_run
from tests.scripts.runs import copied, train_once

REQUEST: Any = SimpleNamespace(session_hash="me")
IMAGE = re.compile(r'<img src="([^"]*)" alt="([^"]*)"')


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Return a grid for a run with checkpoints at both its steps and a run without checkpoints."""
    monkeypatch.setattr("app.grid.usual", lambda _: (2, 4.0))
    copied(train_once(checkpointing_steps=1), tmp_path / "run")
    make_run(tmp_path / "young")
    with gr.Blocks() as page:
        return Grid(Work(Catalog(tmp_path), page, "cpu"), page.load)


def sample(grid, *, steps=(2, 1), strengths="0.5, 2", run="run", sources="adapter"):
    """Sample a grid with two sampler steps; yields its updates (status, table)."""

    def ignore_progress(*_, **__):
        pass

    number = grid.work.begin(REQUEST)
    return grid.sample(
        number, run, list(steps), strengths, "a fox", 3, sources, REQUEST, ignore_progress
    )


def images_of(table):
    """Return label -> URI of the images of a grid, in the grid's order."""
    return {label: uri for uri, label in IMAGE.findall(table)}


@pytest.mark.slow
def test_each_image_uses_its_checkpoint_and_strength(grid):
    *rows, (status, table) = sample(grid)
    assert [row_table.count("<img") for _, row_table in rows] == [0, 2]
    assert "a fox, seed 3, sampled with run (Bi-LoRA, seed 0)" in status
    images = images_of(table)
    assert list(images) == [
        "step 1, strength 0.5",
        "step 1, strength 2",
        "step 2, strength 0.5",
        "step 2, strength 2",
    ]
    assert len(set(images.values())) == 4
    run = next(run for run in grid.catalog.scan.runs if run.path == "run")
    request = Request("a fox", 3, 2, 4.0, 2.0, run.record["config"]["resolution"])
    by_base = replace(request, guidance_from="base")
    from_between = replace(request, guidance_from=0.5)
    all_requests = [request, from_between, by_base]
    with temporary_export(grid.catalog, run, 1) as file:
        expected = Sampler("cpu").sample(BaseChoice("mini"), file, all_requests, print)
    assert not file.exists()
    adapter_uri, between_uri, base_uri = [data_uri(image) for image in expected]
    assert len({adapter_uri, between_uri, base_uri}) == 3
    assert images["step 1, strength 2"] == adapter_uri
    *_, (_, table) = sample(grid, steps=[1], strengths="2", sources="1, 0.5, base")
    assert images_of(table) == {
        "step 1, guidance from the adapter, strength 2": adapter_uri,
        "step 1, guidance from the adapter at strength 0.5, strength 2": between_uri,
        "step 1, guidance from the base model, strength 2": base_uri,
    }


def test_the_work_ends_between_sampler_steps(grid):
    updates = sample(grid)
    next(updates)
    grid.work.stop(REQUEST)
    assert "Cancelled." in next(updates)[0]


def test_the_form_keeps_the_chosen_steps_that_the_run_has(grid):
    first_form = grid.fill(None, [], "")
    assert first_form[grid.run]["choices"] == [("run (Bi-LoRA, seed 0)", "run")]
    assert first_form[grid.steps]["value"] == [1, 2]
    form = grid.fill("run", [2, 9], "a cat")
    assert (form[grid.steps]["value"], form[grid.prompt]) == ([2], "a cat")
    assert evenly_spaced(range(10, 101, 10), 4) == [10, 40, 70, 100]
    assert evenly_spaced([5], 4) == [5]


def test_bad_values_are_refused_in_one_sentence(grid):
    strengths = [str(number / 10) for number in range(33)]
    for sentence, values in {
        'the strength "x"': {"strengths": "1, x"},
        'the strength ""': {"strengths": ""},
        "a strength is nan": {"strengths": "nan"},
        "number of images is 66": {"strengths": ",".join(strengths)},  # at two steps
        '"Guidance from" is "2": give adapter, base or a number from 0 to 1': {"sources": "2"},
        "no checkpoint is chosen": {"steps": []},
        "checkpoint at step 7 no longer exists": {"steps": [1, 7]},
        'the run "young" no longer exists': {"run": "young"},
    }.items():
        with pytest.raises(gr.Error) as caught:
            list(sample(grid, **values))
        assert sentence in unescape(str(caught.value))
    # A damaged checkpoint, and one outside the root
    checkpoint = grid.catalog.root / "run" / CHECKPOINTS / "step-1"
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(gr.Error, match=r"'run/checkpoints/step-1/state.json can"):
        list(sample(grid))
    checkpoint.rename(grid.catalog.root.parent / "outside")
    checkpoint.symlink_to(grid.catalog.root.parent / "outside")
    with pytest.raises(gr.Error, match="out of the root"):
        list(sample(grid))
