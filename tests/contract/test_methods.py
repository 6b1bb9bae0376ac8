"""Promises of every registered method, with every option of its adapters, on each model."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, INITIAL, PRIMARY
from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.config import constraints
from bilora_diffusion.core.values import SAMPLE
from bilora_diffusion.methods import create, names
from bilora_diffusion.train import engine
from tests.contract.harness import SHARED, SPECS, Run, combos, compared, pairwise, rotation
from tests.contract.models import CASES, ROWS
from tests.scripts.runs import TORCHRUN, process

MATRIX, ROTATION = combos(), rotation()
FP16 = {"mixed_precision": "fp16"}


def cases(chosen):
    """Cases of a test; those beside the rotation run with the whole matrix only."""
    marked = [
        pytest.param(*case, marks=[pytest.mark.matrix] * (case not in ROTATION)) for case in chosen
    ]
    return pytest.mark.parametrize(("name", "option", "kind"), marked)


def life(folder, name, option, kind, compiled=False, **options):
    """Start as the base, learn, evaluate, export, resume: what every method promises."""

    def start():
        return Run(name, option, kind, options=options, compiled=compiled)

    run, quantized = start(), option == "nf4"
    exports_adapter = not run.method.exports_weights
    if exports_adapter:
        starts_as_the_model_came(run, quantized)
    else:
        run.initialise()
    initial, base = run.tensors(), run.base_weights()
    clipping_sees_the_result_only(run)
    counts_what_it_trains(run)
    losses = run.train(2)
    state = run.checkpoint()
    assert all(isinstance(value, float) for value in run.method.metrics().values())
    if exports_adapter:
        exports_the_primary_for_the_base_as_it_came(run, start().original, folder, option)
    losses += run.train(2)
    assert losses[-1] < losses[0]
    learns_and_leaves_the_base_alone(run, initial, base)
    resumed = start().resume(state)
    assert resumed.train(2) == losses[2:]
    final = run.tensors()
    assert all(torch.equal(value, final[key]) for key, value in resumed.tensors().items())
    if exports_adapter:
        evaluates_the_primary_alone_and_leaves_no_trace(run)


def starts_as_the_model_came(run, quantized):
    with torch.no_grad(), run.method.evaluating():
        before = run.case.output(run.model)
    run.initialise()
    with torch.no_grad(), run.method.evaluating():
        torch.testing.assert_close(run.case.output(run.model), before, rtol=1e-4, atol=1e-5)
        if not quantized:
            expected = run.case.output(run.original)
            torch.testing.assert_close(run.case.output(run.model), expected, rtol=1e-4, atol=1e-5)


def clipping_sees_the_result_only(run):
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    clipped = {id(p) for p in run.method.result_parameters()}
    primary = {id(p) for p in adapters.parameters(run.model, PRIMARY)}
    assert clipped == (trained if run.method.exports_weights else primary)
    if loose_ids := {id(p) for p in run.method.loose_parameters}:  # in place of the layers' own
        trained |= {id(p) for p in adapters.parameters(run.model, AUXILIARY)}
    assert trained - loose_ids == {id(p) for p in run.model.parameters() if p.requires_grad}


def counts_what_it_trains(run):
    """For `--dry_run`."""
    trained = sum(p.nbytes for group in run.optimizer.param_groups for p in group["params"])
    memory = run.method.memory(step_samples=ROWS)
    assert memory.optimized == trained
    assert memory.result == sum(p.nbytes for p in run.method.result_parameters())
    assert memory.result <= memory.gradients <= trained


def learns_and_leaves_the_base_alone(run, initial, base):
    final = run.tensors()
    assert initial.keys() == final.keys()
    # A method's own memory, such as a running average, may still be what it was after few steps.
    kinds = (*run.method.adapters, "whole", "full")
    trained = [key for key in final if key.split("/")[1] in kinds]
    moved = [key for key in trained if "lora_" not in key or "lora_B" in key]
    assert moved
    assert all(not torch.equal(initial[key], final[key]) for key in moved)
    assert all(torch.equal(initial[key], final[key]) for key in final if f"/{INITIAL}/" in key)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    if not run.method.exports_weights:
        final_base = run.base_weights()
        assert all(torch.equal(final_base[key], base[key]) for key in base)


def exports_the_primary_for_the_base_as_it_came(run, fresh, folder, option):
    adapters.save_pretrained(run.model, folder)
    if option == "nf4":
        quantize(fresh, torch.float32, skip=())
    loaded = PeftModel.from_pretrained(fresh, str(folder)).train()
    assert list(loaded.peft_config) == [PRIMARY]
    with torch.no_grad(), run.method.evaluating():
        ours, theirs = run.case.output(run.model), run.case.output(loaded)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def evaluates_the_primary_alone_and_leaves_no_trace(run):
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
        with adapters.only(run.model, run.method.adapters[:1]):
            torch.testing.assert_close(run.case.output(run.model), primary, rtol=1e-4, atol=1e-5)


@cases(MATRIX)
def test_the_life_of_a_run(name, option, kind, tmp_path):
    life(tmp_path, name, option, kind)


@pytest.mark.parametrize("options", pairwise("bilora"), ids=str)
def test_the_life_of_a_run_with_any_two_options(options, tmp_path):
    life(tmp_path, "bilora", kind="llm", **options)


COMPILED = ("bilora", "lora-sam", "flat-lora")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in COMPILED else pytest.mark.matrix)
        for n in names()
    ],
)
def test_the_life_of_a_run_with_compiled_blocks(name, tmp_path, monkeypatch):
    """Every state of the adapters goes through compiled blocks here: no graph serves two."""
    monkeypatch.setattr(engine, "BACKEND", "aot_eager")  # without a compiler
    life(tmp_path, name, "default", "unet", compiled=True)


def equal_but_for_rounding(method, actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        # What a method remembers may be a direction: a small gradient's, with all its rounding.
        trained = key.split("/")[1] in (*method.adapters, INITIAL, "whole", "full")
        atol = 2e-5 if trained else max(2e-5, 0.02 * float(value.abs().max()))
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=atol)


@cases(MATRIX)
def test_the_cut_into_micro_batches_changes_nothing(name, option, kind):
    # SGD, since Adam's first steps turn the rounding of a small gradient into a whole step.
    uncut = Run(name, option, kind, lr=0.1, optimizer="SGD").initialise()
    losses, final = uncut.train(), uncut.tensors()
    for micro_batches in (2, 4):
        cut = Run(
            name, option, kind, lr=0.1, optimizer="SGD", micro_batches=micro_batches
        ).initialise()
        torch.testing.assert_close(cut.train(), losses, rtol=1e-5, atol=1e-6)
        equal_but_for_rounding(cut.method, cut.tensors(), final)


@cases([case for case in MATRIX if not create(case[0]).exports_weights])
def test_its_limit_is_lora(name, option, kind):
    limit = create(name).limit
    assert limit is not None, "a method on adapters has a limit in which it is LoRA"
    plain = Run("lora", option, kind, lr=0.1, optimizer="SGD").initialise()
    limit_run = Run(name, option, kind, lr=0.1, optimizer="SGD", options=limit).initialise()
    torch.testing.assert_close(limit_run.train(), plain.train(), rtol=1e-5, atol=1e-6)
    final = limit_run.tensors()
    for key, value in plain.tensors().items():
        torch.testing.assert_close(final[key], value, rtol=1e-4, atol=2e-5)


@cases([c for c in MATRIX if not constraints.first_violated({**FP16, "method": c[0]})])
def test_a_step_that_the_scaler_skips_changes_nothing(name, option, kind):
    run = Run(name, option, kind, overflow=(1,)).initialise()
    run.train(1)
    before, state = run.tensors(), run.method.state_dict()
    run.train(1)
    assert all(torch.equal(value, before[key]) for key, value in run.tensors().items())
    assert run.method.state_dict() == state or name == "flat-lora"  # its noise follows the loop
    run.train(1)
    after = run.tensors()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    process(*TORCHRUN, 2, Path(__file__).with_name("two_processes.py"), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option", "kind"), SHARED)
def test_two_processes_agree_with_one(name, option, kind, two_processes):
    single = compared(name, option, kind)
    single.train()
    both = torch.load(two_processes / f"{name}-{option}-{kind}.pt")
    equal_but_for_rounding(single.method, single.tensors(), both)
    if option == SAMPLE:
        for key, value in single.tensors().items():
            torch.testing.assert_close(value, both[key], rtol=0, atol=1e-8)


def test_the_rotation_meets_every_option_and_kind_of_model():
    _, options, kinds = (set(part) for part in zip(*ROTATION, strict=True))
    assert (options, kinds) == (set(SPECS), set(CASES))
