"""Promises of every registered method, with every form of its adapters, on every kind of model."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from bilora_diffusion import adapters
from bilora_diffusion.adapters import ASSISTANT, INITIAL, PRIMARY, AdapterSpec, FrozenAdapter
from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.config import constraints
from bilora_diffusion.methods import create, get, names
from bilora_diffusion.train import engine
from tests.contract.harness import (
    SPECS,
    Run,
    combos,
    rotation,
    sgd_run,
)
from tests.contract.models import CASES
from tests.scripts.runs import run_python

MATRIX = combos()
ROTATION = rotation()


def cases(chosen):
    """Parametrize a test; cases outside the rotation get the mark `matrix`."""
    parameters = []
    for case in chosen:
        marks = () if case in ROTATION else pytest.mark.matrix
        parameters.append(pytest.param(*case, marks=marks))
    return pytest.mark.parametrize(("name", "adapter_form", "kind"), parameters)


def require_equal(actual, expected):
    """Check that `actual` has every expected tensor, equal to the last bit."""
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def require_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_trains_exports_and_resumes(folder, name, adapter_form, kind, compiled=False, **options):
    """Check that a run starts as the base, learns, evaluates, exports and resumes."""

    def start():
        return Run(name, adapter_form, kind, options=options, compiled=compiled)

    run = start()
    exports_adapter = not run.method.exports_weights
    if exports_adapter:
        require_unchanged_start(run, is_quantized=adapter_form == "nf4")
    else:
        run.initialise()
    initial = run.tensors()
    base = run.base_weights()
    require_result_is_clipped(run)
    require_counted_memory(run)
    losses = run.train(2)
    state = run.checkpoint()
    assert all(isinstance(value, float) for value in run.method.metrics().values())
    if exports_adapter:
        require_export_for_original_base(run, start().original, folder, adapter_form)
    losses += run.train(2)
    assert losses[-1] < losses[0]
    require_trained_adapters_and_unchanged_base(run, initial, base)
    resumed = start().resume(state)
    assert resumed.train(2) == losses[2:]
    require_equal(run.tensors(), resumed.tensors())
    if exports_adapter:
        require_evaluation_of_primary(run)


def require_unchanged_start(run, is_quantized):
    with torch.no_grad(), run.method.evaluating():
        before = run.case.output(run.model)
    run.initialise()
    with torch.no_grad(), run.method.evaluating():
        output = run.case.output(run.model)
        require_close(output, before)
        if not is_quantized:  # 4-bit rounding changes the base itself
            require_close(output, run.case.output(run.original))


def require_result_is_clipped(run):
    trained = run.optimized_ids()
    clipped = {id(p) for p in run.method.result_parameters()}
    if run.method.exports_weights:
        assert clipped == trained
    else:
        assert clipped == {id(p) for p in adapters.parameters(run.model, PRIMARY)}
    assert trained == {id(p) for p in run.model.parameters() if p.requires_grad}


def require_counted_memory(run):
    """Check the sizes that `--dry_run` prints."""
    trained_bytes = 0
    for group in run.optimizer.param_groups:
        trained_bytes += sum(parameter.nbytes for parameter in group["params"])
    memory = run.method.memory()
    assert memory.optimized == trained_bytes
    assert memory.result == sum(parameter.nbytes for parameter in run.method.result_parameters())
    assert memory.result <= memory.gradients <= trained_bytes


def require_trained_adapters_and_unchanged_base(run, initial, base):
    final = run.tensors()
    assert initial.keys() == final.keys()
    has_moved = False
    for key, value in final.items():
        if f"/{INITIAL}/" in key:
            assert torch.equal(value, initial[key])
        # A method's own state, such as a running average, may be unchanged after a few steps, and
        # A's gradient is zero while B is zero.
        elif is_trained(run.method, key) and ("lora_" not in key or "lora_B" in key):
            assert not torch.equal(value, initial[key])
            has_moved = True
    assert has_moved
    assert all(parameter.grad is None for parameter in run.model.parameters())
    if not run.method.exports_weights:
        require_equal(run.base_weights(), base)


def is_trained(method, key):
    """Return whether a tensor of a run is a trained weight, not the method's own state."""
    return key.split("/")[1] in (*method.adapters, "whole", "full")


