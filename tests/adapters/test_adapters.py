"""Adapters on small models: targets, injection, activation, saved files, and restoring."""

import contextlib
import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bilora_diffusion import adapters
from bilora_diffusion.adapters import (
    ASSISTANT,
    AUXILIARY,
    INITIAL,
    PRIMARY,
    SAMPLING,
    AdapterSpec,
)
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import Target, create
from tests.contract.models import tiny_clip, tiny_mlp, tiny_t5, tiny_unet
from tests.export.export_models import add_adapters

BOTH = (PRIMARY, AUXILIARY)


def two_adapters(model, **options):
    return add_adapters(model, AdapterSpec(rank=3, alpha=6, **options))


@pytest.mark.parametrize("base", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_fp32_or_wider(base, use_dora):
    model = two_adapters(tiny_mlp().to(base), use_dora=use_dora)
    expected = torch.float64 if base == torch.float64 else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


def test_dora_on_a_bf16_model_starts_with_the_base_models_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    base_output = model(x)
    adapters.inject(model, AdapterSpec(use_dora=True))
    layer: Any = adapters.layers(model)[0][1]
    # PEFT computes this norm in the base's precision, so its DoRA starts with a rounding error.
    norm = layer.base_layer.weight.float().norm(dim=1)
    magnitude = layer.lora_magnitude_vector[PRIMARY].weight
    torch.testing.assert_close(magnitude, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(x), base_output, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("init", "deviation"),
    [
        ("gaussian", 1 / 8),  # 1 / rank
        ("default", (3 * 400) ** -0.5),  # uniform in +- 1 / sqrt(inputs)
    ],
)
def test_each_init_gives_a_its_distribution_and_zeros_to_b(init, deviation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 40))
    adapters.inject(model, AdapterSpec(rank=8, init=init))
    (factors,) = adapters.factors(model, PRIMARY)
    assert float(factors.A.std()) == pytest.approx(deviation, rel=0.05)
    assert not factors.B.any()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("names", [(PRIMARY,), (), BOTH[::-1]])
def test_active_adapters_and_trainable_parameters_are_restored_after_only(enabled, names):
    model = two_adapters(tiny_mlp(), use_dora=True)
    adapters.parameters(model, PRIMARY)[0].requires_grad_(False)
    for _, layer in adapters.layers(model):
        layer.enable_adapters(enabled)

    def state():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return adapters.active(model), flags

    before = state()
    with contextlib.suppress(KeyError), adapters.only(model, names):
        assert adapters.active(model) == names
        # The state is restored even after an error.
        raise KeyError
    assert state() == before


def test_off_and_scaled_leave_a_frozen_adapter_active_and_joined_by_adds_it():
    model = two_adapters(tiny_mlp())
    adapters.inject(model, AdapterSpec(rank=2, target_modules=("first",)), ASSISTANT)
    for parameter in adapters.parameters(model, ASSISTANT):
        torch.nn.init.normal_(parameter)
    adapters.activate(model, (*BOTH, ASSISTANT))
    x = torch.randn(5, next(model.parameters()).shape[1])
    layers = [layer for _, layer in adapters.layers(model)]
    with torch.no_grad(), adapters.off(layers):
        base = model(x)
    assert adapters.active(model) == (*BOTH, ASSISTANT)
    with torch.no_grad(), adapters.scaled(layers, 1e-9):
        torch.testing.assert_close(model(x), base)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad(), adapters.only(model, (ASSISTANT,)):
        assert torch.equal(base, model(x))
    with adapters.only(model, (PRIMARY,)):
        with adapters.joined_by(model, ASSISTANT):
            assert adapters.active(model) == (PRIMARY, ASSISTANT)
        with adapters.joined_by(model, SAMPLING):  # not on this model
            assert adapters.active(model) == (PRIMARY,)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(p.requires_grad for p in adapters.parameters(model, ASSISTANT))


def test_a_saved_primary_is_a_plain_peft_adapter_with_the_usual_file_permissions(tmp_path):
    adapters.save_pretrained(two_adapters(tiny_mlp()), tmp_path / "out")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    config_file = tmp_path / "out" / "adapter_config.json"
    assert set((tmp_path / "out").iterdir()) == {weights, config_file}
    config = json.loads(config_file.read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    # The permissions are those of any new file.
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert weights.stat().st_mode == config_file.stat().st_mode == mode


def peft_model():
    return get_peft_model(tiny_mlp(), LoraConfig(r=3, lora_alpha=6, target_modules=["first"]))


PEFT_SPEC = AdapterSpec(rank=3, alpha=6, target_modules=("first",))


def test_a_peft_models_adapter_is_adopted():
    assert not adapters.adopt(tiny_mlp(), PEFT_SPEC)
    model = peft_model()
    assert adapters.adopt(model, PEFT_SPEC)
    adapters.inject(model, PEFT_SPEC, AUXILIARY)
    adapters.activate(model, BOTH)
    assert model.active_adapters == list(BOTH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 4}, "rank 3"),
        ({"alpha": 7}, "alpha 6"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": "all-linear"}, "target_modules"),
    ],
)
def test_a_peft_models_adapter_with_other_settings_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        adapters.adopt(peft_model(), replace(PEFT_SPEC, **changes))


