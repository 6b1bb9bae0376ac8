"""Valid, foreign, changed and broken LoRA files are either read or refused in one sentence."""

import contextlib
import json
import math
import operator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bilora_diffusion.adapters import AUXILIARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.lora_names import (
    CONFIG,
    FILE_NAME,
    FORMATS,
    WEIGHTS,
)
from bilora_diffusion.export.__main__ import main
from bilora_diffusion.export.conversion import convert
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.reader import read
from eval.cache import hash_of_lora, peft_config
from tests.export.export_models import rewrite

# One layer as diffusers, PEFT and kohya name it
UNET = "unet.conv_in"
PEFT = "base_model.model.conv_in"
KOHYA = "lora_unet_time_embed_0"
METADATA_KEY = "lora_adapter_metadata"
BITS = {
    "BOOL": 8,
    "U8": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "C64": 64,
}


def pair(layer, rank=2, dtype="F16", ends=("A", "B")):
    """Return key -> (dtype, shape) of the factors of a layer with 4 inputs and 4 outputs."""
    first, second = ends
    return {
        f"{layer}.lora_{first}.weight": (dtype, [rank, 4]),
        f"{layer}.lora_{second}.weight": (dtype, [4, rank]),
    }


def kohya_pair(layer, rank=2):
    return pair(layer, rank, ends=("down", "up"))


def file_of(tensors, metadata, fill=b"\0"):
    """Return a structurally valid safetensors file whose data repeats the byte `fill`."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = metadata
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return with_length(json.dumps(header).encode()) + fill * end


def with_length(header):
    """Return the start of a safetensors file: the header's length, then the header."""
    return len(header).to_bytes(8, "little") + header


def test_exported_files_and_their_table_show_no_trace_of_the_auxiliary(folder, capsys):
    for file in (FILE_NAME, "icons.safetensors"):
        contents = inspect(folder / file)
        assert not contents.auxiliary
        assert contents.adapters == ("unnamed",)
        # The scale is multiplied into B, so alpha is the rank.
        assert set(contents.ranks.values()) == set(contents.alphas.values()) == {(4,)}
        assert AUXILIARY.encode() not in (folder / file).read_bytes()
    assert inspect(folder / FILE_NAME).layers == inspect(folder / "icons.safetensors").layers
    assert main([str(folder / "icons.safetensors")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["format", "kohya"] in rows
    assert ["text_encoder", "12", "4", "4"] in rows  # layers, rank and alpha
    assert ["bilora.method", "bilora"] in rows
    assert rows[-1] == ["auxiliary", "none"]


def save_peft(folder, config, key=PEFT):
    """Save a layer of rank 4 and its `adapter_config.json`; return the path of the weights."""
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 4), f"{key}.lora_B.weight": torch.ones(4, 4)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_bytes(config)
    return folder / WEIGHTS


QUERY = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "key", "scale"),
    [
        ('{"r": 4, "lora_alpha": 16}', PEFT, 4.0),
        ('{"r": 4}', PEFT, 2.0),  # PEFT's default alpha is 8
        ('{"r": 4, "lora_alpha": 16, "use_rslora": true}', PEFT, 8.0),
        ('{"r": 4, "lora_alpha": 16, "alpha_pattern": {"conv_(in|out)": 1}}', PEFT, 0.25),
        ('{"r": 8, "lora_alpha": 16, "rank_pattern": {"^conv_in": 4}}', PEFT, 4.0),
        # matched by the name in the file, which differs between Transformers 4 and 5
        (f'{{"r": 4, "alpha_pattern": {{"{QUERY}": 16}}}}', f"base_model.model.{QUERY}", 4.0),
    ],
)
def test_the_scale_follows_pefts_configuration(tmp_path, config, key, scale):
    path = save_peft(tmp_path / "text_encoder", config.encode(), key)
    assert inspect(path).format == "peft"
    (part,) = read(path).parts.values()
    assert part.layers[0].B[0, 0] == scale


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("to", FORMATS)
def test_8_bit_floats_are_converted_exactly(tmp_path, dtype, to):
    A, B = torch.randn(2, 4).to(dtype), torch.randn(4, 2).to(dtype)
    path = tmp_path / "small.safetensors"
    save_file({f"{UNET}.lora_A.weight": A, f"{UNET}.lora_B.weight": B}, path)
    converted = convert(path, to)
    if to == "peft":
        converted /= WEIGHTS
    (layer,) = read(converted).parts["unet"].layers
    assert torch.equal(layer.A.double(), A.double())
    assert torch.equal(layer.B.double(), B.double())