def require_export_for_original_base(run, fresh, folder, adapter_form):
    adapters.save_pretrained(run.model, folder)
    if adapter_form == "nf4":
        quantize(fresh, torch.float32, skip=())
    loaded_model = PeftModel.from_pretrained(fresh, str(folder)).train()
    assert list(loaded_model.peft_config) == [PRIMARY]
    with torch.no_grad(), run.method.evaluating():
        require_close(run.case.output(loaded_model), run.case.output(run.model))


def require_evaluation_of_primary(run):
    def trainable():
        return {name for name, p in run.model.named_parameters() if p.requires_grad}

    trainable_before = trainable()
    assert adapters.active(run.model) == run.method.adapters
    with torch.no_grad():
        training_output = run.case.output(run.model)
        with run.method.evaluating():
            assert adapters.active(run.model) == (PRIMARY,)
            primary_output = run.case.output(run.model)
        with pytest.raises(RuntimeError, match="boom"), run.method.evaluating():
            raise RuntimeError("boom")
        assert trainable() == trainable_before
        assert adapters.active(run.model) == run.method.adapters
        assert torch.equal(run.case.output(run.model), training_output)
        with adapters.only(run.model, run.method.adapters[:1]):
            require_close(run.case.output(run.model), primary_output)


@cases(MATRIX)
def test_a_run_trains_evaluates_exports_and_resumes(name, adapter_form, kind, tmp_path):
    assert_trains_exports_and_resumes(tmp_path, name, adapter_form, kind)


def test_a_run_with_the_unscaled_norm_trains_evaluates_exports_and_resumes(tmp_path):
    assert_trains_exports_and_resumes(tmp_path, "bilora", "default", "llm", rho_norm="unscaled")


COMPILED = ("bilora", "lora-sam", "flat-lora")
COMPILED_CASES = []
for method_name in names():
    mark = pytest.mark.slow if method_name in COMPILED else pytest.mark.matrix
    COMPILED_CASES.append(pytest.param(method_name, marks=mark))


@pytest.mark.parametrize("name", COMPILED_CASES)
def test_a_run_with_compiled_blocks_trains_evaluates_exports_and_resumes(
    name, tmp_path, monkeypatch
):
    """This uses compiled blocks in every state of the adapters; each state needs its own graph."""
    monkeypatch.setattr(engine, "BACKEND", "aot_eager")  # needs no compiler
    assert_trains_exports_and_resumes(tmp_path, name, "default", "unet", compiled=True)


def require_equal_up_to_rounding(method, actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        atol = 2e-5
        if not is_trained(method, key) and f"/{INITIAL}/" not in key:
            # The method's state may be a small gradient's direction, with large rounding errors.
            atol = max(atol, 0.02 * float(value.abs().max()))
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=atol)


@cases(MATRIX)
def test_splitting_a_batch_into_micro_batches_changes_nothing(name, adapter_form, kind):
    uncut = sgd_run(name, adapter_form, kind)
    losses = uncut.train()
    for micro_batches in (2, 4):
        cut = sgd_run(name, adapter_form, kind, micro_batches=micro_batches)
        torch.testing.assert_close(cut.train(), losses, rtol=1e-5, atol=1e-6)
        require_equal_up_to_rounding(cut.method, cut.tensors(), uncut.tensors())


def has_other_limit(name):
    """Return whether a method trains adapters and is not LoRA itself."""
    return name != "lora" and not create(name).exports_weights


@cases([case for case in MATRIX if has_other_limit(case[0])])
def test_a_method_in_its_lora_limit_is_lora(name, adapter_form, kind):
    limit = create(name).lora_limit
    assert limit, "a method that trains adapters needs a `lora_limit`"
    plain = sgd_run("lora", adapter_form, kind)
    limit_run = sgd_run(name, adapter_form, kind, options=limit)
    torch.testing.assert_close(limit_run.train(), plain.train(), rtol=1e-5, atol=1e-6)
    final = limit_run.tensors()
    for key, value in plain.tensors().items():
        torch.testing.assert_close(final[key], value, rtol=1e-4, atol=2e-5)


