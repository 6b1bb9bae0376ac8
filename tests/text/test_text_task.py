"""The text task: losses as Transformers has them, however cut or packed; and its measures."""

import contextlib
import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.encode import best_fit, pack, require_packable
from bilora_diffusion.text.examples import Example, from_turns
from bilora_diffusion.text.models import load_text_model
from bilora_diffusion.text.module import collate
from bilora_diffusion.text.rows import encode_rows, open_rows
from bilora_diffusion.text.task import TextTask
from tests.text import text_builders as texts
from tests.text.text_builders import chat_tokenizer


def task_of(folder, kind, base=None, **values):
    """A task on 24 rows with 7 held-out ones."""
    base = base or texts.SAVERS[kind](folder / "base")
    train = texts.write_rows(folder / "train.jsonl", texts.rows_for(kind, 24))
    heldout_file = texts.write_rows(folder / "held.jsonl", texts.rows_for(kind, 7, first=24))
    options = {"train_file": train, "validation_file": heldout_file, "template": "plain", **values}
    cfg = resolve_text(
        texts.text_flags(
            folder / "run", model_name_or_path=base, task_type=kind, cache_dir=folder, **options
        )
    )
    rows = open_rows(cfg)
    labels = rows.label_words if kind == "classification" else None
    loaded = load_text_model(str(base), kind, labels=labels)
    return TextTask(cfg, loaded, encode_rows(cfg, rows, loaded))


def step_losses(task, size, pieces):
    """The losses of the slots of the first step of ``size`` samples, cut into ``pieces``."""
    slots = torch.arange(size).chunk(pieces)
    schedule = [(0, tuple(part.tolist())) for part in slots]
    with torch.no_grad():
        return torch.cat([task.module(b.inputs) for b in task.micro_batches(schedule, size)])


def their_loss(task, rows, count):
    """The loss that Transformers' model gives the first rows as one batch."""
    batch = collate([rows.row(i) for i in range(count)], task.loaded.kind, 0)
    with torch.no_grad():
        return float(task.loaded.model(**batch).loss)


@pytest.mark.parametrize("kind", texts.KINDS)
def test_losses_and_measures_are_transformers_however_they_are_cut(tmp_path, kind):
    task = task_of(tmp_path, kind, eval_train_samples=5)
    (batch,) = task.micro_batches([(0, tuple(range(8)))], 8)
    inputs = {name: value for name, value in batch.inputs.items() if name != "weights"}
    with torch.no_grad():
        loss = task.loaded.model(**inputs).loss
    uncut_losses = step_losses(task, 8, 1)
    assert float(uncut_losses.mean()) == pytest.approx(float(loss), abs=1e-6)
    for pieces in (2, 4, 8):
        torch.testing.assert_close(step_losses(task, 8, pieces), uncut_losses, atol=1e-6, rtol=0)
    if kind != "classification":  # the targets are of different lengths, so a mean of means is not
        assert len({task.data.train.target_tokens[i] for i in range(8)}) > 1
    evaluation = task.evaluation
    measured = evaluation.measure()
    theirs = their_loss(task, evaluation.rows, 7)
    assert measured["heldout_loss"] == pytest.approx(theirs, abs=1e-6)
    theirs = their_loss(task, task.data.train, 5)
    assert measured["train_grid_loss"] == pytest.approx(theirs, abs=1e-6)
    evaluation.cfg = dataclasses.replace(task.cfg, eval_batch_size=1)
    assert evaluation.measure() == pytest.approx(measured, abs=1e-6)


def test_group_by_length_brings_like_lengths_together(tmp_path):
    plain = task_of(tmp_path, "causal")
    grouped = task_of(tmp_path, "causal", tmp_path / "base", group_by_length=True)

    def padding(task):
        batches = task.micro_batches([(step, (0, 1, 2, 3)) for step in range(6)], 4)
        return sum(int((b.inputs["attention_mask"] == 0).sum()) for b in batches)

    assert padding(grouped) < padding(plain) / 2


def test_predictions_are_those_of_single_generation(tmp_path):
    """Left padding must not change what a causal model answers."""
    task = task_of(tmp_path, "causal", generation_max_new_tokens=6)
    values = task.validate(3, tmp_path / "run", contextlib.nullcontext())
    file = tmp_path / "run" / "validation" / "step-3" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = texts.rows_for("causal", 7, first=24)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    assert [line["reference"] for line in lines] == [row["answer"] for row in rows]
    hits = sum(line["prediction"] == line["reference"] for line in lines)
    assert values == {"heldout_exact_match": hits / 7}
    tokenizer, model = task.loaded.tokenizer, task.loaded.model
    for line in lines:
        ids = torch.tensor([tokenizer(line["prompt"] + "\n")["input_ids"]])
        tokens = model.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        text = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert line["prediction"] == text.strip()


