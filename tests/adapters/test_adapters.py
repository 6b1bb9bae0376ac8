"""adapters: targets, injection, order, state, files and restoring, on the usual models."""

import contextlib
import copy
import json
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
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


def test_dora_on_a_bf16_model_starts_at_its_base():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16), torch.randn(9, 64)
    before = model(x.bfloat16())
    adapters.inject(model, AdapterSpec(use_dora=True))
    layer = cast(Any, adapters.layers(model)[0][1])
    norm = layer.base_layer.weight.float().norm(dim=1)
    magnitude = layer.lora_magnitude_vector[PRIMARY].weight
    torch.testing.assert_close(magnitude, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(x.bfloat16()), before, rtol=1e-2, atol=1e-2)


def test_the_init_is_as_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 40), nn.Linear(40, 400))
    adapters.inject(model, AdapterSpec(rank=8, init="gaussian"), PRIMARY)
    adapters.inject(model, AdapterSpec(rank=8), AUXILIARY)
    for name, deviation in ((PRIMARY, 1 / 8), (AUXILIARY, (3 * 400) ** -0.5)):
        factor = adapters.factors(model, name)[0]
        assert float(factor.A.std()) == pytest.approx(deviation, rel=0.05)
        assert not factor.B.any()


def test_only_restores_order_flags_and_switches():
    model = two_adapters(tiny_mlp(), use_dora=True)
    adapters.parameters(model, PRIMARY)[0].requires_grad_(False)

    def state():
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return adapters.active(model), flags

    for enabled in (True, False):
        for _, layer in adapters.layers(model):
            layer.enable_adapters(enabled)
        before = state()
        for names in ((PRIMARY,), (), BOTH[::-1]):
            with contextlib.suppress(KeyError), adapters.only(model, names):
                assert adapters.active(model) == names
                raise KeyError
            assert state() == before


def test_a_saved_primary_is_a_plain_peft_adapter_that_others_may_read(tmp_path):
    adapters.save_pretrained(two_adapters(tiny_mlp()), tmp_path / "out")
    (tmp_path / "plain").touch()
    written = list((tmp_path / "out").iterdir())
    assert {p.name for p in written} == {"adapter_model.safetensors", "adapter_config.json"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert len({file.stat().st_mode for file in [tmp_path / "plain", *written]}) == 1


def test_a_peft_models_adapter_is_adopted_where_it_has_the_shape():
    model = get_peft_model(tiny_mlp(), LoraConfig(r=3, lora_alpha=6, target_modules=["first"]))
    shape: dict[str, Any] = {"rank": 3, "alpha": 6, "target_modules": ("first",)}
    assert not adapters.adopt(tiny_mlp(), AdapterSpec(**shape))
    for changes, word in (
        ({"rank": 4}, "rank 3"),
        ({"alpha": 7}, "alpha 6"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": "all-linear"}, "target_modules"),
    ):
        with pytest.raises(UserError, match=word):
            adapters.adopt(model, AdapterSpec(**{**shape, **changes}))
    assert adapters.adopt(model, AdapterSpec(**shape))
    adapters.inject(model, AdapterSpec(**shape), AUXILIARY)
    adapters.activate(model, BOTH)
    assert model.active_adapters == list(BOTH)


def test_gpt2_style_conv1d_is_linear():
    model, x = nn.Sequential(Conv1D(5, 6)), torch.randn(4, 6)
    two_adapters(model)
    layer = cast(Any, adapters.layers(model)[0][1])
    deltas = [layer.get_delta_weight(name) for name in BOTH]
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ (deltas[0] + deltas[1]))


class UnsupportedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding_mode="circular")
        self.table = nn.Embedding(5, 8)
        self.plain = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"target_modules": "to_q("}, "regular expression"),
        ({"target_modules": ("attention.out_proj",)}, "MultiheadAttention"),
        *(({"target_modules": (name,)}, name) for name in ("grouped", "dilated", "circular")),
        ({"target_modules": ("table",)}, "Embedding"),
        ({"target_modules": ("to_q",)}, "matches no layer of UnsupportedLayers"),
    ],
)
def test_what_is_refused(values, word):
    with pytest.raises(UserError, match=word):
        adapters.inject(UnsupportedLayers(), AdapterSpec(**values))


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
def test_targets(make, targets, expected):
    names = list(adapters.target_layers(make(), AdapterSpec(target_modules=targets)))
    ends = {end for end in expected for name in names if f".{name}".endswith(f".{end}")}
    assert ends == expected
    assert all(f".{name}".endswith(tuple(f".{end}" for end in expected)) for name in names)


def test_all_linear_leaves_the_output_head_out_as_peft_does():
    for model in (tiny_t5(), tiny_clip()):
        config = LoraConfig(target_modules="all-linear", task_type=None)
        peft = get_peft_model(copy.deepcopy(model), config)
        theirs = {n.removeprefix("base_model.model.") for n, _ in adapters.layers(peft)}
        targets = set(adapters.target_layers(model, AdapterSpec()))
        assert targets == theirs
        assert not any("lm_head" in name for name in targets)
        adapters.inject(model, AdapterSpec())
        with pytest.raises(UserError, match='already has an adapter "default"'):
            adapters.inject(model, AdapterSpec())


class Small(nn.Module):
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
def test_a_model_is_afterwards_as_it_came(method, values):
    torch.manual_seed(0)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    spec = AdapterSpec(rank=2, alpha=4, **{"target_modules": "all-linear", **values})
    for _ in range(2):
        with adapters.restored(model, spec):
            groups = create(method).setup([Target("m", model, spec, 0.1)])
            for group in groups:
                for parameter in group["params"]:
                    parameter.data += 1
            for _, layer in adapters.layers(model, "initial" if spec.changes_base else "default"):
                adapters.base_weight(layer).data *= 2 if spec.changes_base else 1
        assert [type(module) for module in model.modules()] == kinds
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert after[name].dtype == value.dtype
            assert torch.equal(after[name], value)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not hasattr(model, "peft_config")
