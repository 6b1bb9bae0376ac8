"""The tab Generate with the miniature: its form, sampled images, and cancelled work."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch

from app.catalog import Catalog
from app.generate import Stopped, Tab, Work
from app.sampling import (
    BASE,
    BaseChoice,
    Request,
    Sampler,
    can_sample,
    find_comparison,
    find_folder,
    read_form,
)
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.base_model import read_base_model
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from eval.clip_scores import settings
from eval.sampler import USUAL_SAMPLER
from tests.app.folders import WEIGHTS, make_run
from tests.image.tiny import saved

PROMPT = "a TOK icon of a rabbit, in the style of TOK"
REQUEST = Request(PROMPT, seed=3, steps=2, guidance_scale=4.0, scale=1.0)


@pytest.fixture(scope="module")
def sampler():
    """Return a sampler for all tests, so the miniature is loaded only once."""
    return Sampler("cpu")


def test_an_image_equals_that_of_the_evaluation_even_after_cancelled_work(sampler):
    steps = []

    def on_step(step):
        steps.append(step)
        if step == 2:
            raise Stopped

    mini = BaseChoice("mini")
    with pytest.raises(Stopped):
        sampler.sample(mini, None, [replace(REQUEST, steps=50)], on_step)
    assert steps == [1, 2], "the work must end before the next step"
    (image,) = sampler.sample(mini, None, [REQUEST], steps.append)
    assert steps == [1, 2, 1, 2]  # the cancelled work's callback is not called again
    pipeline = load_pipeline("mini", dtype=torch.float32)
    (expected,) = generate(pipeline, [PROMPT], [3], size=64, steps=2, guidance_scale=4.0)
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_steps_and_guidance_are_those_of_the_model(tmp_path):
    """Scores and this tab use the same values and read them without weights."""
    sd3 = str(saved("StableDiffusion3Pipeline", tmp_path / "sd3"))
    turbo = tmp_path / "snapshots" / "3a1f"  # as in the hub's cache
    saved("ZImagePipeline", turbo)
    model = replace(read_base_model(str(turbo)), name="owner/Z-Image-Turbo")
    assert settings.usual(model) == (8, 0.0)
    # The miniature's guidance scale differs from SDXL's.
    for base, usual_values in {"mini": (25, 4.0), sd3: (25, 7.0)}.items():
        assert settings.usual(BaseChoice(base).read_base_model()) == usual_values
        for flags, expected in (((None, None), usual_values), ((3, 0.0), (3, 0.0))):
            steps, guidance_scale = flags
            options = Namespace(
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                guidance_from="adapter",
                resolution=None,
                adapter_scale=1.0,
                dtype="float32",
                lanes=4,
                base_precision=None,
                weight_noise=0.0,
                sampling_lora=None,
                sampling_scheduler=None,
            )
            sampling = settings.sampling(options, base)
            assert (sampling.steps, sampling.guidance_scale) == expected


def test_images_appear_one_by_one_and_work_can_be_cancelled(tmp_path, monkeypatch):
    make_run(tmp_path / "lora")  # its weights are an empty file
    with gr.Blocks() as page:
        work = Work(Catalog(tmp_path), page, "cpu")
        tab = Tab(work, page.load)
    request: Any = SimpleNamespace(session_hash="me")  # in place of Gradio's request
    steps: list[tuple[int, int]] = []

    def show_progress(progress, desc, unit):
        steps.append(progress)

    def begin(b=BASE):
        """Generate two images in two steps; yields the tab's updates (status, cards, slider)."""
        number = work.begin(request)
        return tab.generate(
            number, PROMPT, BASE, b, 3, 2, 4.0, 0.5, 1.0, True, request, show_progress
        )

    updates = list(begin())
    card_updates = [cards for _, cards, _ in updates if isinstance(cards, str)]
    assert [cards.count("<img") for cards in card_updates] == [0, 1, 2]
    status, _, slider = updates[-1]
    assert "Done." in status
    assert "<img" in slider
    assert steps == [(0, 2), (1, 2), (2, 2)] * 2
    # A visitor's new work cancels the earlier work.
    older, newer = begin(), begin()
    assert "Cancelled." in next(older)[0]
    next(newer)
    work.stop(request)
    assert "Cancelled." in next(newer)[0]
    with pytest.raises(gr.Error, match="lora") as caught:
        list(begin("lora"))
    assert str(tmp_path) not in str(caught.value)