def unet_factors(tensors):
    """Return (layer, "A" or "B", value) for each factor of the UNet."""
    factors = []
    for key, tensor in tensors.items():
        if key.startswith("unet."):
            layer, _, end = key.removesuffix(".weight").rpartition(".lora_")
            factors.append((layer, end, tensor.clone()))
    return factors


def add_by_name(tensors, metadata):
    for layer, end, tensor in unet_factors(tensors):
        tensors[f"{layer}.lora_{end}.auxiliary.weight"] = tensor


def add_in_kohyas_format(tensors, metadata):
    for layer, end, tensor in unet_factors(tensors):
        name = layer.removeprefix("unet.").replace(".", "_")
        way = {"A": "down", "B": "up"}[end]
        tensors[f"lora_unet_{name}.lora_{way}.weight"] = tensor


def add_to_configuration(tensors, metadata):
    config = json.loads(metadata[METADATA_KEY])
    metadata[METADATA_KEY] = json.dumps(config | {"unet.auxiliary.r": 4})


@pytest.mark.parametrize("smuggle", [add_by_name, add_in_kohyas_format, add_to_configuration])
def test_a_smuggled_auxiliary_is_reported(folder, tmp_path, smuggle, capsys):
    file = rewrite(folder / FILE_NAME, tmp_path / FILE_NAME, smuggle)
    assert inspect(file).auxiliary
    assert main([str(file)]) == 0
    assert "auxiliary   FOUND" in capsys.readouterr().out
    assert main([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auxiliary"] is True
    with pytest.raises(UserError, match="more than one adapter"):
        read(tmp_path / FILE_NAME)


def test_unreadable_files_are_refused_in_one_sentence(folder, tmp_path, capsys):
    file_bytes = (folder / FILE_NAME).read_bytes()
    contents = {
        "short": file_bytes[:-10],
        "header": file_bytes[:100],
        "empty": b"",
        "model": file_of({"conv.weight": ("F32", [2])}, {}),
    }
    paths = [tmp_path, tmp_path / "pickle.bin", tmp_path / "missing.safetensors"]
    torch.save({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pickle.bin")
    for name, content in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        paths.append(path)
    for path in paths:
        assert main([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert str(path) in captured.err


DORA = {f"{UNET}.lora_magnitude_vector": ("F32", [4])}
AB = pair(UNET)
# A query layer as diffusers named it before it used PEFT
OLD_QUERY = {
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": ("F16", [2, 4]),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": ("F16", [4, 2]),
}


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        (pair(UNET, 0), "", "lora_A"),
        (pair(UNET, dtype="C64"), "", "lora_A.*C64"),
        (AB | {f"{UNET}.alpha": ("F32", [2])}, "", "alpha"),
        ({f"{UNET}.lora_A.weight": ("F32", [2, 4])}, "", "lora_A"),
        (AB | {f"{UNET}.lora_up.weight": ("F32", [4, 2])}, "", "lora_up"),
        (AB | {f"{UNET}.lora_B.weight": ("F16", [4, 3])}, "", "lora_B"),
        (AB | DORA | pair("unet.conv_out"), "", "conv_out"),
        (kohya_pair(KOHYA) | {f"{KOHYA}.dora_scale": ("F32", [1, 4])}, "", "along the inputs"),
        (AB | DORA, '{"unet.r": 2}', "DoRA"),
        (AB, '{"unet.lora_alpha": 2}', "rank 2.* 8"),
        (AB, '{"unet.r": 2, "unet.peft_type": "LOHA"}', "LOHA"),
        (pair(PEFT), "", "adapter_config.json"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path, tensors, config, sentence):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(file_of(tensors, {METADATA_KEY: config} if config else {}))
    for reader in (read, inspect):
        with pytest.raises(UserError, match=rf"odd\.safetensors.*{sentence}"):
            reader(path)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (kohya_pair("lora_unet_input_blocks_3_1_proj_in"), "input_blocks_3_1"),
        (kohya_pair("lora_unet_mid_block_whatever"), "whatever"),
        (AB | {"unet.conv_in.hada_w1_a": ("F16", [2, 2])}, "hada_w1_a"),
        # One layer under two names; one of them would be lost
        (
            kohya_pair(KOHYA) | kohya_pair("lora_unet_time_embedding_linear_1"),
            "time_embedding.linear_1",
        ),
        (pair(f"text_encoder.{QUERY}") | OLD_QUERY, "self_attn.q_proj as"),
    ],
)
def test_files_that_can_be_inspected_but_not_used_are_refused(tmp_path, tensors, sentence):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(file_of(tensors, {}))
    assert not inspect(path).auxiliary
    with pytest.raises(UserError, match=sentence):
        read(path)


@pytest.mark.parametrize(
    ("a", "b", "alpha"),
    [(1e30, 1e30, 2.0), (1e-30, 1e38, 1e9), (math.nan, 1.0, 2.0), (1.0, 1.0, math.nan)],
)
def test_values_beyond_fp32_are_refused(tmp_path, a, b, alpha):
    tensors = {
        f"{UNET}.lora_A.weight": torch.full((2, 4), a, dtype=torch.float64),
        f"{UNET}.lora_B.weight": torch.full((4, 2), b, dtype=torch.float64),
        f"{UNET}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="conv_in"):
        read(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{", "adapter_config.json"),
        ("{}", "rank 4.* 8"),
        ('{"r": 4, "use_dora": "no"}', "use_dora"),
        ('{"r": 4, "lora_alpha": 1e999}', "lora_alpha"),
    ],
)
def test_an_invalid_peft_configuration_is_refused(tmp_path, config, sentence):
    path = save_peft(tmp_path, config.encode())
    for reader in (inspect, read):
        with pytest.raises(UserError, match=sentence):
            reader(path)


@pytest.mark.parametrize("pattern", ["[", "(a+)+", "a{99999999999}", "(" * 999, ".*.*.*.*.*"])
def test_a_pattern_that_could_take_forever_is_refused(tmp_path, pattern):
    config = {"r": 4, "alpha_pattern": {pattern: 2}}
    path = save_peft(tmp_path, json.dumps(config).encode())
    for reader in (inspect, read):
        with pytest.raises(UserError, match="alpha_pattern"):
            reader(path)


# Parts of almost valid files, for `test_any_file_is_read_or_refused`
LAYERS = ("unet.mid_block.to_q", "lora_unet_mid_block_resnets_0_conv1", "base_model.model.q", "q")
KINDS = ("lora_A.weight", "lora_up.weight", "alpha", "lora_A.auxiliary.weight", "dora_scale")
KEYS = st.builds(".".join, st.tuples(st.sampled_from(LAYERS), st.sampled_from(KINDS)))
SHAPES = st.lists(st.integers(0, 3), max_size=4)
TENSORS = st.dictionaries(KEYS, st.tuples(st.sampled_from(list(BITS)), SHAPES), max_size=6)
NEARLY_LORA = st.builds(operator.or_, st.sampled_from(LAYERS).map(pair), TENSORS)
TEXTS = st.sampled_from(
    (
        "{",
        "[" * 99_999,
        "\0\ud7ff",
        '"\\ud800"',
        '{"unet.r": null}',
        '{"r": [4], "rank_pattern": {"(a+)+": 4}}',
        '{"r": 1e999, "use_dora": 4}',
    )
)
METADATA = st.dictionaries(
    st.sampled_from([METADATA_KEY, "bilora.component", "adapter_names"]), TEXTS
)
FILLS = st.sampled_from([b"\0", b"\x7f"])


def read_config(path):
    return peft_config(path.parent)


@settings(derandomize=True, deadline=None, max_examples=100)
@example(content=b"\xff" * 20, config=b'{"r": ' + b"[" * 900 + b"]" * 900 + b"}")
@given(
    content=st.binary(max_size=60).map(with_length)
    | st.builds(file_of, TENSORS | NEARLY_LORA, METADATA, FILLS),
    config=st.binary(max_size=60) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
)
def test_any_file_is_read_or_refused(tmp_path_factory, content, config):
    any_file = tmp_path_factory.getbasetemp() / "any.safetensors"
    any_file.write_bytes(content)
    with_config = save_peft(any_file.parent / "peft", config)
    for path in (any_file, with_config):
        for reader in (inspect, read, hash_of_lora, read_config):
            with contextlib.suppress(UserError):
                reader(path)


def test_no_content_of_a_file_can_control_the_terminal(folder, tmp_path, capsys):
    title = "\x1b]0;owned\x07\x9b31m\u202e"
    file = tmp_path / "foreign.safetensors"

    # A file with an auxiliary is shown; one with half of a layer is refused.
    for name, exit_code in (("lora_A.auxiliary", 0), ("lora_A", 2)):

        def change(tensors, metadata, name=name):
            metadata[f"key {title}\nauxiliary   none"] = f"value {title}"
            tensors[f"unet.{title}.{name}.weight"] = torch.ones(4, 4)

        rewrite(folder / FILE_NAME, file, change)
        for flags in ([], ["--json"]):
            assert main([str(file), *flags]) == exit_code
            text = "".join(capsys.readouterr())
            assert text.replace("\n", "").isprintable()
            assert "owned" in text
