"""What an argument names and is called: files, folders, the hub's cache, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import load_pipeline
from eval.clip_scores.settings import base_model
from eval.subjects import single
from tests.export.mini_loras import one, rewrite, write_lora


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA files in the folders "unet" and "weak"."""
    root = tmp_path_factory.mktemp("files")
    pipeline = load_pipeline("mini", dtype=torch.float32)
    write_lora(root / "unet", pipeline)
    write_lora(root / "weak", pipeline, size=0.01, seed=1)
    return root


def test_adapters_of_one_method_are_named_by_their_folders(files: Path) -> None:
    unet, weak = str(files / "unet"), str(files / "weak")
    assert [a.label for a in single([unet, weak])] == ["LoRA (unet)", "LoRA (weak)"]
    assert [a.label for a in single([f"LoRA={unet}", weak])] == ["LoRA", "LoRA (weak)"]
    twice = single([unet, unet])
    assert [a.label for a in twice] == ["LoRA (unet)", "LoRA (unet) 2"]
    assert twice[0].digest == twice[1].digest
    assert [a.group for a in twice] == [a.label for a in twice]


def test_a_path_with_an_equals_sign_is_no_label(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "method=lora"
    shutil.copytree(files / "unet", folder)
    assert single([str(folder)])[0].label == "LoRA"
    assert single([f"A b={folder}"])[0].label == "A b"


def test_the_digest_is_of_the_weights_alone(files: Path, tmp_path: Path) -> None:
    source = files / "unet" / "pytorch_lora_weights.safetensors"
    key = next(iter(load_file(source)))

    def altered(name: str, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> str:
        return one(rewrite(source, tmp_path / f"{name}.safetensors", change)).digest

    def rescale(_: dict[str, Any], metadata: dict[str, str]) -> None:
        described = json.loads(metadata["lora_adapter_metadata"])
        described["unet.lora_alpha"] *= 2
        metadata["lora_adapter_metadata"] = json.dumps(described)

    digest = one(source).digest
    assert altered("same", lambda tensors, metadata: metadata.pop("modelspec.date")) == digest
    assert altered("alpha", rescale) != digest
    assert altered("value", lambda tensors, _: tensors[key][0].add_(1e-6)) != digest
    assert altered("dtype", lambda t, _: t.update({key: t[key].half()})) != digest


def test_the_hubs_files_come_from_its_cache(files: Path, tmp_path: Path) -> None:
    """The cache is filled as a download fills it; offline, nothing else can be asked for."""
    repository = Path(constants.HF_HUB_CACHE) / "models--owner--icons"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    weights = files / "unet" / "pytorch_lora_weights.safetensors"
    for name in (weights.name, "other.safetensors"):
        shutil.copy(weights, snapshot / name)
    (snapshot / "README.md").write_text("---\nbase_model: owner/base\n---\n")
    try:
        usual, named = single(["owner/icons", "Other=owner/icons:other.safetensors"])
        assert (usual.kind, usual.source, usual.label) == ("hub", "owner/icons", "LoRA")
        assert usual.base_model == named.base_model == "owner/base"
        assert usual.digest == named.digest == one(weights).digest
        assert named.weights == snapshot / "other.safetensors"
        with pytest.raises(UserError, match=r'"owner/icons:gone\.safetensors" is neither here'):
            one("owner/icons:gone.safetensors")
    finally:
        shutil.rmtree(repository)


REFUSED = {
    "bse": r'"bse" is no run folder.*\(did you mean "base"\?\)',
    "./gone": 'no file "./gone"',
    "a/b/c": 'no file "a/b/c"',
    "owner/nothing": '"owner/nothing" is neither here nor',
    "owner/nothing:weights.bin": "names no .safetensors file",
    "=base": "lacks a label",
    "label=": "lacks a label",
    "FOLDER/empty": "is no run folder",
    "FOLDER/pickle.bin": "may run code",
    "FOLDER/cut.safetensors": "is not a whole safetensors file",
    "FOLDER/plain.safetensors": "holds no LoRA",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_a_bad_argument_is_refused_in_one_sentence(
    argument: str, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle.bin").write_bytes(b"x")
    whole = (files / "unet" / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=REFUSED[argument]) as caught:
        single([argument.replace("FOLDER", str(tmp_path))])
    assert "\n" not in str(caught.value)


def test_a_mistyped_run_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "bilora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(UserError, match=r'"runs/bilroa" \(did you mean "runs/bilora"\?\)'):
        one("runs/bilroa")
    assert capsys.readouterr() == ("", "")


def test_a_run_that_is_not_finished_is_named(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(files / "unet", folder)
    record = {"schema_version": 1, "method": "lora", "status": "running", "seed": 3, "config": {}}
    (folder / "run.json").write_text(json.dumps(record))
    (subject,) = single([str(folder)])
    assert (subject.kind, subject.method, subject.label, subject.seed) == ("run", "lora", "LoRA", 3)
    assert 'status "running"' in caplog.text
    (folder / "run.json").write_text(json.dumps(record | {"method": "full"}))
    with pytest.raises(UserError, match="without unet"):
        one(folder)


def test_a_label_that_is_given_twice_is_refused(files: Path) -> None:
    with pytest.raises(UserError, match='label "A" is given twice'):
        single(["A=base", f"A={files / 'unet'}"])


def test_all_adapters_belong_to_one_base(files: Path, tmp_path: Path) -> None:
    weights = files / "unet" / "pytorch_lora_weights.safetensors"
    change = {"ss_sd_model_name": "owner/other"}
    other = rewrite(weights, tmp_path / "o.safetensors", lambda _, m: m.update(change))
    silent = rewrite(weights, tmp_path / "s.safetensors", lambda _, m: m.pop("bilora.method"))
    base, mini, foreign, unknown = single(["base", *map(str, (weights, other, silent))])
    assert unknown.base_model is None
    assert base_model([base, mini, unknown], None) == "mini"
    assert base_model([base, unknown], "owner/x") == "owner/x"
    assert base_model([foreign], str(tmp_path)) == str(tmp_path)  # a local copy
    with pytest.raises(UserError, match=r"trained on mini and .* on owner/other"):
        base_model([mini, foreign], None)
    with pytest.raises(UserError, match="give --base_model"):
        base_model([base, unknown], None)
    with pytest.raises(UserError, match="trained on owner/other, not on mini"):
        base_model([foreign], "mini")