def test_the_suggested_prompt_is_the_chosen_runs_until_the_user_writes_one(tmp_path):
    images = {"validation_prompts": ["a cat", "a hat"], "num_validation_images": 1}
    configs = {"cat": images, "dog": {"instance_prompt": "a photo of TOK"}, "old": {}}
    for name, config in configs.items():
        make_run(tmp_path / name, config=config | {"pretrained_model_name_or_path": "mini"})
    with gr.Blocks() as page:
        tab = Tab(Work(Catalog(tmp_path), page, "cpu"), page.load)

    def suggested(a, b, prompt):
        return tab.suggest(a, b, "mini", prompt, True)[0]

    assert suggested("cat", "dog", PROMPT) == "a cat"
    assert suggested("dog", "cat", "a cat") == "a photo of TOK"
    assert suggested(BASE, "old", "a cat") == PROMPT
    assert suggested(BASE, "cat", "a fox") == "a fox"
    assert suggested(BASE, BASE, "a fox") == "a fox"


def test_no_guidance_is_suggested_if_all_chosen_runs_have_a_guided_target(tmp_path):
    for name, scale in {"plain": 1.0, "guided": 1.5}.items():
        config = {"guided_target": scale, "pretrained_model_name_or_path": "mini"}
        make_run(tmp_path / name, config=config)
    with gr.Blocks() as page:
        tab = Tab(Work(Catalog(tmp_path), page, "cpu"), page.load)

    def suggested(a, b, last):
        return tab.suggest(a, b, last, PROMPT, True)[2:4]

    assert suggested(BASE, "guided", "mini") == [1.0, "mini, guided"]
    assert suggested("plain", "guided", "mini, guided") == [4.0, "mini"]
    # The user's values are kept while the choice of runs suggests the same defaults.
    assert suggested(BASE, "guided", "mini, guided") == [gr.skip(), gr.skip()]
    assert suggested(BASE, "plain", "mini") == [gr.skip(), gr.skip()]


def test_the_sampler_of_the_runs_can_be_turned_off(tmp_path):
    four_steps = {"validation_num_inference_steps": 4, "validation_guidance_scale": 1.0}
    configs = {
        "plain": {},
        "few": four_steps | {"sampling_scheduler": "LCMScheduler"},
        "lost": four_steps | {"sampling_lora": "gone", "sampling_lora_sha256": "0" * 64},
    }
    for name, config in configs.items():
        make_run(tmp_path / name, config=config | {"pretrained_model_name_or_path": "mini"})
    with gr.Blocks() as page:
        catalog = Catalog(tmp_path)
        tab = Tab(Work(catalog, page, "cpu"), page.load)

    def suggested(a, uses_run_sampler, last="other"):
        _, *values, _, checkbox = tab.suggest(a, BASE, last, PROMPT, uses_run_sampler)
        return values, checkbox["visible"]

    assert suggested("plain", True) == ([25, 4.0], False)
    assert suggested("few", True) == ([4, 1.0], True)
    assert suggested("few", False) == ([25, 4.0], True)
    assert find_comparison(catalog, "few", BASE).sampler.scheduler == "LCMScheduler"
    # A run whose sampling LoRA is gone can be sampled without that LoRA.
    with pytest.raises(UserError, match="gone"):
        find_comparison(catalog, "lost", BASE)
    assert suggested("lost", True) == ([gr.skip(), gr.skip()], True)
    assert suggested("lost", False) == ([25, 4.0], True)
    assert find_comparison(catalog, "lost", BASE, uses_run_sampler=False).sampler == USUAL_SAMPLER