def test_prompts_and_answers_stay_within_learned_positions(tmp_path):
    """GPT-2 has no position beyond its last; a long prompt is cut from the left, as in training."""
    base = texts.save_gpt2(tmp_path / "base")
    long = [{"prompt": "say hello to me " * 40 + str(n), "answer": "one"} for n in range(3)]
    heldout_file = texts.write_rows(tmp_path / "long.jsonl", long)
    # The task asks for 256 new tokens.
    task = task_of(tmp_path, "causal", base, validation_file=heldout_file)
    values = task.validate(1, tmp_path / "run", contextlib.nullcontext())
    assert values.keys() == {"heldout_exact_match"}
    with pytest.raises(UserError, match=r"--generation_max_new_tokens 64 .* give 32 or less"):
        task_of(tmp_path, "causal", base, generation_max_new_tokens=64)


TALK = from_turns(
    [("user", "what"), ("assistant", "red"), ("user", "and this"), ("assistant", "green")], "row"
)
EXAMPLES = [
    Example("what is the color of this apple", "it is red and that one green"),
    Example("say hello", "hello there", where="row 2"),
    TALK,
    Example("one", "two"),
    Example("three four", "five"),
]
VOCABULARY = len(chat_tokenizer())
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {"intermediate_size": 32, "num_key_value_heads": 2, **SIZES}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
CONFIGS: dict[str, Any] = {
    "llama": hf.LlamaConfig(vocab_size=VOCABULARY, **LLAMA),
    "mistral": hf.MistralConfig(vocab_size=VOCABULARY, sliding_window=16, **LLAMA),
    "gpt2": hf.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **GPT2),
    "jamba": hf.JambaConfig(
        vocab_size=50,
        use_mamba_kernels=False,
        mamba_d_state=4,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        **LLAMA,
    ),
    "mamba": hf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1),
}


def rows():
    return texts.encoded(EXAMPLES, chat_tokenizer(), max_length=64)


def model(kind, attention=None):
    torch.manual_seed(0)
    network = hf.AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention)
    if kind in ("llama", "mistral", "gpt2"):
        for weight in network.parameters():  # large, so that what a token sees and where matters
            torch.nn.init.normal_(weight, std=0.3)
    return network.eval()


def token_losses(network, batch):
    """The loss of each token that has one, row by row."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = network(**inputs, use_cache=False).logits.float()
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses[batch["labels"][:, 1:] != -100].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_each_tokens_loss_is_the_same_as_alone(kind, attention):
    single, network = rows(), model(kind, attention)
    packed = pack(single, 100)
    assert len(packed) < len(single)
    single_losses = [token_losses(network, collate([single.row(i)], "causal", 0)) for i in range(5)]
    batch = collate([packed.row(i) for i in range(len(packed))], "causal", 0)
    widths = {len(packed.row(i)["input_ids"]) for i in range(len(packed))}
    assert len(widths) > 1  # so one of them is padded
    together = token_losses(network, batch)
    assert packed.name(0) == " and ".join(single.name(member) for member in packed.sources[0])
    order = [source for sources in packed.sources for source in sources]
    expected = [loss for source in order for loss in single_losses[source]]
    assert together == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # losses that could not differ prove nothing
    leaking = token_losses(network, batch | {"attention_mask": torch.ones_like(batch["labels"])})
    assert leaking != pytest.approx(expected, abs=1e-3)
    require_packable(network)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_each_example_is_packed_once_and_no_row_is_too_long(lengths):
    packed = best_fit(lengths, 20)
    assert sorted(example for row in packed for example in row) == list(range(len(lengths)))
    sizes = [sum(lengths[example] for example in row) for row in packed]
    assert all(0 < size <= 20 for size in sizes)
    # Two rows that fit into one are never left apart, so at most one is not more than half full.
    assert sum(size <= 10 for size in sizes) <= 1


def test_examples_go_where_they_leave_the_least_room():
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("jamba", "lets a token see the example before its own"),
        ("mamba", "takes no position_ids"),
        ("llama", "--attn_implementation sdpa"),
    ],
)
def test_models_that_mix_examples_are_refused(kind, reason):
    network = model(kind)
    if kind == "llama":
        network.config._attn_implementation = "flash_attention_2"  # which takes no mask
    with pytest.raises(UserError, match=reason):
        require_packable(network)
