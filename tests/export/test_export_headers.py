"""Any bytes in a LoRA file's place are read, or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bilora_diffusion.errors import UserError
from bilora_diffusion.export import convert
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.reader import read
from bilora_diffusion.lora_names import FORMATS, WEIGHTS
from eval.digests import of_lora

BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "C64": 64}
BITS |= {"F8_E4M3": 8, "F8_E8M0": 8, "U32": 32}
KINDS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha")
KINDS += ("lora_A.auxiliary.weight", "lora_magnitude_vector", "dora_scale", "lora.down.weight")
LAYERS = (
    "unet.mid_block.to_q.",
    "lora_unet_mid_block_resnets_0_conv1.",
    "base_model.model.q.",
    "q.",
    "",
)
KEYS = st.builds(str.__add__, st.sampled_from(LAYERS), st.sampled_from(KINDS)) | st.text(max_size=9)
TENSORS = st.dictionaries(
    KEYS,
    st.tuples(st.sampled_from(list(BITS)), st.lists(st.integers(0, 3), max_size=4)),
    max_size=6,
)
VALUES = st.sampled_from(
    [
        *("{}", "[]", "[[1, 2]]", "1", "{", '"x"', "null", "[" * 99_999, "1" * 9999, "\0\ud7ff"),
        *('{"unet.r": [4]}', '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": [1]}', '{"": {}}'),
        *('{"unet.rank_pattern": 1, "unet.r": null}', '{"lora_alpha": {"a": 1}}', '{"r": 1e999}'),
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
    ]
)
METADATA = st.dictionaries(
    st.sampled_from(["lora_adapter_metadata", "bilora.component", "adapter_names", "x"]), VALUES
)


def pair(layer: str, r: int = 2, dtype: str = "F16", a: str = "lora_A", b: str = "lora_B") -> Any:
    return {f"{layer}.{a}.weight": (dtype, [r, 4]), f"{layer}.{b}.weight": (dtype, [4, r])}


def kohya(layer: str) -> Any:
    return pair(layer, a="lora_down", b="lora_up")


NEARLY = st.builds(
    lambda layer, made, more: {**made(layer), **more},
    st.sampled_from([layer[:-1] for layer in LAYERS if layer]),
    st.sampled_from([pair, kohya]),
    st.dictionaries(
        KEYS,
        st.tuples(st.sampled_from(list(BITS)), st.sampled_from([[], [1], [2, 4], [4, 2], [4]])),
    ),
)
"""A layer that is right, and more."""


def a_file(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str], fill: bytes = b"\0"
) -> bytes:
    """A structurally valid file, of zeros or other bytes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + fill * end


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.binary(max_size=100)
    | st.binary(max_size=60).map(lambda text: len(text).to_bytes(8, "little") + text)
    | st.builds(a_file, TENSORS | NEARLY, METADATA, st.sampled_from([b"\0", b"\x3c", b"\x7f"]))
)
def test_any_file_is_read_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    for reader in (inspect, read, of_lora):
        with contextlib.suppress(UserError):
            reader(path)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"q.lora_down.weight": ("F32", [])}, {}),
        ({"q.lora_A.weight": ("F32", [2, 2]), "q.alpha": ("C64", [])}, {}),
        ({"q.lora_A.weight": ("F32", [2, 2])}, {"lora_adapter_metadata": "[[1, 2]]"}),
        ({"q.lora_A.weight": ("F32", [2, 2])}, {"lora_adapter_metadata": "[" * 99_999}),
        ({"q.lora_A.weight": ("F32", [2, 2])}, {"lora_adapter_metadata": '{"lora_alpha": "x"}'}),
    ],
)
def test_what_is_no_lora_is_a_sentence(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(a_file(tensors, metadata))
    with pytest.raises(UserError, match=r"odd\.safetensors.*[.;]"):
        inspect(path)


def test_alphas_in_bf16_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "fine.safetensors"
    path.write_bytes(a_file({**kohya("q"), "q.alpha": ("BF16", [1])}, {}))
    assert inspect(path).alphas == {"model": (0.0,)}


UNET, PEFT = "unet.conv_in", "base_model.model.conv_in"
DORA = {f"{UNET}.lora_magnitude_vector": ("F32", [4])}
KERNEL = {f"{UNET}.lora_A.weight": ("F32", [2, 4, 3, 3])}
CONFIGS = "lora_adapter_metadata"


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        (pair(UNET, 0), {}, "lora_A"),
        ({**pair(UNET), f"{UNET}.lora_B.weight": ("F16", [0, 2])}, {}, "lora_B.*0, 2"),
        ({**pair(UNET), f"{UNET}.lora_A.weight": ("F16", [2, 0])}, {}, "lora_A.*2, 0"),
        *((pair(UNET, dtype=dtype), {}, f"lora_A.*{dtype}") for dtype in ("C64", "BOOL", "I64")),
        ({**pair(UNET), f"{UNET}.alpha": ("F32", [2])}, {}, "2 values as .*alpha"),
        ({**pair(UNET), f"{UNET}.alpha": ("F32", [0])}, {}, "0 values as .*alpha"),
        ({**pair(UNET), f"{UNET}.alpha": ("BOOL", [])}, {}, "False as .*alpha"),
        ({f"{UNET}.lora_A.weight": ("F32", [2, 4])}, {}, "lora_A.* factor B"),
        ({**pair(UNET), f"{UNET}.alpha": ("F32", []), "unet.x.alpha": ("F32", [])}, {}, "unet.x"),
        ({**pair(UNET), f"{UNET}.lora_up.weight": ("F32", [4, 2])}, {}, "lora_B.*lora_up"),
        ({**pair(UNET), f"{UNET}.lora_B.weight": ("F16", [4, 3])}, {}, "lora_B.*4, 3"),
        ({**KERNEL, f"{UNET}.lora_B.weight": ("F32", [4, 2, 3, 3])}, {}, "lora_B.*4, 2, 3, 3"),
        ({**KERNEL, f"{UNET}.lora_B.weight": ("F32", [4, 2])}, {}, r"lora_B.*\[4, 2\]"),
        ({**pair(UNET), **DORA, **pair("unet.conv_out")}, {}, "conv_out"),
        ({**pair(UNET), f"{UNET}.lora_magnitude_vector": ("F32", [3])}, {}, "magnitude"),
        ({**pair(UNET), **DORA}, {CONFIGS: '{"unet.r": 2}'}, "no DoRA"),
        (pair(UNET), {CONFIGS: '{"unet.r": 2, "unet.use_dora": true}'}, "DoRA"),
        (pair(UNET), {CONFIGS: '{"unet.lora_alpha": 2}'}, "rank 2.* 8"),
        (pair(UNET), {CONFIGS: '{"unet.r": 2, "unet.rank_pattern": {"conv_in": 3}}'}, "2.* 3"),
        (pair(UNET), {CONFIGS: '{"unet.r": 2, "unet.peft_type": "LOHA"}'}, "LOHA"),
        (pair(PEFT), {}, "adapter_config.json"),
    ],
)
def test_what_can_not_be_right_is_refused_even_by_a_look(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str], named: str
) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(a_file(tensors, metadata))
    for reader in (inspect, read):
        with pytest.raises(UserError, match=rf"odd\.safetensors.*{named}"):
            reader(path)


