"""The last block of a run: real paths, the best step, and what the last one gave away."""

import re

import pytest

from bilora_diffusion.run import console
from bilora_diffusion.run.runlog import RunLog

NAN = float("nan")
LOSSES = [
    ({0: 0.5, 5: 0.4, 10: 0.5}, [5], {}, "step 5 was 20.0 % better than step 10: export it with"),
    ({0: 0.5, 5: 0.4, 10: 0.5}, [10], {}, "--keep_best"),
    ({0: 0.5, 5: 0.4, 10: 0.5}, [], {"best_step": 5}, "what is saved is of it"),
    ({0: 0.5, 5: 0.6}, [], {}, "nothing was gained"),
    ({0: 0.5, 5: 0.4, 10: NAN}, [], {}, "step 5, .*more steps may be better"),
    ({}, [], {}, "--fit chooses .*--validation_dataset"),
]


@pytest.mark.parametrize(("losses", "kept", "results", "words"), LOSSES)
def test_the_end_names_the_files_the_best_step_and_how_to_have_it(
    tmp_path, losses, kept, results, words
):
    run = tmp_path / "my run"
    log = RunLog(run)
    log.start({}, method="lora", seed=0, resume_step=None)
    for step, loss in losses.items():
        log.metric(step, heldout_loss=loss)
    log.close("finished", **results)
    for step in kept:
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (run / "weights.safetensors").touch()
    files = {"for diffusers": "weights.safetensors", "model card": "README.md"}
    block = console.closing(run, files, "eval.clip_scores")
    assert re.search(words, block.splitlines()[-1])
    assert str(run / "weights.safetensors") in block
    assert "model card" not in block  # it is not there
    assert f"python -m eval.clip_scores '{run}' base" in block
    assert ("0.5000 at step 10, lowest 0.4000 at step 5" in block) == (losses.get(10) == 0.5)
