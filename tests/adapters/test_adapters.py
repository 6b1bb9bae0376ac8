"""adapters: injection, order, state, files and removal, on the kinds of models that people have."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.errors import UserError
from tests.contract.models import tiny_clip, tiny_mlp, tiny_t5, tiny_unet

BOTH = (PRIMARY, AUXILIARY)


def two_adapters(model: nn.Module, **options: Any) -> nn.Module:
    adapters.inject(model, AdapterSpec(rank=3, alpha=6, **options), PRIMARY)
    adapters.inject(model, AdapterSpec(rank=2, alpha=2), AUXILIARY)
    adapters.activate(model, BOTH)
    with torch.no_grad():
        for name in BOTH:
            for parameter in adapters.parameters(model, name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_injection_is_silent_and_keeps_the_output() -> None:
    model, x = tiny_mlp(), torch.randn(4, 6)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.inject(model, AdapterSpec(), PRIMARY)
        adapters.inject(model, AdapterSpec(), AUXILIARY)
    assert adapters.names(model) == BOTH
    assert adapters.active(model) == (PRIMARY,)
    adapters.activate(model, BOTH)
    assert adapters.active(model) == BOTH
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("base", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_fp32_or_wider(base: torch.dtype, use_dora: bool) -> None:
    model = two_adapters(tiny_mlp().to(base), use_dora=use_dora)
    expected = torch.float64 if base == torch.float64 else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


def test_dora_on_a_bf16_model_starts_at_its_base() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16), torch.randn(9, 64)
    before = model(x.bfloat16())
    adapters.inject(model, AdapterSpec(use_dora=True))
    layer = cast(Any, adapters.layers(model)[0][1])
    norm = layer.base_layer.weight.float().norm(dim=1)
    magnitude = layer.lora_magnitude_vector[PRIMARY].weight
    torch.testing.assert_close(magnitude, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(x.bfloat16()), before, rtol=1e-2, atol=1e-2)


def test_the_init_is_as_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 40), nn.Linear(40, 400))
    adapters.inject(model, AdapterSpec(rank=8, init="gaussian"), PRIMARY)
    adapters.inject(model, AdapterSpec(rank=8), AUXILIARY)
    for name, deviation in ((PRIMARY, 1 / 8), (AUXILIARY, (3 * 400) ** -0.5)):
        factor = adapters.factors(model, name)[0]
        assert float(factor.A.std()) == pytest.approx(deviation, rel=0.05)
        assert not factor.B.any()


@pytest.mark.parametrize("make", [tiny_mlp, tiny_unet, tiny_t5, tiny_clip])
def test_only_the_active_adapters_are_trainable(make: Callable[[], nn.Module]) -> None:
    model = two_adapters(make())
    for wanted in (BOTH, (AUXILIARY,)):
        adapters.activate(model, wanted)
        own = {id(p) for name in wanted for p in adapters.parameters(model, name)}
        assert {id(p) for p in model.parameters() if p.requires_grad} == own
    with pytest.raises(UserError, match='no adapter "other"'):
        adapters.activate(model, ("other",))


def test_only_gives_the_output_of_these_adapters_and_restores_order_flags_and_switches() -> None:
    model, x = two_adapters(tiny_mlp(), use_dora=True), torch.randn(4, 6)
    next(iter(adapters.parameters(model, PRIMARY))).requires_grad_(False)
    before = flags(model)
    with adapters.only(model, (PRIMARY,)):
        assert adapters.active(model) == (PRIMARY,)
        primary = model(x)
    with adapters.only(model, ()):
        assert adapters.active(model) == ()
        base = model(x)
    with pytest.raises(RuntimeError, match="boom"), adapters.only(model, (AUXILIARY,)):
        raise RuntimeError("boom")
    assert adapters.active(model) == BOTH
    assert flags(model) == before
    assert not torch.allclose(model(x), primary)
    for _, layer in adapters.layers(model):
        layer.enable_adapters(False)
    before = flags(model)
    with adapters.only(model, BOTH):
        assert adapters.active(model) == BOTH
    assert adapters.active(model) == ()
    assert flags(model) == before
    adapters.activate(model, BOTH)
    adapters.delete(model, AUXILIARY)
    assert adapters.names(model) == adapters.active(model) == (PRIMARY,)
    assert list(cast(Any, model).peft_config) == [PRIMARY]
    assert torch.equal(model(x), primary)
    adapters.merge_primary(model)
    assert adapters.names(model) == ()
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(x), primary)
    assert not torch.allclose(model(x), base)


def test_layers_that_disagree_are_noticed() -> None:
    model = two_adapters(tiny_mlp())
    adapters.layers(model)[0][1].set_adapter([PRIMARY])
    with pytest.raises(UserError, match="disagree"):
        adapters.active(model)


@pytest.mark.parametrize("make", [tiny_mlp, tiny_unet, tiny_t5])
@pytest.mark.parametrize("use_dora", [False, True])
def test_state_has_pefts_keys_and_comes_back(make: Callable[[], nn.Module], use_dora: bool) -> None:
    model = two_adapters(make(), use_dora=use_dora)
    for name in BOTH:
        state = adapters.state_dict(model, name)
        theirs = get_peft_model_state_dict(model, adapter_name=name)
        assert state.keys() == theirs.keys()
        assert all(torch.equal(state[key], theirs[key]) for key in state)
        with torch.no_grad():
            for parameter in adapters.parameters(model, name):
                parameter.zero_()
        adapters.load_state_dict(model, name, state)
        again = adapters.state_dict(model, name)
        assert all(torch.equal(state[key], again[key]) for key in state)
    assert not any(
        AUXILIARY in key or PRIMARY in key for key in adapters.state_dict(model, PRIMARY)
    )


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = two_adapters(tiny_mlp())
    state = adapters.state_dict(model, PRIMARY)
    key = next(iter(state))
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    for broken, word in (
        ({k: v for k, v in zeros.items() if k != key}, "misses"),
        (zeros | {"other.lora_A.weight": torch.zeros(1)}, "unknown key other"),
        (zeros | {key: torch.zeros(1, 1)}, "shape"),
    ):
        with pytest.raises(UserError, match=word):
            adapters.load_state_dict(model, PRIMARY, broken)
    after = adapters.state_dict(model, PRIMARY)
    assert all(torch.equal(after[k], state[k]) for k in state)


def test_factors_share_storage_and_make_the_weight_change() -> None:
    model = nn.ModuleDict({"unet": two_adapters(tiny_unet()), "text_encoder": tiny_clip()})
    two_adapters(cast(nn.Module, model["text_encoder"]))
    for name in BOTH:
        found = adapters.factors(model, name)
        layers = adapters.layers(model, name)
        assert [f.name for f in found] == [path for path, _ in layers]
        assert {f.name.partition(".")[0] for f in found} == {"unet", "text_encoder"}
        for factor, (_, layer) in zip(found, layers, strict=True):
            delta = adapters.weight_delta(layer, name)
            torch.testing.assert_close(factor.scale * factor.B @ factor.A, delta.flatten(1))
            assert factor.A.data_ptr() == cast(Tensor, layer.lora_A[name].weight).data_ptr()
            assert factor.B.data_ptr() == cast(Tensor, layer.lora_B[name].weight).data_ptr()
        keys = list(adapters.named_parameters(model, name))
        assert len(keys) == len(set(keys)) == 2 * len(found)
        assert keys[0].endswith(".lora_A.weight")


@pytest.mark.parametrize("use_dora", [False, True])
def test_saved_primary_is_a_plain_peft_adapter(tmp_path: Path, use_dora: bool) -> None:
    model, x = tiny_mlp(), torch.randn(4, 6)
    fresh = copy.deepcopy(model)
    two_adapters(model, use_dora=use_dora)
    adapters.save_pretrained(model, tmp_path / "out")
    config = json.loads(json.dumps(adapters.lora_config(model, PRIMARY)))
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert config["target_modules"] == ["first", "last"]
    (tmp_path / "plain").touch()
    written = list((tmp_path / "out").iterdir())
    assert {p.name for p in written} == {"adapter_model.safetensors", "adapter_config.json"}
    modes = {file.stat().st_mode for file in [tmp_path / "plain", *written]}
    assert len(modes) == 1  # others may read it as they may any file
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "out"))
    with adapters.only(model, (PRIMARY,)):
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_a_peft_models_adapter_is_adopted_and_merging_gives_its_inner_model() -> None:
    inner, x = tiny_mlp(), torch.randn(4, 6)
    model = get_peft_model(inner, LoraConfig(r=3, lora_alpha=6, target_modules=["first"]))
    spec = AdapterSpec(rank=3, alpha=6, target_modules=("first",))
    assert adapters.adopt(model, spec)
    assert not adapters.adopt(tiny_mlp(), spec)
    adapters.inject(model, spec, AUXILIARY)
    adapters.activate(model, BOTH)
    assert model.active_adapters == list(BOTH)
    with torch.no_grad():
        for name in BOTH:
            for parameter in adapters.parameters(model, name):
                parameter.normal_()
    with adapters.only(model, (PRIMARY,)):
        expected = model(x)
    plain = adapters.merge_primary(model)
    assert plain is inner
    torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rank": 4}, "rank 3"),
        ({"alpha": 7}, "alpha 6"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": "all-linear"}, "target_modules"),
    ],
)
def test_an_adapter_of_another_shape_is_not_adopted(changes: dict[str, Any], word: str) -> None:
    model = get_peft_model(tiny_mlp(), LoraConfig(r=3, lora_alpha=6, target_modules=["first"]))
    spec = AdapterSpec(**({"rank": 3, "alpha": 6, "target_modules": ("first",)} | changes))
    with pytest.raises(UserError, match=word):
        adapters.adopt(model, spec)


def test_gpt2_style_conv1d_is_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(5, 6)), torch.randn(4, 6)
    two_adapters(model)
    layer = adapters.layers(model)[0][1]
    deltas = [adapters.weight_delta(layer, name) for name in BOTH]
    base = cast(Any, layer).base_layer
    torch.testing.assert_close(model(x), base(x) + x @ (deltas[0] + deltas[1]))
