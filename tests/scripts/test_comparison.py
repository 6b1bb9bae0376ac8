"""``--compare``, which trains a run and its control: interrupted, resumed, on two processes."""

import logging
import os
import signal

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.script import DREAMBOOTH
from bilora_diffusion.run import runlog
from bilora_diffusion.train.variants import control_config, control_folder
from tests.scripts.runs import (
    ON_CPUS,
    TEXT_SCRIPT,
    assert_same_run,
    difference,
    interrupt,
    run_python,
    train,
    two_icons,
)
from tests.text.text_builders import material, text_flags

MINI = "--dataset mini --output_dir runs/dog --rank 8"


def control_of(flags):
    """Return the control's configuration for a command line with ``--compare``."""
    argv = f"{MINI} {flags}".split()
    return control_config(DREAMBOOTH, argv, DREAMBOOTH.resolve(argv))


def test_the_control_has_the_options_of_its_own_command(caplog):
    """An option with another meaning in the control's method has its default instead."""
    flags = "--rho 0.3 --auxiliary_rank 2"
    control = control_of(f"{flags} --compare lora")
    lora_command = f"{MINI} {flags} --method lora --output_dir runs{os.sep}dog-lora"
    assert control.to_dict() == DREAMBOOTH.resolve(lora_command.split()).to_dict()

    caplog.clear()
    control = control_of(f"{flags} --compare lora-sam")
    assert control.rho == 0.05  # LoRA-SAM's default: 0.3 is a radius for Bi-LoRA
    # The run reports the rank, which the control does not repeat; the control reports the radius.
    rank_message, rho_message = (record.getMessage() for record in caplog.records)
    assert "--rank" in rank_message
    assert "--rho" not in rank_message
    assert "--rho" in rho_message
    assert "--rank" not in rho_message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--compare bilora", "name another"),
        ("--compare full", "with a separate command"),
        ("--compare lora --resume_from_checkpoint latest", "auto"),
        ("--compare lor", 'did you mean "lora"'),
    ],
)
def test_unsupported_comparisons_are_refused(flags, part):
    with pytest.raises(UserError, match=part):
        control_of(flags)


def test_the_control_s_folder_is_next_to_the_run_s_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert control_folder(tmp_path / "dog", "lora") == tmp_path / "dog-lora"
    assert control_folder(tmp_path / "..", "lora").parent == tmp_path.parent.parent
    # Both folders are checked before training.
    (tmp_path / "dog-lora").mkdir()
    (tmp_path / "dog-lora" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="dog-lora"):
        train(tmp_path / "dog", compare="lora")
    assert not (tmp_path / "dog").exists()


@pytest.mark.slow
def test_both_runs_equal_those_of_separate_commands_wherever_they_are_interrupted(
    tmp_path, monkeypatch, caplog
):
    flags = {
        **two_icons(tmp_path / "icons"),
        "validation_prompt": "a TOK icon of a fox",
        "num_validation_images": 1,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
    }
    own_run = train(tmp_path / "own", **flags)
    own_control = train(tmp_path / "own-control", **flags, method="lora")

    # Ctrl-C in the run's step 2, after its export, and in the control's step 2.
    steps_taken = interrupt(monkeypatch, 2, 6)
    write_card = DREAMBOOTH.write_card

    def interrupted_write_card(*arguments):
        assert not control_folder(parts, "lora").exists()  # it is created when the control starts
        write_card(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    parts = tmp_path / "parts"
    flags |= {"compare": "lora", "resume_from_checkpoint": "auto"}
    with pytest.raises(KeyboardInterrupt, match=r"(?s)step 2 of 4 of the run in .*auto"):
        train(parts, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(DREAMBOOTH, "write_card", interrupted_write_card)
        with pytest.raises(KeyboardInterrupt, match=r"(?s)parts-lora started.*auto"):
            train(parts, **flags)
    record = (parts / runlog.RUN).read_bytes()
    with pytest.raises(KeyboardInterrupt, match=r"(?s)step 2 of 4 .*parts-lora, .*auto"):
        train(parts, **flags)
    caplog.set_level(logging.INFO)
    train(parts, **flags)
    assert f"{parts} and {parts}-lora" in caplog.records[-1].getMessage()
    assert len(steps_taken) == 8  # 4 of each run: no step is repeated
    assert (parts / runlog.RUN).read_bytes() == record  # a finished run is not changed
    assert_same_run(own_run, parts, "heldout_loss", "auxiliary_norm")
    assert_same_run(own_control, control_folder(parts, "lora"), "heldout_loss")
    # A finished run with other options is refused.
    with pytest.raises(UserError, match="seed"):
        train(parts, **flags, seed=5)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_two_processes_train_both_runs(tmp_path):
    flags = {**material("classification"), "max_train_steps": 4}
    both = tmp_path / "both"
    argv = text_flags(both, **flags, compare="lora")
    run_python([TEXT_SCRIPT, *argv], processes=2, environment=ON_CPUS)
    lora_run = tmp_path / "lora"
    argv = text_flags(lora_run, **flags, method="lora")
    run_python([TEXT_SCRIPT, *argv], processes=2, environment=ON_CPUS)
    assert_same_run(lora_run, control_folder(both, "lora"))
    assert difference(both, control_folder(both, "lora")) > 0
