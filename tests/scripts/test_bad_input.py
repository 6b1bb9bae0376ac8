"""Bad input that is found behind the command line: one sentence, exit code 2, nothing touched.

What a command line itself can have wrong stands in tests/config/test_refusals.py.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train_dreambooth_bilora
from tests.scripts.runs import flags

Case = tuple[str, dict[str, Any], str]

CASES: list[Case] = [
    ("unknown method", {"method": "bilroa"}, "bilora"),
    ("damaged image", {"dataset": "{tmp}/damaged", "instance_prompt": "x"}, "broken.png"),
    ("missing image", {"dataset": "{tmp}/listed", "caption_column": "text"}, "gone.png"),
    ("no such column", {"dataset": "{tmp}/captioned", "caption_column": "prompt"}, "text"),
    ("no image column", {"image_column": "picture"}, "picture"),
    ("unknown hub model", {"pretrained_model_name_or_path": "no/such-model"}, "no/such-model"),
    ("recipe key", {"config": "{tmp}/typo.yaml"}, "learning_rate"),
    ("caching random crops", {"dataset": "{tmp}/wide", "cache_latents": "yes"}, "center_crop"),
    ("resume of nothing", {"resume_from_checkpoint": "latest"}, "no checkpoint"),
    ("resume of a file", {"resume_from_checkpoint": "{tmp}/typo.yaml"}, "typo.yaml"),
    ("output is a file", {"output_dir": "{tmp}/typo.yaml"}, "typo.yaml"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("damaged", "listed", "captioned", "wide"):
        (folder / name).mkdir()
    Image.new("RGB", (64, 64)).save(folder / "damaged" / "fine.png")
    content = (folder / "damaged" / "fine.png").read_bytes()
    (folder / "damaged" / "broken.png").write_bytes(content[: len(content) // 2])
    rows = ['{"file_name": "here.png", "text": "a"}', '{"file_name": "gone.png", "text": "b"}']
    for name in ("listed", "captioned"):
        Image.new("RGB", (64, 64)).save(folder / name / "here.png")
    (folder / "captioned" / "metadata.jsonl").write_text(rows[0] + "\n")
    (folder / "listed" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    Image.new("RGB", (128, 64)).save(folder / "wide" / "wide.png")
    (folder / "typo.yaml").write_text("dataset: mini\nlearning_rat: 0.1\n")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: Case, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, values, named = case
    values = {k: v.format(tmp=material) if isinstance(v, str) else v for k, v in values.items()}
    if values.get("dataset", "").endswith("wide"):
        values["instance_prompt"] = "a photo of a TOK thing"
    if values.get("dataset", "").startswith(str(material)):
        values["pretrained_model_name_or_path"] = "mini"
    before = snapshot(material)
    code = train_dreambooth_bilora.main(flags(tmp_path / "run", **values))
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert named in errors[0]
    assert "Traceback" not in said
    assert snapshot(material) == before
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_finished_run_is_not_overwritten(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", checkpointing_steps=1)
    whole = snapshot(run)
    attempts = [
        flags(run),
        flags(run, resume_from_checkpoint="latest", overwrite_output_dir=True),
        flags(run, resume_from_checkpoint="step-9"),
        flags(run, resume_from_checkpoint="latest", method="lora"),
    ]
    for argv in attempts:
        assert train_dreambooth_bilora.main(argv) == 2
        assert snapshot(run) == whole
    assert capsys.readouterr().err.count("error: ") == len(attempts)


def test_a_truncated_checkpoint_is_named(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", checkpointing_steps=1)
    file = run / "checkpoints" / "step-2" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert train_dreambooth_bilora.main(flags(run, resume_from_checkpoint="latest")) == 2
    assert "adapters.safetensors" in capsys.readouterr().err


def test_the_script_itself_exits_with_2(
    script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    said = script(flags(tmp_path / "run", method="bilroa"))
    assert said.returncode == 2
    assert said.stderr.startswith("error: ")
    assert len(said.stderr.splitlines()) == 1
    assert 'did you mean "bilora"?' in said.stderr


def snapshot(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
