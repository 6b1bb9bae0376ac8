"""A measurement or validation sample that fails does not end a run, of images or of text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bilora_diffusion.core.errors import TrainingError
from bilora_diffusion.image import task as image_task
from bilora_diffusion.run import checkpoint, runlog
from bilora_diffusion.text import evaluation
from tests.scripts.runs import assert_same_run, column, difference, train, train_once, two_icons
from tests.text.text_builders import heldout, material, train_text, train_text_once

STEPS = 3
# Flags for a checkpoint and validation samples at each step
IMAGES = {
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 0,
    "validation_prompt": "a TOK icon",
    "num_validation_images": 1,
    "validation_num_inference_steps": 1,
}
TEXT = {
    "max_train_steps": STEPS,
    "train_batch_size": 24,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 0,
    "validation_epochs": 1,
    "max_new_tokens": 2,
}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    TrainingError("the image of 'a TOK icon' is not finite"),
    AttributeError("no attribute 'unett'"),
]


@contextmanager
def failing(module: Any, failing_calls: set[int], error: BaseException) -> Iterator[list[int]]:
    """Make these calls of a module's `generate`, counted from 1, raise ``error``."""
    calls: list[int] = []
    generate = module.generate

    def failing_generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] in failing_calls:
            raise error
        return generate(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate", failing_generate)
        yield calls


def text_options():
    return {**material("seq2seq"), "validation_file": heldout("seq2seq"), **TEXT}


def unfailed_text_run():
    return train_text_once("seq2seq", **text_options())


def failed_steps(folder):
    failures = runlog.read_run(folder)["results"]["failed_evaluations"]
    return [failure["step"] for failure in failures]


@pytest.mark.parametrize(
    ("failing_call", "error"),
    [
        pytest.param(1, ERRORS[0], marks=pytest.mark.slow),
        pytest.param(2, ERRORS[1], marks=pytest.mark.slow),
        pytest.param(3, ERRORS[2], marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_images_fail_continues_and_exports(tmp_path, caplog, failing_call, error):
    unfailed = train_once(**IMAGES)
    folder = tmp_path / "run"
    with failing(image_task, {failing_call}, error):
        if failing_call == STEPS:
            with pytest.raises(TrainingError, match="its files are written, but the validation"):
                train(folder, **IMAGES)
        else:
            train(folder, **IMAGES)
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert f"step {failing_call} failed" in line
    assert str(error) in line
    assert ("error.txt" in line) == (not isinstance(error, TrainingError))
    assert checkpoint.steps(folder) == [1, 2, 3]
    assert_same_run(unfailed, folder)
    assert failed_steps(folder) == [failing_call]
    record = runlog.read_run(folder)
    assert record["status"] == "finished"
    # The record may be published, so it must not name a folder of this machine.
    assert str(tmp_path) not in str(record["results"]["failed_evaluations"])
    assert (folder / "README.md").exists()
    images = {path.parent.name for path in folder.glob("validation/*/*.png")}
    assert images == {f"step-{step}" for step in range(1, STEPS + 1) if step != failing_call}


@pytest.mark.slow
def test_a_run_whose_images_all_fail_leaves_its_checkpoints_and_its_file(tmp_path):
    """If the best step is chosen by samples, failed measurements are ignored."""
    icons = two_icons(tmp_path / "icons")
    options = {**IMAGES, **icons, "validation_loss_steps": 1, "keep_best": True}
    folder = tmp_path / "run"
    # The first call is the measurement of step 0, whose failure would end the run.
    with (
        failing(image_task, set(range(2, 100)), torch.OutOfMemoryError("out of memory")),
        pytest.raises(TrainingError, match="its files are written"),
    ):
        train(folder, **options)
    assert checkpoint.steps(folder) == [1, 2, 3]
    assert failed_steps(folder) == [1, 1, 2, 2, 3, 3]  # the measurement and the images of each step
    results = runlog.read_run(folder)["results"]
    assert results["best_step"] is None
    plain = train(tmp_path / "plain", **{**IMAGES, **icons, "num_validation_images": 0})
    assert difference(folder, plain) == 0  # both export the last step

    with (
        failing(image_task, {1}, torch.OutOfMemoryError("out of memory")),
        pytest.raises(torch.OutOfMemoryError),
    ):
        train(tmp_path / "first", **options)


@pytest.mark.slow
@pytest.mark.parametrize("failing_call", range(1, STEPS + 1))
def test_a_run_whose_answers_fail_continues_and_exports(tmp_path, failing_call):
    unfailed = unfailed_text_run()
    folder = tmp_path / "run"
    options = text_options()
    with failing(evaluation, {failing_call}, torch.OutOfMemoryError("out of memory")) as calls:
        if failing_call == STEPS:
            with pytest.raises(TrainingError, match="its files are written, but the validation"):
                train_text(folder, **options)
        else:
            train_text(folder, **options)
    assert len(calls) == STEPS
    assert checkpoint.steps(folder) == [1, 2, 3]
    assert difference(unfailed, folder) == 0
    assert column(unfailed, "digest") == column(folder, "digest")
    assert failed_steps(folder) == [failing_call]


@pytest.mark.slow
def test_a_control_is_trained_after_a_run_whose_last_images_failed(tmp_path):
    folder = tmp_path / "run"
    with (
        failing(image_task, {STEPS}, torch.OutOfMemoryError("out of memory")),
        pytest.raises(TrainingError, match=f"the run in {folder} is trained"),
    ):
        train(folder, **IMAGES, compare="lora")
    assert runlog.is_finished(tmp_path / "run-lora")


@pytest.mark.slow
def test_a_run_killed_while_sampling_samples_again_when_it_is_resumed(tmp_path):
    """A checkpoint is saved before its step's samples, so the resumed run generates them."""

    class Killed(BaseException):
        pass

    image_run = train_once(**IMAGES)
    for train_run, module, unfailed, options in (
        (train, image_task, image_run, IMAGES),
        (train_text, evaluation, unfailed_text_run(), text_options()),
    ):
        for failing_call in (2, STEPS):
            folder = tmp_path / f"{train_run.__name__}-{failing_call}"
            with failing(module, {failing_call}, Killed()), pytest.raises(Killed):
                train_run(folder, **options)
            assert checkpoint.steps(folder)[-1] == failing_call
            train_run(folder, **options, resume_from_checkpoint="auto")
            assert_same_run(unfailed, folder)
            for key in {key for row in runlog.read_metrics(unfailed) for key in row} - {"seconds"}:
                assert column(folder, key) == column(unfailed, key), key
            for file in unfailed.glob("validation/*/*"):
                copy = folder / file.relative_to(unfailed)
                assert copy.read_bytes() == file.read_bytes()
