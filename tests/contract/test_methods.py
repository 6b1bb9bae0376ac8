"""What every registered method promises, with every option of its adapters, on each model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from bilora_diffusion import adapters
from bilora_diffusion.adapters import INITIAL, PRIMARY
from bilora_diffusion.config import combinations
from bilora_diffusion.methods import create, names
from tests.contract.harness import FLAGS, MAIN_KINDS, SPECS, Run, Start, allowed, combos
from tests.contract.models import CASES

REPOSITORY = Path(__file__).resolve().parents[2]
every = pytest.mark.parametrize(("name", "option", "kind"), combos())
every_adapter = pytest.mark.parametrize(
    ("name", "option", "kind"), [c for c in combos() if not create(c[0]).exports_weights]
)


@pytest.fixture
def start(name: str, option: str, kind: str) -> Start:
    return lambda **settings: Run(name, option, kind, **settings)


@every
def test_three_steps_lower_the_loss_and_leave_the_base_alone(start: Start) -> None:
    run = start().initialise()
    initial, base = run.tensors(), run.base_weights()
    losses = run.train()
    assert losses[-1] < losses[0]
    final = run.tensors()
    assert initial.keys() == final.keys()
    trained = [key for key in final if f"/{INITIAL}/" not in key]
    moved = [key for key in trained if "lora_" not in key or "lora_B" in key]
    assert moved
    assert all(not torch.equal(initial[key], final[key]) for key in moved)
    assert all(torch.equal(initial[key], final[key]) for key in final.keys() - set(trained))
    assert all(parameter.grad is None for parameter in run.model.parameters())
    if not run.method.exports_weights:
        kept = run.base_weights()
        assert all(torch.equal(kept[key], base[key]) for key in base)


@every_adapter
def test_it_starts_as_the_model_came(start: Start, option: str) -> None:
    run = start()
    with torch.no_grad(), run.method.evaluating():
        before = run.case.output(run.model)
    run.initialise()
    with torch.no_grad(), run.method.evaluating():
        torch.testing.assert_close(run.case.output(run.model), before, rtol=1e-4, atol=1e-5)
        if option != "nf4":
            expected = run.case.output(run.original)
            torch.testing.assert_close(run.case.output(run.model), expected, rtol=1e-4, atol=1e-5)


@every_adapter
def test_only_the_primary_is_exported_for_the_base_as_it_came(
    start: Start, option: str, tmp_path: Path
) -> None:
    run = start().initialise()
    run.train(2)
    adapters.save_pretrained(run.model, tmp_path)
    fresh = start().original
    if option == "nf4":
        from bilora_diffusion.adapters.quantize import quantize_nf4

        quantize_nf4(fresh, torch.float32, skip=())
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).train()
    assert list(loaded.peft_config) == [PRIMARY]
    with torch.no_grad(), run.method.evaluating():
        ours, theirs = run.case.output(run.model), run.case.output(loaded)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@every_adapter
def test_evaluating_is_the_primary_alone_and_leaves_no_trace(start: Start, option: str) -> None:
    run = start().initialise()
    run.train(2)
    before = {n: p.requires_grad for n, p in run.model.named_parameters()}
    order = adapters.active(run.model)
    assert order == run.method.adapters
    with torch.no_grad():
        training = run.case.output(run.model)
        with run.method.evaluating():
            assert adapters.active(run.model) == (PRIMARY,)
            primary = run.case.output(run.model)
        with pytest.raises(RuntimeError, match="boom"), run.method.evaluating():
            raise RuntimeError("boom")
        assert {n: p.requires_grad for n, p in run.model.named_parameters()} == before
        assert adapters.active(run.model) == order
        assert torch.equal(run.case.output(run.model), training)
        for adapter in run.method.adapters[1:]:
            adapters.delete(run.model, adapter)
        torch.testing.assert_close(run.case.output(run.model), primary, rtol=1e-4, atol=1e-5)
        if option != "nf4":
            merged = adapters.merge_primary(run.model)
            torch.testing.assert_close(run.case.output(merged), primary, rtol=1e-4, atol=1e-5)


@every
def test_it_resumes_exactly(start: Start) -> None:
    whole = start().initialise()
    losses = whole.train(4)
    first = start().initialise()
    assert first.train(2) == losses[:2]
    second = start().resume(first.checkpoint())
    assert second.train(2) == losses[2:]
    final = whole.tensors()
    assert all(torch.equal(value, final[key]) for key, value in second.tensors().items())


@every
@pytest.mark.parametrize("pieces", [2, 4])
def test_the_cut_into_micro_batches_changes_nothing(start: Start, pieces: int) -> None:
    # SGD, since Adam's first steps turn the rounding of a small gradient into a whole step.
    whole = start(lr=0.1, optimizer="SGD").initialise()
    cut = start(lr=0.1, optimizer="SGD", pieces=pieces).initialise()
    torch.testing.assert_close(cut.train(), whole.train(), rtol=1e-5, atol=1e-6)
    final = whole.tensors()
    for key, value in cut.tensors().items():
        torch.testing.assert_close(value, final[key], rtol=1e-4, atol=2e-5)


@every_adapter
def test_its_limit_is_lora(name: str, option: str, kind: str) -> None:
    limit = create(name).limit
    assert limit is not None, "a method on adapters has a limit in which it is LoRA"
    plain = Run("lora", option, kind, lr=0.1, optimizer="SGD").initialise()
    own = Run(name, option, kind, lr=0.1, optimizer="SGD", options=limit).initialise()
    torch.testing.assert_close(own.train(), plain.train(), rtol=1e-5, atol=1e-6)
    final = own.tensors()
    for key, value in plain.tensors().items():
        torch.testing.assert_close(final[key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "option", "kind"),
    [
        (name, option, kind)
        for name, option, kind in combos()
        if combinations.refused({"method": name, "mixed_precision": "fp16"}) is None
    ],
)
def test_a_step_that_the_scaler_skips_changes_nothing(start: Start, name: str) -> None:
    run = start(spoil=(1,)).initialise()
    run.train(1)
    before, state = run.tensors(), run.method.state_dict()
    run.train(1)
    assert all(torch.equal(value, before[key]) for key, value in run.tensors().items())
    assert run.method.state_dict() == state or name == "flat-lora"  # its noise follows the loop
    run.train(1)
    after = run.tensors()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


@every
def test_clipping_sees_trained_parameters_only(start: Start) -> None:
    run = start().initialise()
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    clipped = {id(p) for p in run.method.clip_parameters()}
    assert clipped
    assert clipped <= trained
    assert trained == {id(p) for p in run.model.parameters() if p.requires_grad}


@every
def test_metrics_are_numbers(start: Start) -> None:
    run = start().initialise()
    run.train(1)
    assert all(isinstance(value, float) for value in run.method.metrics().values())


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    script = REPOSITORY / "tests" / "contract" / "two_processes.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", str(script), str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize("kind", MAIN_KINDS)
@pytest.mark.parametrize("name", names())
def test_two_processes_agree_with_one(name: str, kind: str, two_processes: Path) -> None:
    for option in SPECS:
        if not allowed(name, option):
            continue
        one = Run(name, option, kind, lr=0.1, optimizer="SGD").initialise()
        one.train()
        both = torch.load(two_processes / f"{name}-{option}-{kind}.pt")
        for key, value in one.tensors().items():
            torch.testing.assert_close(both[key], value, rtol=1e-4, atol=2e-5)


def test_what_is_refused_is_refused_with_a_reason() -> None:
    for name in names():
        for option in SPECS:
            if not allowed(name, option):
                found = combinations.refused({"method": name, **FLAGS[option]})
                assert found is not None
                assert found.reason


def test_every_kind_of_model_is_covered() -> None:
    covered = {(option, kind) for _, option, kind in combos()}
    assert {(option, kind) for option in SPECS for kind in MAIN_KINDS} <= covered
    assert {kind for _, kind in covered} == set(CASES)
