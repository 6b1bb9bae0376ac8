"""Any bytes in a LoRA file's place are read, or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion.errors import UserError
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.reader import read

BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "C64": 64}
BITS |= {"F8_E4M3": 8, "F8_E8M0": 8, "U32": 32}
KINDS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha")
KINDS += ("lora_A.auxiliary.weight", "lora_magnitude_vector", "dora_scale", "lora.down.weight")
LAYERS = ("unet.mid_block.to_q.", "lora_unet_mid_block_to_q.", "base_model.model.q.", "q.", "")
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


def a_file(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> bytes:
    """A structurally valid file of zeros."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.binary(max_size=100)
    | st.binary(max_size=60).map(lambda text: len(text).to_bytes(8, "little") + text)
    | st.builds(a_file, TENSORS, METADATA)
)
def test_any_file_is_read_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    for reader in (inspect, read):
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


def test_alphas_of_several_values_or_in_bf16_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "fine.safetensors"
    pair = {"q.lora_down.weight": ("F16", [2, 4])}
    path.write_bytes(a_file({**pair, "q.alpha": ("BF16", [1])}, {}))
    assert inspect(path).alphas == {"model": (0.0,)}
    path.write_bytes(a_file({**pair, "q.alpha": ("F32", [2])}, {}))
    assert inspect(path).alphas == {}
