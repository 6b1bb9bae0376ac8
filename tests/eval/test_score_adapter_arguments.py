"""What an argument names and is called: files, folders, the hub's cache, and what is refused."""

from __future__ import annotations

import json
import shutil
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


def labels(*words: str) -> list[str]:
    subjects = single(words)
    assert [subject.group for subject in subjects] == [subject.label for subject in subjects]
    return [subject.label for subject in subjects]


def test_adapters_of_one_method_are_named_by_their_folders(files: Path, tmp_path: Path) -> None:
    unet, weak = str(files / "unet"), str(files / "weak")
    assert labels(unet, weak, "base") == ["LoRA (unet)", "LoRA (weak)", "base model"]
    assert labels(f"LoRA={unet}", weak) == ["LoRA", "LoRA (weak)"]
    assert labels(unet, unet) == ["LoRA (unet)", "LoRA (unet) 2"]
    folder = shutil.copytree(files / "unet", tmp_path / "method=lora")  # which is no label
    assert labels(str(folder)) == ["LoRA"]
    assert labels(f"A b={folder}") == ["A b"]


def test_the_digest_is_of_the_weights_alone(files: Path, tmp_path: Path) -> None:
    source = files / "unet" / "pytorch_lora_weights.safetensors"
    key = next(iter(load_file(source)))

    def rescale(_: dict[str, Any], metadata: dict[str, str]) -> None:
        described = json.loads(metadata["lora_adapter_metadata"])
        described["unet.lora_alpha"] *= 2
        metadata["lora_adapter_metadata"] = json.dumps(described)

    def altered(change: Any) -> str:
        return one(rewrite(source, tmp_path / "altered.safetensors", change)).digest

    digest = one(source).digest
    assert altered(lambda tensors, metadata: metadata.pop("modelspec.date")) == digest
    assert altered(rescale) != digest
    assert altered(lambda tensors, _: tensors[key][0].add_(1e-6)) != digest
    assert altered(lambda t, _: t.update({key: t[key].half()})) != digest


def test_the_hubs_files_come_from_its_cache(files: Path) -> None:
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
        with pytest.raises(UserError, match=r'"owner/icons:gone\.safetensors"'):
            one("owner/icons:gone.safetensors")
    finally:
        shutil.rmtree(repository)


def test_a_run_that_is_not_finished_is_named(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(files / "unet", tmp_path / "run")
    record = {"schema_version": 1, "method": "lora", "status": "running", "seed": 3, "config": {}}
    (folder / "run.json").write_text(json.dumps(record))
    (subject,) = single([str(folder)])
    assert (subject.kind, subject.method, subject.label, subject.seed) == ("run", "lora", "LoRA", 3)
    assert '"running"' in caplog.text
    (folder / "run.json").write_text(json.dumps(record | {"method": "full"}))
    with pytest.raises(UserError, match="without unet"):
        one(folder)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["bse"], ['"bse"', 'did you mean "base"']),
        (["./gone"], ['"./gone"']),
        (["a/b/c"], ['"a/b/c"']),
        (["owner/nothing"], ['"owner/nothing"', "connection"]),
        (["owner/nothing:weights.bin"], ['"owner/nothing:weights.bin"', ".safetensors"]),
        (["runs/bilroa"], ['did you mean "runs/bilora"']),  # and the hub is not asked
        (["=base"], ['"=base"', "LABEL=ADAPTER"]),
        (["label="], ['"label="', "LABEL=ADAPTER"]),
        (["A=base", "A=base"], ['"A"']),
        (["runs/bilora"], ["runs/bilora", "run.json"]),
        (["pickle.bin"], ["pickle.bin", ".safetensors"]),
        (["cut.safetensors"], ["cut.safetensors"]),
        (["plain.safetensors"], ["plain.safetensors", "no LoRA"]),
    ],
)
def test_a_bad_argument_is_refused_in_one_sentence(
    words: list[str],
    shown: list[str],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/bilora").mkdir(parents=True)
    Path("pickle.bin").write_bytes(b"x")
    whole = (files / "unet" / "pytorch_lora_weights.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-100])
    save_file({"weight": torch.zeros(2)}, "plain.safetensors")
    with pytest.raises(UserError) as caught:
        single(words)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in shown), caught.value
    assert capsys.readouterr() == ("", "")


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
    for subjects, given, shown in (
        ([mini, foreign], None, "mini.*owner/other"),
        ([base, unknown], None, "--base_model"),
        ([foreign], "mini", "owner/other.*mini"),
    ):
        with pytest.raises(UserError, match=shown):
            base_model(subjects, given)
