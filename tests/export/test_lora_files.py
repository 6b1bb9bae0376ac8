"""Good, foreign, altered and broken files: read, or refused in one sentence."""

import contextlib
import json
import math
from functools import partial

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

UNET, PEFT = "unet.conv_in", "base_model.model.conv_in"
KOHYA, TIME = "lora_unet_time_embed_0", "lora_unet_time_embedding_linear"
PLACE = "lora_adapter_metadata"
BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "C64": 64}
BITS |= {"F8_E4M3": 8, "F8_E8M0": 8, "U32": 32}


def pair(layer, r=2, dtype="F16", ab=("A", "B")):
    A, B = (f"{layer}.lora_{end}.weight" for end in ab)
    return {A: (dtype, [r, 4]), B: (dtype, [4, r])}


def a_file(tensors, metadata, fill=b"\0"):
    """A structurally valid file, of zeros or other bytes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + fill * end


def test_files_have_no_trace_of_the_auxiliary_and_the_table_says_so(folder, capsys):
    for file in (FILE_NAME, "icons.safetensors"):
        contents = inspect(folder / file)
        assert not contents.auxiliary
        assert contents.adapters == ("unnamed",)
        assert set(contents.ranks.values()) == set(contents.alphas.values()) == {(4,)}
        assert AUXILIARY.encode() not in (folder / file).read_bytes()
    assert inspect(folder / FILE_NAME).layers == inspect(folder / "icons.safetensors").layers
    assert main([str(folder / "icons.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "format      kohya" in lines
    assert any(line.split() == ["text_encoder", "12", "4", "4"] for line in lines)
    assert any(line.split() == ["bilora.method", "bilora"] for line in lines)
    assert lines[-1] == "auxiliary   none"


def peft(folder, config, key=PEFT):
    """A layer of rank 4 with a configuration."""
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 4), f"{key}.lora_B.weight": torch.ones(4, 4)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_bytes(config if isinstance(config, bytes) else config.encode())
    return folder / WEIGHTS


QUERY = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "key", "scale"),
    [
        ('{"r": 4, "lora_alpha": 16}', PEFT, 4.0),
        ('{"r": 4}', PEFT, 2.0),  # PEFT's alpha is 8 then
        ('{"r": 4, "lora_alpha": 16, "use_rslora": true}', PEFT, 8.0),
        ('{"r": 4, "lora_alpha": 16, "alpha_pattern": {"conv_(in|out)": 1}}', PEFT, 0.25),
        ('{"r": 8, "lora_alpha": 16, "rank_pattern": {"^conv_in": 4}}', PEFT, 4.0),
        # by the name in the file, which Transformers 4 and 5 spell differently
        (f'{{"r": 4, "alpha_pattern": {{"{QUERY}": 16}}}}', f"base_model.model.{QUERY}", 4.0),
    ],
)
def test_the_scale_is_that_of_pefts_configuration(tmp_path, config, key, scale):
    path = peft(tmp_path / "text_encoder", config, key)
    assert inspect(path).format == "peft"
    (part,) = read(path).parts.values()
    assert part.layers[0].B[0, 0] == scale


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("to", FORMATS)
def test_eight_bits_are_converted_exactly(tmp_path, dtype, to):
    A, B = (torch.randn(shape).to(dtype) for shape in ((2, 4), (4, 2)))
    path = tmp_path / "small.safetensors"
    save_file({f"{UNET}.lora_A.weight": A, f"{UNET}.lora_B.weight": B}, path)
    converted = convert(path, to)
    (layer,) = read(converted / WEIGHTS if converted.is_dir() else converted).parts["unet"].layers
    assert torch.equal(layer.A.double(), A.double())
    assert torch.equal(layer.B.double(), B.double())


def smuggle(way, tensors, metadata):
    for key in [key for key in tensors if key.startswith("unet.")]:
        name, _, side = key.removesuffix(".weight").rpartition(".lora_")
        flat = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
        if way == "named":
            tensors[f"{name}.lora_{side}.auxiliary.weight"] = tensors[key].clone()
        if way == "kohya":
            tensors[f"{flat}.lora_{DOWN_UP['AB'.index(side)]}.weight"] = tensors[key].clone()
    if way == "configured":
        metadata[PLACE] = json.dumps({**json.loads(metadata[PLACE]), "unet.auxiliary.r": 4})


@pytest.mark.parametrize("way", ["named", "configured", "kohya"])
def test_a_smuggled_auxiliary_is_reported(folder, tmp_path, way, capsys):
    rewrite(folder / FILE_NAME, tmp_path / FILE_NAME, partial(smuggle, way))
    assert inspect(tmp_path / FILE_NAME).auxiliary
    assert main([str(tmp_path / FILE_NAME)]) == 0
    assert "auxiliary   FOUND" in capsys.readouterr().out
    assert main([str(tmp_path / FILE_NAME), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auxiliary"] is True
    with pytest.raises(UserError, match="more than one adapter"):
        read(tmp_path / FILE_NAME)


def test_unreadable_files_are_refused_in_one_sentence(folder, tmp_path, capsys):
    file_bytes = (folder / FILE_NAME).read_bytes()
    contents = {"short": file_bytes[:-10], "header": file_bytes[:100], "empty": b""}
    contents["model"] = a_file({"conv.weight": ("F32", [2])}, {})
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    torch.save({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pickle.bin")
    paths = [tmp_path / f"{name}.safetensors" for name in (*contents, "missing")]
    for path in (*paths, tmp_path / "pickle.bin", tmp_path):
        assert main([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert str(path) in captured.err


DORA = {f"{UNET}.lora_magnitude_vector": ("F32", [4])}
AB = pair(UNET)
DOWN_UP = ("down", "up")
OLD_QUERY = {
    f"text_encoder.{QUERY.replace('q_proj', 'to_q_lora')}.down.weight": ("F16", [2, 4]),
    f"text_encoder.{QUERY.replace('q_proj', 'to_q_lora')}.up.weight": ("F16", [4, 2]),
}
"""As diffusers named it before it had PEFT."""
KOHYAS = pair(KOHYA, ab=DOWN_UP)


@pytest.mark.parametrize(
    ("tensors", "metadata", "word"),
    [
        (pair(UNET, 0), "", "lora_A"),
        (pair(UNET, dtype="C64"), "", "lora_A.*C64"),
        (AB | {f"{UNET}.alpha": ("F32", [2])}, "", "alpha"),
        ({f"{UNET}.lora_A.weight": ("F32", [2, 4])}, "", "lora_A"),
        (AB | {f"{UNET}.lora_up.weight": ("F32", [4, 2])}, "", "lora_up"),
        (AB | {f"{UNET}.lora_B.weight": ("F16", [4, 3])}, "", "lora_B"),
        (AB | DORA | pair("unet.conv_out"), "", "conv_out"),
        (KOHYAS | {f"{KOHYA}.dora_scale": ("F32", [1, 4])}, "", "along the inputs"),
        (AB | DORA, '{"unet.r": 2}', "DoRA"),
        (AB, '{"unet.lora_alpha": 2}', "rank 2.* 8"),
        (AB, '{"unet.r": 2, "unet.peft_type": "LOHA"}', "LOHA"),
        (pair(PEFT), "", "adapter_config.json"),
        # what can be looked at, but not be used
        (pair("lora_unet_input_blocks_3_1_proj_in", ab=DOWN_UP), None, "input_blocks_3_1"),
        (pair("lora_unet_mid_block_whatever", ab=DOWN_UP), None, "whatever"),
        # a layer by two names, of which one would be lost
        (KOHYAS | pair(f"{TIME}_1", ab=DOWN_UP), None, "time_embedding.linear_1"),
        (AB | {"unet.conv_in.hada_w1_a": ("F16", [2, 2])}, None, "hada_w1_a"),
        (pair(f"text_encoder.{QUERY}") | OLD_QUERY, None, "self_attn.q_proj as"),
    ],
)
def test_what_can_not_be_right_is_refused(tmp_path, tensors, metadata, word):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(a_file(tensors, {PLACE: metadata} if metadata else {}))
    with pytest.raises(UserError, match=word):
        read(path)
    if metadata is None:
        assert not inspect(path).auxiliary
        return
    with pytest.raises(UserError, match=rf"odd\.safetensors.*{word}"):
        inspect(path)


def test_values_beyond_fp32_are_refused(tmp_path):
    path, nan = tmp_path / "odd.safetensors", math.nan
    for a, b, alpha in ((1e30, 1e30, 2.0), (1e-30, 1e38, 1e9), (nan, 1.0, 2.0), (1.0, 1.0, nan)):
        tensors = {
            f"{UNET}.lora_A.weight": torch.full((2, 4), a, dtype=torch.float64),
            f"{UNET}.lora_B.weight": torch.full((4, 2), b, dtype=torch.float64),
            f"{UNET}.alpha": torch.tensor(alpha),
        }
        save_file(tensors, path)
        with pytest.raises(UserError, match="conv_in"):
            read(path)


COSTLY = ("[", "(a+)+", "a{99999999999}", "(" * 999, ".*.*.*.*.*")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "adapter_config.json"),
        ("{}", "rank 4.* 8"),
        ('{"r": 4, "use_dora": "no"}', "use_dora"),
        ('{"r": 4, "lora_alpha": 1e999}', "lora_alpha"),
        *((f'{{"r": 4, "alpha_pattern": {{"{k}": 2}}}}', "alpha_pattern") for k in COSTLY),
    ],
)
def test_a_configuration_that_is_not_pefts_is_refused(tmp_path, config, word):
    path = peft(tmp_path, config)
    for reader in (inspect, read):
        with pytest.raises(UserError, match=word):
            reader(path)


LAYERS = ("unet.mid_block.to_q", "lora_unet_mid_block_resnets_0_conv1", "base_model.model.q", "q")
KINDS = ("lora_A.weight", "lora_up.weight", "alpha", "lora_A.auxiliary.weight", "dora_scale")
KEYS = st.builds(".".join, st.tuples(st.sampled_from(LAYERS), st.sampled_from(KINDS)))
SHAPES = st.lists(st.integers(0, 3), max_size=4)
TENSORS = st.dictionaries(KEYS, st.tuples(st.sampled_from(list(BITS)), SHAPES), max_size=6)
NEARLY_LORA = st.builds(
    lambda layer, tensors: pair(layer) | tensors, st.sampled_from(LAYERS), TENSORS
)
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
METADATA = st.dictionaries(st.sampled_from([PLACE, "bilora.component", "adapter_names"]), TEXTS)


@settings(derandomize=True, deadline=None, max_examples=100)
@example(content=b"\xff" * 20, config=b'{"r": ' + b"[" * 900 + b"]" * 900 + b"}")
@given(
    content=st.binary(max_size=60).map(lambda text: len(text).to_bytes(8, "little") + text)
    | st.builds(a_file, TENSORS | NEARLY_LORA, METADATA, st.sampled_from([b"\0", b"\x7f"])),
    config=st.binary(max_size=60) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
)
def test_any_file_is_read_or_a_sentence(tmp_path_factory, content, config):
    any_file = tmp_path_factory.getbasetemp() / "any.safetensors"
    any_file.write_bytes(content)
    with_config = peft(any_file.parent / "peft", config)
    for path in (any_file, with_config):
        for reader in (inspect, read, hash_of_lora, lambda path: peft_config(path.parent)):
            with contextlib.suppress(UserError):
                reader(path)


def test_nothing_in_a_file_steers_the_terminal(folder, tmp_path, capsys):
    title = "\x1b]0;owned\x07\x9b31m\u202e"
    file = tmp_path / "foreign.safetensors"

    def change(tensors, metadata, name):
        metadata |= {f"key {title}\nauxiliary   none": f"value {title}"}
        tensors[f"unet.{title}.{name}.weight"] = torch.ones(4, 4)

    for name, code in (("lora_A.auxiliary", 0), ("lora_A", 2)):
        rewrite(folder / FILE_NAME, file, partial(change, name=name))
        for flags in ([], ["--json"]):
            assert main([str(file), *flags]) == code
            text = "".join(capsys.readouterr())
            assert all(char.isprintable() for char in text.replace("\n", ""))
            assert "owned" in text