def test_the_first_choice_is_a_run_and_its_control_and_runs_without_weights_are_listed(tmp_path):
    with gr.Blocks() as page:
        catalog = Catalog(tmp_path)
        tab = Tab(Work(catalog, page, "cpu"), page.load)

    def first():
        catalog.refresh()
        a, b, absent, _ = tab.fill(None, None)
        return a["value"], b["value"], absent["value"]

    def make(name, method, day, data_hash, **changes):
        started_at = f"2026-01-{day:02d}T00:00:00+00:00"
        run = make_run(tmp_path / name, method, started_at=started_at, **changes)
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "digest": "{data_hash}"}}\n')
        return run

    assert first() == (BASE, BASE, "")
    make("dog", "bilora", 1, "d0")
    assert first() == ("dog", BASE, "")
    (make("dog-lora", "lora", 2, "d0", status="interrupted") / WEIGHTS).unlink()
    make("try", "lora", 3, "e0")
    a, b, absent = first()
    assert (a, b) == ("try", BASE), "a run on other data must not be the control"
    assert "dog-lora (LoRA, seed 0), interrupted" in absent
    (tmp_path / "dog-lora" / WEIGHTS).touch()
    assert first() == ("dog", "dog-lora", "")
    a, b, _, _ = tab.fill("try", "dog")
    assert (a["value"], b["value"]) == ("try", "dog"), "the user's choice must be kept"


def test_a_comparison_has_one_base_model_and_run_folders_below_the_root(tmp_path):
    root = tmp_path / "root"
    make_run(root / "a", config={"pretrained_model_name_or_path": "mini", "resolution": 64})
    make_run(root / "b", seed=1, config={"pretrained_model_name_or_path": "owner/other"})
    text = make_run(root / "text")
    (text / WEIGHTS).rename(text / "adapter_model.safetensors")
    # A run without weights, and a run whose weights are outside the root
    for name in ("young", "linked"):
        (make_run(root / name) / WEIGHTS).unlink()
    (root / "linked" / WEIGHTS).symlink_to(make_run(tmp_path / "outside") / WEIGHTS)
    catalog = Catalog(root)
    assert [run.path for run in catalog.scan.runs if can_sample(run)] == ["a", "b", "linked"]
    comparison = find_comparison(catalog, "a", BASE)
    assert (comparison.base, comparison.size) == (BaseChoice("mini"), 64)
    assert comparison.sides == [("a (LoRA, seed 0)", root / "a"), ("base model", None)]
    for a, b, words in (
        ("a", "b", "mini and owner/other"),
        ("young", "a", '"young"'),
        ("linked", BASE, "out of the root"),
    ):
        with pytest.raises(UserError, match=words):
            find_comparison(catalog, a, b)


def test_a_message_does_not_reveal_files_outside_the_root(sampler, tmp_path, capfd):
    # The message does not depend on whether the folder exists; the reason is in the terminal.
    (tmp_path / "present").mkdir()
    messages = []
    for name in ("present", "absent"):
        base = BaseChoice(str(tmp_path / name))
        with pytest.raises(UserError, match="hf download") as caught:
            sampler.sample(base, None, [REQUEST], print)
        messages.append(str(caught.value).replace(name, "NAME"))
        assert f"{tmp_path / name}: " in capfd.readouterr().err
    assert messages[0] == messages[1]


def test_bad_values_and_missing_models_are_refused():
    with pytest.raises(UserError, match="prompt is empty"):
        read_form(" ", 0, 25, 4, 1)
    for seed in (None, -1, 2**32):
        with pytest.raises(UserError, match=f"seed is {seed}"):
            read_form(PROMPT, seed, 25, 4, 1)
    for steps in (None, 0, 10_000):
        with pytest.raises(UserError, match=f"steps is {steps}"):
            read_form(PROMPT, 0, steps, 4, 1)
    for source in ("both", 1.1):
        with pytest.raises(UserError, match=f'"Guidance from" is "{source}"'):
            read_form(PROMPT, 0, 25, 4, 1, source)
    # The ends of the slider become words, as in the records of images.
    sources = [read_form(PROMPT, 0, 25, 4, 1, value).guidance_from for value in (0, 0.5, 1)]
    assert sources == ["base", 0.5, "adapter"]
    with pytest.raises(UserError, match="hf download owner/absent"):
        find_folder(BaseChoice("owner/absent"))
    with pytest.raises(UserError, match='--device "abacus"'):
        Sampler("abacus")
