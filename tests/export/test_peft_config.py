"""adapter_config.json beside a file of PEFT's: what it says is done, or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bilora_diffusion.errors import UserError
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.reader import read
from bilora_diffusion.lora_names import WEIGHTS
from eval.digests import peft_config

PEFT = "base_model.model.conv_in"
FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")
COSTLY = ("[", "(a+)+", "a{99999999999}", "(" * 999, ".*.*.*.*.*")


def peft(folder: Path, config: str) -> Path:
    """A layer of rank 4 with a configuration."""
    ones = {f"{PEFT}.lora_A.weight": torch.ones(4, 4), f"{PEFT}.lora_B.weight": torch.ones(4, 4)}
    save_file(ones, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(config)
    return folder / WEIGHTS


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ('{"r": 4, "lora_alpha": 16}', 4.0),
        ('{"r": 4}', 2.0),  # PEFT's alpha is 8 then
        ('{"r": 4, "lora_alpha": 16, "use_rslora": true}', 8.0),
        ('{"r": 4, "lora_alpha": 16, "alpha_pattern": {"conv_(in|out)": 1}}', 0.25),
        ('{"r": 8, "lora_alpha": 16, "rank_pattern": {"^conv_in": 4}}', 4.0),
    ],
)
def test_the_scale_is_that_of_pefts_configuration(
    tmp_path: Path, config: str, scale: float
) -> None:
    path = peft(tmp_path, config)
    other = Path(shutil.copy(path, tmp_path / "other.safetensors"))  # PEFT's keys by another name
    for file in (path, other):
        (layer,) = read(file).parts["unet"].layers
        assert layer.B[0, 0] == scale


def test_patterns_are_compared_with_the_names_of_the_file(tmp_path: Path) -> None:
    """Of a text encoder, which Transformers 4 and 5 name differently."""
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": {name: 8}}
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{name}"
    ones = {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}
    save_file(ones, folder / WEIGHTS)
    (layer,) = read(folder / WEIGHTS).parts["text_encoder"].layers
    assert layer.B[0, 0] == 4


@pytest.mark.parametrize(
    ("config", "named"),
    [
        *(("[]", r"\[\]"), ("{", "adapter_config.json"), ('{"r": 4, "peft_type": "LOHA"}', "LOHA")),
        *(("{}", "rank 4.* 8"), ('{"lora_alpha": 16}', "rank 4.* 8"), ('{"r": "4"}', "'4'")),
        *((f'{{"r": 4, "{flag}": "no"}}', f"{flag}.*'no'") for flag in FLAGS),
        ('{"r": 4, "lora_alpha": 1e999}', "lora_alpha.*inf"),
        ('{"r": 4, "lora_alpha": true}', "lora_alpha.*True"),
        *((f'{{"r": 4, "alpha_pattern": {v}}}', "alpha_pattern") for v in ("[]", '"x"', "3")),
        *((f'{{"r": 4, "alpha_pattern": {{"{k}": 2}}}}', "alpha_pattern") for k in COSTLY),
        ('{"r": 4, "alpha_pattern": {"a": "2"}}', "alpha_pattern.a.*'2'"),
        ('{"r": 4, "rank_pattern": {"a": 0}}', "rank_pattern.a.*0"),
        ('{"r": 4, "base_model_name_or_path": ["a"]}', "base_model_name_or_path"),
        ('{"r": 4, "base_model_name_or_path": "\\ud800"}', "ud800"),
    ],
)
def test_a_configuration_that_is_not_pefts_is_refused(
    tmp_path: Path, config: str, named: str
) -> None:
    path = peft(tmp_path, config)
    for reader in (inspect, read):
        with pytest.raises(UserError, match=named):
            reader(path)


FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "revision", "x", *FLAGS)
JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["LORA", "conv_in", "(a+)+", "[", "\ud800", 10**400, 4]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*FIELDS, *COSTLY]) | st.text(max_size=5), inner)
    ),
    max_leaves=8,
)
CONFIG_BYTES = st.binary(max_size=60) | (
    st.dictionaries(st.sampled_from(FIELDS), JSONS, max_size=5) | JSONS
).map(lambda value: json.dumps(value).encode())


@settings(derandomize=True, deadline=None, max_examples=200)
@example(content=b"[" * 99_999)
@example(content=b'{"r": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(content=b'{"r": ' + b"1" * 9999 + b"}")
@given(content=CONFIG_BYTES)
def test_any_configuration_is_read_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = peft(tmp_path_factory.getbasetemp(), "")
    (path.parent / "adapter_config.json").write_bytes(content)
    for reader in (inspect, read, lambda path: peft_config(path.parent)):
        with contextlib.suppress(UserError):
            reader(path)