@pytest.mark.parametrize(
    "layer",
    [
        *("lora_unet_input_blocks_99_1_proj_in", "lora_unet_input_blocks_-1_1_proj_in"),
        *("lora_unet_input_blocks_3_1_proj_in", "lora_unet_input_blocks_4_-1_conv"),
        *("lora_unet_down_blocks_32_resnets_0_conv1", "lora_unet_mid_block_whatever"),
        *("lora_te2_whatever_layer", "lora_te1_text_model_encoder_layers_-1_mlp_fc1"),
    ],
)
def test_kohyas_names_of_no_layer_are_refused(tmp_path: Path, layer: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(a_file(kohya(layer), {}))
    assert inspect(path).format == "kohya"  # a look at it needs no names
    with pytest.raises(UserError, match=layer.split("_", 2)[2]):
        read(path)


def test_a_layer_by_two_names_is_refused(tmp_path: Path) -> None:
    """One of them would be lost."""
    path = tmp_path / "odd.safetensors"
    for one, other in (
        (kohya("lora_unet_time_embed_0"), kohya("lora_unet_time_embedding_linear_1")),
        (pair("unet.conv_in"), pair("conv_in")),
    ):
        path.write_bytes(a_file({**one, **other}, {}))
        with pytest.raises(UserError, match=r"unet\.(conv_in|time_embedding.linear_1)"):
            read(path)


@pytest.mark.parametrize(
    ("a", "b", "alpha"),
    [
        (1e30, 1e30, 2.0),
        (1e-30, 1e38, 1e9),
        (math.nan, 1.0, 2.0),
        (1.0, 1e300, 2.0),
        (1.0, 1.0, math.inf),
        (1.0, 1.0, math.nan),
    ],
)
def test_values_beyond_fp32_are_refused(tmp_path: Path, a: float, b: float, alpha: float) -> None:
    path = tmp_path / "odd.safetensors"
    tensors = {
        f"{UNET}.lora_A.weight": torch.full((2, 4), a, dtype=torch.float64),
        f"{UNET}.lora_B.weight": torch.full((4, 2), b, dtype=torch.float64),
        f"{UNET}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path)
    with pytest.raises(UserError, match="conv_in"):
        read(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("to", FORMATS)
def test_eight_bits_are_converted_exactly(tmp_path: Path, dtype: torch.dtype, to: str) -> None:
    A, B = (torch.randn(shape).to(dtype) for shape in ((2, 4), (4, 2)))
    path = tmp_path / "small.safetensors"
    save_file({f"{UNET}.lora_A.weight": A, f"{UNET}.lora_B.weight": B}, path)
    made = convert(path, to)
    (layer,) = read(made / WEIGHTS if made.is_dir() else made).parts["unet"].layers
    assert torch.equal(layer.A.double(), A.double())
    assert torch.equal(layer.B.double(), B.double())
