"""A merged model gives the same answers as base model and adapter, including after a reload."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.export.__main__ import main as export
from bilora_diffusion.text import merging
from bilora_diffusion.text.evaluation import generate
from bilora_diffusion.text.models import load_text_model
from tests.scripts.runs import copied, train_once
from tests.text.text_builders import (
    heldout,
    material,
    save_bert,
    save_gpt2,
    save_llama,
    save_t5,
    train_text,
    train_text_once,
)

TOKENS = torch.tensor([[5, 7, 3, 9, 4], [6, 6, 8, 3, 5]])


@torch.no_grad()
def logits(model, kind):
    inputs = {"input_ids": TOKENS}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = TOKENS.flip(1)
    return model.eval()(**inputs).logits.double()


def random_adapter(base, folder, dtype=torch.float32, **options):
    """Return a base model with a random adapter, and let PEFT save the adapter in `folder`."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options
    adapted = get_peft_model(load_text_model(str(base), dtype=dtype).model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    ("save", "kind", "options"),
    [
        (save_llama, "causal", {}),
        (save_llama, "causal", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        (save_gpt2, "causal", {"use_dora": True}),  # GPT-2's weights are transposed
        (save_t5, "seq2seq", {"use_dora": True}),
        (save_bert, "classification", {"modules_to_save": ["classifier"]}),
    ],
)
def test_a_merged_model_has_the_same_logits_as_the_adapter(save, kind, options, tmp_path):
    base = save(tmp_path / "base")
    expected = logits(random_adapter(base, tmp_path / "adapter", **options), kind)
    text_model = load_text_model(str(base))
    unmerged = logits(text_model.model, kind)
    assert merging.merge(text_model.model, merging._read_adapter(tmp_path / "adapter")) == []
    assert (expected - unmerged).abs().max() > 1e-2  # otherwise the test proves nothing
    torch.testing.assert_close(logits(text_model.model, kind), expected, atol=2e-6, rtol=1e-5)


def test_weights_in_half_precision_are_rounded_once(tmp_path):
    base = save_llama(tmp_path / "base")
    random_adapter(base, tmp_path / "adapter", use_dora=True)
    adapter = merging._read_adapter(tmp_path / "adapter")
    text_model = load_text_model(str(base), dtype=torch.bfloat16)
    weights = {name: value.double() for name, value in text_model.model.named_parameters()}
    (note,) = merging.merge(text_model.model, adapter)
    assert note.startswith("Rounding to bfloat16")
    for name, value in text_model.model.named_parameters():
        layer = name.removesuffix(".weight")
        exact = weights[name]
        if f"{layer}.lora_A.weight" in adapter.tensors:
            A, B, magnitude = (
                adapter.tensors[f"{layer}.{end}"].double()
                for end in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            )
            direction = exact + 6 / 4 * B @ A
            exact = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
        assert torch.equal(value, exact.to(torch.bfloat16))


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    base = save_llama(tmp_path / "base")
    narrow = save_llama(tmp_path / "narrow", hidden_size=16)
    tied = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    random_adapter(base, tmp_path / "adapter")
    random_adapter(tied, tmp_path / "head", target_modules=["lm_head"])
    for model, adapter, sentence in (
        (narrow, "adapter", "does not have the trained shape; restore the base"),
        (save_gpt2(tmp_path / "gpt2"), "adapter", "no unquantized layer model.layers.0"),
        (tied, "head", "lm_head shares its weight with model.embed_tokens"),
    ):
        text_model = load_text_model(str(model))
        with pytest.raises(UserError, match=sentence):
            merging.merge(text_model.model, merging._read_adapter(tmp_path / adapter))
    adapter = merging._read_adapter(tmp_path / "adapter")
    key = next(key for key in adapter.tensors if "lora_A" in key)
    adapter.tensors[key].fill_(torch.inf)
    with pytest.raises(TrainingError, match="is not finite"):
        merging.merge(load_text_model(str(base)).model, adapter)


def answers(model, tokenizer, kind, text_model):
    if kind == "classification":
        return []
    prompts = [tokenizer(text)["input_ids"] for text in ("what is the color", "say hello to me")]
    return generate(
        type(text_model)(model, tokenizer, kind), prompts, new_tokens=8, num_return_sequences=1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("causal", {"init_lora_weights": "pissa"}),
        ("causal", {"quantize": "nf4"}),
        ("seq2seq", {"use_dora": True}),
        ("classification", {"validation_split": 0.3}),
    ],
)
def test_a_merged_run_gives_the_same_answers_as_its_adapter(kind, options, tmp_path, capsys):
    base = material(kind)["model_name_or_path"]
    run = train_text(tmp_path / "run", **material(kind), **options, checkpointing_steps=1)
    assert export([str(run), "--to", "merged"]) == 0
    printed = capsys.readouterr().out.splitlines()
    folder = run / "exports" / "step-2" / "merged"
    assert printed[0] == str(folder)
    assert any("NF4" in line for line in printed) == ("quantize" in options)
    command = f"convert_hf_to_gguf.py {folder} --outfile"
    assert any(command in line for line in printed) == (kind == "causal")
    assert not list(folder.parent.glob(".*"))

    labels = ("negative", "positive") if kind == "classification" else None
    adapted = PeftModel.from_pretrained(load_text_model(str(base), labels=labels).model, str(run))
    merged = load_text_model(str(folder))
    assert merged.kind == kind
    torch.testing.assert_close(
        logits(merged.model, kind), logits(adapted, kind), atol=1e-5, rtol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    if kind == "classification":
        assert merged.model.config.id2label == {0: "negative", 1: "positive"}
    else:
        assert GenerationConfig.from_pretrained(folder).eos_token_id is not None
        assert answers(merged.model, tokenizer, kind, merged) == answers(
            adapted, tokenizer, kind, merged
        )

    (folder / "spiece.model").touch()  # llama.cpp needs it for a T5
    assert export([str(run), "--to", "merged"]) == 0
    printed = capsys.readouterr().out
    assert "is there already" in printed
    assert (command in printed) == (kind != "classification")
    # Each step has its own folder, and the model of a different step is never overwritten.
    assert export([str(run), "--to", "merged", "--step", "1"]) == 0
    assert (run / "exports" / "step-1" / "merged" / "config.json").exists()
    assert export([str(run), "--to", "merged", "--step", "1", "--output", str(folder)]) == 2
    assert "name another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_merged_weights_are_saved_in_shards_in_the_base_models_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "LARGEST_SHARD", "20KB")
    base = tmp_path / "base"
    load_text_model(str(material("causal")["model_name_or_path"])).model.to(
        torch.bfloat16
    ).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(material("causal")["model_name_or_path"])
    tokenizer.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"words")
    options = {**material("causal"), "model_name_or_path": base, "learning_rate": 0.05}
    run = train_text(tmp_path / "run", **options)
    assert export([str(run), "--to", "merged", "--output", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.bfloat16}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"words"


@pytest.mark.slow
def test_runs_that_cannot_be_merged_are_refused(tmp_path, capsys):
    def refusal(*argv):
        assert export([*map(str, argv), "--to", "merged"]) == 2
        return capsys.readouterr().err

    assert "is an image run" in refusal(train_once())
    assert "no run.json" in refusal(tmp_path)
    full = train_text_once("causal", "full", method="full", learning_rate=1e-4)
    assert "use the whole model" in refusal(full)
    shared = train_text_once("causal", validation_file=heldout("causal"), checkpointing_steps=1)
    run = copied(shared, tmp_path / "run")
    assert "no checkpoint of step 7" in refusal(run, "--step", 7)

    tensors = load_file(run / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    del tensors[key]
    save_file(tensors, run / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "without the factor A" in refusal(run)
    (run / "adapter_model.safetensors").unlink()
    assert "add --step with the step of a checkpoint" in refusal(run)
    record = json.loads((run / "run.json").read_text())
    record["config"]["model_name_or_path"] = str(tmp_path / "missing")
    (run / "run.json").write_text(json.dumps(record))
    assert "missing" in refusal(run, "--step", 1)
    assert not (run / "exports").exists()


@pytest.mark.slow
def test_a_merge_that_loads_with_different_outputs_leaves_no_folder(tmp_path, monkeypatch):
    def damage(source, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))

    monkeypatch.setattr(merging, "_copy_vocabulary", damage)
    run = copied(train_text_once("causal"), tmp_path / "run")
    with pytest.raises(TrainingError, match="differs from the merged one"):
        merging.merge_run(run, output=tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path != run]
