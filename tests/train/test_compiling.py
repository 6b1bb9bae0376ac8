"""Compiled blocks: on a small UNet without a compiler, and in the script with one."""

import logging
import re
import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from bilora_diffusion.core.errors import TrainingError
from bilora_diffusion.train import engine
from tests.contract.harness import Run
from tests.scripts import runs

PRIOR = {"prior_prediction_weight": 1, "class_prompt": "an icon", "gradient_checkpointing": True}
"""Adapters are switched off and on within each step, and each block runs twice."""
DORA = {"use_dora": True, "mixed_precision": "bf16"}
ENCODER = {"lora_dropout": 0.2, "train_text_encoder": True, "quantize": "nf4"}


@pytest.fixture
def without_compiler(monkeypatch):
    """Run compiled graphs operation by operation, without a C++ compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(engine, "BACKEND", "aot_eager")


@pytest.mark.slow
def test_blocks_of_one_kind_share_a_graph_and_keep_their_names(without_compiler, caplog):
    plain = Run("bilora", "default", "unet")
    run = Run("bilora", "default", "unet", compiled=True)
    assert run.model.state_dict().keys() == plain.model.state_dict().keys()
    assert (plain.blocks.count, run.blocks.count) == (0, 4)
    before = counters["stats"]["unique_graphs"]
    losses = []
    with caplog.at_level(logging.INFO):
        for number in (1, 2, 3):
            with run.blocks.step(number):
                losses += run.train(1)
    assert counters["stats"]["unique_graphs"] - before == 1
    assert losses == pytest.approx(plain.train(3), abs=1e-6)
    (line,) = [line for line in caplog.messages if line.startswith("step ")]
    assert re.fullmatch(r"step 1: compiled 4 blocks in .*s, to 1 graph", line)
    # Evaluations do the same, with other batch sizes.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        run.case.output(run.model, slice(1))
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize(
    ("values", "max_graphs"),
    [
        pytest.param(PRIOR, 6, marks=pytest.mark.matrix),
        pytest.param(DORA, 64, marks=pytest.mark.matrix),  # no two of its blocks share a graph
        pytest.param(ENCODER, 3, marks=pytest.mark.matrix),
        pytest.param({"aspect_ratio_buckets": "64,64;48,80"}, 9, marks=pytest.mark.matrix),
    ],
    ids=["prior", "dora", "encoder", "buckets"],
)
def test_a_compiled_run_equals_an_uncompiled_run_and_can_be_resumed(
    values, max_graphs, without_compiler, tmp_path
):
    shared: dict[str, Any] = {"max_train_steps": 2, "train_batch_size": 1, **values}
    shared |= runs.two_icons(tmp_path / "icons")
    plain = runs.train(tmp_path / "plain", **shared)
    before = counters["stats"]["unique_graphs"]
    compiled = runs.train(tmp_path / "compiled", **shared, compile=True, checkpointing_steps=1)
    assert 0 < counters["stats"]["unique_graphs"] - before <= max_graphs
    # Fused operations round differently, most of all in bf16.
    rounding = 2e-2 if "mixed_precision" in values else 1e-5
    for key in ("loss", "heldout_loss"):
        assert runs.column(compiled, key) == pytest.approx(runs.column(plain, key), rel=rounding)
    assert runs.weights(compiled).keys() == runs.weights(plain).keys()
    torch._dynamo.reset()  # as in a new process
    parts = runs.resumed(compiled, 1, **shared, compile=True)
    # With trained text encoders, or in bf16, the last digits of a graph's results can vary.
    assert runs.difference(compiled, parts) <= rounding / 10
    assert runs.column(parts, "loss") == pytest.approx(runs.column(compiled, "loss"), rel=rounding)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's inductor needs a C++ compiler")
def test_inductor_gives_the_losses_of_an_uncompiled_run(tmp_path):
    shared = {"max_train_steps": 4, "train_batch_size": 1}
    plain = runs.train(tmp_path / "plain", **shared)
    compiled = runs.train(tmp_path / "compiled", **shared, compile=True, checkpointing_steps=2)
    assert runs.column(compiled, "digest") == runs.column(plain, "digest")
    assert runs.column(compiled, "loss") == pytest.approx(runs.column(plain, "loss"), abs=1e-4)
    torch._dynamo.reset()
    runs.resumes_exactly(compiled, 2, **shared, compile=True)


@pytest.mark.slow
def test_a_compiler_failure_is_reported_in_one_sentence(without_compiler, monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(engine, "BACKEND", fails)
    run = Run("bilora", "default", "unet", compiled=True)
    sentence = r"--compile failed at step 1, .*no compiler"
    with pytest.raises(TrainingError, match=sentence) as error, run.blocks.step(1):
        run.train(1)
    assert "\n" not in str(error.value)
