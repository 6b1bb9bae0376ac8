"""`python -m bilora_diffusion.export`: what it finds in good, foreign, altered and broken files."""

from __future__ import annotations

import json
import runpy
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.export import FILE_NAME, inspect, main
from tests.contract.models import tiny_clip
from tests.export.export_models import ATTENTION, add_adapters, make_unet, rewrite


def test_files_have_no_trace_of_the_auxiliary_and_the_table_says_so(folder, capsys) -> None:
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
    assert max(map(len, lines[1:])) <= 110


@pytest.mark.parametrize("way", ["named", "doubled", "rank", "configured", "listed", "kohya"])
def test_a_smuggled_auxiliary_is_reported(folder, tmp_path, way, capsys) -> None:
    def change(tensors, metadata) -> None:
        pairs = {key: value for key, value in tensors.items() if key.startswith("unet.")}
        for key, value in pairs.items():
            kind = "lora_A.weight" if "lora_A" in key else "lora_B.weight"
            if way == "named":
                tensors[key.replace(".weight", ".auxiliary.weight")] = value.clone()
            elif way == "doubled":
                other = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
                tensors[key.replace(kind, other[kind])] = value.clone()
            elif way == "kohya":
                other = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
                name = key.removeprefix("unet.").removesuffix(f".{kind}").replace(".", "_")
                tensors[f"lora_unet_{name}.{other[kind]}"] = value.clone()
            elif way == "rank":
                tensors[key] = torch.cat([value, value], dim=int(kind == "lora_B.weight"))
        if way == "configured":
            config = json.loads(metadata["lora_adapter_metadata"])
            metadata["lora_adapter_metadata"] = json.dumps({**config, "unet.auxiliary.r": 4})
        if way == "listed":
            metadata["adapter_names"] = "default, auxiliary"

    rewrite(folder / FILE_NAME, tmp_path / FILE_NAME, change)
    contents = inspect(tmp_path / FILE_NAME)
    assert contents.auxiliary
    assert main([str(tmp_path / FILE_NAME)]) == 0
    assert "auxiliary   FOUND" in capsys.readouterr().out
    assert main([str(tmp_path / FILE_NAME), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auxiliary"] is True


def test_inspect_reads_peft_files(tmp_path) -> None:
    model = add_adapters(tiny_clip(), AdapterSpec(rank=2, alpha=6))
    adapters.save_pretrained(model, tmp_path)
    contents = inspect(tmp_path / "adapter_model.safetensors")
    assert (contents.format, contents.auxiliary) == ("peft", False)
    assert (contents.layers, contents.ranks) == ({"model": 12}, {"model": (2,)})
    assert contents.alphas == {"model": (6.0,)}
    assert contents.parameters == sum(p.numel() for p in adapters.parameters(model, PRIMARY))


def test_inspect_names_every_adapter_of_a_raw_state(tmp_path) -> None:
    model = add_adapters(make_unet(), AdapterSpec(target_modules=ATTENTION))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if "lora" in k}
    save_file(state, tmp_path / "raw.safetensors")
    contents = inspect(tmp_path / "raw.safetensors")
    assert contents.adapters == (PRIMARY, AUXILIARY) or contents.adapters == (AUXILIARY, PRIMARY)
    assert contents.auxiliary
    assert contents.format == "unknown"
    assert contents.ranks == {"model": (3, 4)}


def test_unreadable_files_are_refused_in_one_sentence(folder, tmp_path, capsys) -> None:
    whole = (folder / FILE_NAME).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-10])
    (tmp_path / "header.safetensors").write_bytes(whole[:100])
    (tmp_path / "text.safetensors").write_text("not a file of weights")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    torch.save({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pickle.bin")
    metadata = {"lora_adapter_metadata": "{"}
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "json.safetensors", metadata)
    names = ("short", "header", "text", "empty", "model", "json", "missing")
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    for path in (*paths, tmp_path / "pickle.bin", tmp_path):
        assert main([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert str(path) in captured.err


def test_nothing_in_a_file_steers_the_terminal(folder, tmp_path, capsys) -> None:
    title = "\x1b]0;owned\x07\x9b31m\u202e"
    file = tmp_path / "foreign.safetensors"

    def change(tensors, metadata, name) -> None:
        metadata |= {f"key {title}\nauxiliary   none": f"value {title}"}
        tensors[f"unet.{title}.{name}.weight"] = torch.ones(4, 4)

    for name, code in (("lora_A.auxiliary", 0), ("lora_A", 2)):
        rewrite(folder / FILE_NAME, file, partial(change, name=name))
        for flags in ([], ["--json"]):
            assert main([str(file), *flags]) == code
            text = "".join(capsys.readouterr())
            assert all(char.isprintable() for char in text.replace("\n", ""))
            assert "owned" in text


def test_module_runs_as_a_script(folder, tmp_path, monkeypatch, capsys) -> None:
    for path, code in ((folder / FILE_NAME, 0), (tmp_path / "missing", 2)):
        monkeypatch.setattr(sys, "argv", ["export", str(path)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_module("bilora_diffusion.export", run_name="__main__")
        assert exit.value.code == code
    assert "auxiliary   none" in capsys.readouterr().out