def test_adapters_work_on_gpt2s_conv1d():
    model = two_adapters(nn.Sequential(Conv1D(5, 6)))
    layer: Any = adapters.layers(model)[0][1]
    delta = layer.get_delta_weight(PRIMARY) + layer.get_delta_weight(AUXILIARY)
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ delta)


class UnsupportedLayers(nn.Module):
    """A model with one supported layer, `plain`, and several unsupported ones."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding_mode="circular")
        self.table = nn.Embedding(5, 8)
        self.plain = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("to_q(", "regular expression"),
        (("attention.out_proj",), "MultiheadAttention"),
        (("grouped",), "grouped"),
        (("dilated",), "dilated"),
        (("circular",), "circular"),
        (("table",), "Embedding"),
        (("to_q",), "matches no layer of UnsupportedLayers"),
    ],
)
def test_invalid_or_unsupported_targets_are_refused(targets, words):
    with pytest.raises(UserError, match=words):
        adapters.inject(UnsupportedLayers(), AdapterSpec(target_modules=targets))


@pytest.mark.parametrize(
    ("make", "targets", "expected"),
    [
        (UnsupportedLayers, "all-linear", {"plain"}),
        (tiny_mlp, "all-linear", {"first", "last"}),
        (tiny_mlp, ("last",), {"last"}),
        (tiny_mlp, "fir.*", {"first"}),
        (tiny_unet, ("to_q", "to_out.0"), {"to_q", "to_out.0"}),
        (tiny_unet, ("conv1", "to_k"), {"conv1", "to_k"}),
    ],
)
def test_target_modules_select_the_expected_layers(make, targets, expected):
    """`expected` has the endings of the targets' paths; each ending has at least one target."""
    ends = set()
    for path in adapters.target_layers(make(), AdapterSpec(target_modules=targets)):
        matching_ends = [end for end in expected if f".{path}".endswith(f".{end}")]
        assert matching_ends, path
        ends.update(matching_ends)
    assert ends == expected


@pytest.mark.parametrize("make", [tiny_t5, tiny_clip])
def test_all_linear_skips_the_output_head_as_peft_does(make):
    config = LoraConfig(target_modules="all-linear", task_type=None)
    peft_layers = adapters.layers(get_peft_model(make(), config))
    peft_targets = [path.removeprefix("base_model.model.") for path, _ in peft_layers]
    targets = adapters.target_layers(make(), AdapterSpec())
    assert set(targets) == set(peft_targets)
    assert not any("lm_head" in path for path in targets)


def test_a_second_adapter_of_the_same_name_is_refused():
    model = tiny_mlp()
    adapters.inject(model, AdapterSpec())
    with pytest.raises(UserError, match='already has an adapter "default"'):
        adapters.inject(model, AdapterSpec())


class Small(nn.Module):
    """A frozen bf16 model with a head that can be trained in full."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x):
        return self.head.to(x.dtype)(self.body.to(x.dtype)(x))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ("head",), "target_modules": ("body.0", "body.2")},
        {"init": "pissa"},
    ],
)
@pytest.mark.parametrize("method", ["lora", "bilora"])
def test_restored_leaves_the_model_bit_for_bit_unchanged(method, values):
    torch.manual_seed(0)
    model = Small()
    initial_state = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    spec = AdapterSpec(rank=2, alpha=4, **values)
    for _ in range(2):
        with adapters.restored(model, spec):
            groups = create(method).setup([Target("m", model, spec, 0.1)])
            for group in groups:
                for parameter in group["params"]:
                    parameter.data += 1
            if spec.changes_base:  # PiSSA changes the base weights too
                for _, layer in adapters.layers(model, INITIAL):
                    adapters.base_weight(layer).data *= 2
        assert [type(module) for module in model.modules()] == classes
        state = model.state_dict()
        assert state.keys() == initial_state.keys()
        for name, tensor in initial_state.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not hasattr(model, "peft_config")
