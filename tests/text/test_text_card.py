"""The model card of a text run: front matter the hub reads, code that runs, no local paths."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.export import save_adapter
from bilora_diffusion.text.card import write_text_card
from bilora_diffusion.text.config import parse_text
from bilora_diffusion.text.models import load_text_model
from tests.text.text_builders import SAVERS, rows_for, train_text, write_rows

TAGS = {
    "seq2seq": "text2text-generation",
    "causal": "text-generation",
    "classification": "text-classification",
}
MODELS = {
    "seq2seq": "google-t5/t5-base",
    "causal": "meta-llama/Llama-3.1-8B",
    "classification": "FacebookAI/roberta-base",
}
LABELS = {"classification": ["negative", "positive"]}


def card(
    folder: Path, kind: str, model: str | None = None, repo: str | None = None, **values: Any
) -> ModelCard:
    argv = ["--model_name_or_path", model or MODELS[kind], "--task_type", kind, "--task", "sst2"]
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    results = {
        "steps": 30,
        "export": {"labels": LABELS.get(kind, []), "layers": 3},
        "heldout_loss": 0.123456789,
        "heldout_exact_match": 0.75,
    }
    write_text_card(parse_text(argv), folder, results, repo)
    return ModelCard.load(folder / "README.md")


def code(text: str) -> str:
    """The card's Python, which is Python."""
    block = text.split("```python\n")[1].split("\n```")[0]
    ast.parse(block)
    return block


@pytest.mark.parametrize("kind", sorted(TAGS))
def test_a_card(tmp_path: Path, kind: str) -> None:
    adapter = card(tmp_path, kind, repo="me/my-model")
    assert adapter.data.to_dict() == {
        "library_name": "peft",
        "base_model": MODELS[kind],
        "pipeline_tag": TAGS[kind],
        "tags": ["bilora-diffusion", "bilora"],
    }
    snippet = code(adapter.text)
    for part in (MODELS[kind], "me/my-model", "PeftModel.from_pretrained(base"):
        assert part in snippet
    assert ("num_labels=2" in snippet) == (kind == "classification")
    for part in ("| exact match | 0.75 |", "0.123", "sst2"):
        assert part in adapter.text
    whole = card(tmp_path, kind, method="full")
    assert whole.data.to_dict()["library_name"] == "transformers"
    assert 'subfolder="model"' in code(whole.text)
    assert "PeftModel" not in code(whole.text)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("seq2seq", "bilora"), ("causal", "bilora")),
        *(("classification", "bilora"), ("classification", "full")),
    ],
)
def test_the_code_runs_on_what_a_run_left(tmp_path: Path, kind: str, method: str) -> None:
    base = SAVERS[kind](tmp_path / "my-base")
    run = train_text(
        tmp_path / "run",
        model_name_or_path=base,
        train_file=write_rows(tmp_path / "rows.jsonl", rows_for(kind, 8)),
        template="plain",
        max_train_steps=1,
        method=method,
    )
    snippet = code((run / "README.md").read_text())
    for old, new in (("path/to/this/folder", run), ("path/to/my-base", base)):
        assert (old in snippet) == (method == "bilora" or new == run)
        snippet = snippet.replace(old, str(new))
    names: dict[str, Any] = {}
    exec(snippet, names)  # the card's own code
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    inputs = dict(tokenizer("hello there", return_tensors="pt"))
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0]])
    assert torch.isfinite(model(**inputs).logits).all()


def test_the_code_for_a_packaged_base_runs(tmp_path: Path) -> None:
    labels = tuple(LABELS["classification"])
    model = load_text_model("minilm", "classification", labels=labels).model
    spec = AdapterSpec(rank=2, alpha=4, modules_to_save=("classifier",))
    adapters.inject(model, spec, adapters.PRIMARY)
    save_adapter(tmp_path, model, base_model="minilm", kind="classification")
    found = card(tmp_path, "classification", model="minilm")
    assert "base_model" not in found.data.to_dict()
    names: dict[str, Any] = {}
    exec(code(found.text).replace("path/to/this/folder", str(tmp_path)), names)
    assert names["model"].peft_config["default"].r == 2


def test_local_folders_are_named_without_their_place(tmp_path: Path) -> None:
    base = tmp_path / "secret-place" / "my-base"
    base.mkdir(parents=True)
    rows = tmp_path / "secret-place" / "rows.jsonl"
    rows.write_text("{}")
    argv = ["--model_name_or_path", str(base), "--task_type", "causal", "--train_file", str(rows)]
    results = {"steps": 1, "export": {"labels": []}}
    write_text_card(parse_text(argv), tmp_path, results, None)
    text = (tmp_path / "README.md").read_text()
    code(text)
    assert "my-base" in text
    assert "rows.jsonl" in text
    assert "secret-place" not in text
    assert str(tmp_path) not in text