def allows_fp16(name):
    return not constraints.first_violated({"mixed_precision": "fp16", "method": name})


@cases([case for case in MATRIX if allows_fp16(case[0])])
def test_a_step_that_the_scaler_skips_changes_nothing(name, adapter_form, kind):
    run = Run(name, adapter_form, kind, overflow=(1,)).initialise()
    run.train(1)
    before = run.tensors()
    state = run.method.state_dict()
    run.train(1)
    require_equal(run.tensors(), before)
    if name != "flat-lora":  # its noise depends on the loop's step
        assert run.method.state_dict() == state
    run.train(1)
    after = run.tensors()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_python([Path(__file__).with_name("two_processes.py"), folder], processes=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapter_form", "kind"), ROTATION)
def test_two_processes_give_the_same_result_as_one(name, adapter_form, kind, two_processes):
    single = sgd_run(name, adapter_form, kind)
    single.train()
    both = torch.load(two_processes / f"{name}-{adapter_form}-{kind}.pt")
    require_equal_up_to_rounding(single.method, single.tensors(), both)


def test_the_rotation_covers_every_adapter_form_and_kind_of_model():
    assert {adapter_form for _, adapter_form, _ in ROTATION} == set(SPECS)
    assert {kind for _, _, kind in ROTATION} == set(CASES)


WITH_ADAPTERS = [name for name in names() if not get(name).exports_weights]
FROZEN_CASES = [(name, "default") for name in WITH_ADAPTERS]
FROZEN_CASES += [("bilora", "lora-ga"), ("bilora", "dora"), ("lora-sam", "nf4")]
FROZEN_PARAMETERS = [
    pytest.param(*case, marks=() if case == ("bilora", "default") else pytest.mark.slow)
    for case in FROZEN_CASES
]


@pytest.mark.parametrize(("name", "adapter_form"), FROZEN_PARAMETERS)
def test_a_frozen_adapter_affects_training_and_stays_unchanged(name, adapter_form):
    frozen = frozen_adapter("unet")
    run = Run(name, adapter_form, "unet", frozen=(frozen,)).initialise()
    plain = Run(name, adapter_form, "unet").initialise()
    assert run.tensors().keys() == plain.tensors().keys()
    if adapter_form == "default":  # LoRA-GA's start depends on the frozen adapter
        require_equal(run.tensors(), plain.tensors())
    assert run.optimized_ids().isdisjoint(map(id, adapters.parameters(run.model, ASSISTANT)))
    base = run.base_weights()
    assert run.train(1) != plain.train(1)
    run.train()
    require_equal(adapters.state_dict(run.model, ASSISTANT), frozen.tensors)
    require_equal(run.base_weights(), base)
    assert not any(p.requires_grad for p in adapters.parameters(run.model, ASSISTANT))
    assert all(parameter.grad is None for parameter in run.model.parameters())
    with run.method.evaluating():
        assert adapters.active(run.model) == (PRIMARY,)
    assert adapters.active(run.model) == (*run.method.adapters, ASSISTANT)


def frozen_adapter(kind):
    """Return an assistant adapter with random values, on trained layers and on one that is not."""
    model = CASES[kind].make()
    spec = AdapterSpec(rank=3, alpha=3, target_modules=("to_q", "to_k", "conv1", "conv2"))
    adapters.inject(model, spec, ASSISTANT)
    for number, parameter in enumerate(adapters.parameters(model, ASSISTANT)):
        random = torch.Generator().manual_seed(number)
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    tensors = adapters.state_dict(model, ASSISTANT)
    config = adapters.lora_config(model, ASSISTANT)
    return FrozenAdapter(ASSISTANT, tensors, config, strength=0.7)
