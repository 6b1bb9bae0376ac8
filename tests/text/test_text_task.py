"""The text task: its losses equal those of Transformers, also when split or packed; metrics."""

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

from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.text.config import resolve as resolve_text
from bilora_diffusion.text.encode import best_fit, pack, require_packable
from bilora_diffusion.text.evaluation import generate
from bilora_diffusion.text.examples import Example, from_turns
from bilora_diffusion.text.models import load_text_model
from bilora_diffusion.text.module import collate
from bilora_diffusion.text.rows import encode_rows, open_rows
from bilora_diffusion.text.task import TextTask
from tests.text import text_builders as texts
from tests.text.text_builders import chat_tokenizer


def task_of(folder, kind, base=None, **values):
    """Return a task with 24 training rows and 7 held-out rows."""
    base = base or texts.SAVERS[kind](folder / "base")
    options = {
        "model_name_or_path": base,
        "task_type": kind,
        "train_file": texts.write_rows(folder / "train.jsonl", texts.rows_for(kind, 24)),
        "validation_file": texts.write_rows(folder / "held.jsonl", texts.rows_for(kind, 7, 24)),
        "template": "plain",
        "cache_dir": folder,
    }
    cfg = resolve_text(texts.text_flags(folder / "run", **(options | values)))
    rows = open_rows(cfg)
    labels = rows.label_words if kind == "classification" else None
    text_model = load_text_model(str(base), kind, labels=labels)
    return TextTask(cfg, text_model, encode_rows(cfg, rows, text_model))


def step_losses(task, pieces):
    """Return the losses of the first step's 8 slots, split into `pieces` micro-batches."""
    schedule = [(0, tuple(slots.tolist())) for slots in torch.arange(8).chunk(pieces)]
    losses = []
    with torch.no_grad():
        for batch in task.micro_batches(schedule, 8):
            losses.append(task.module(batch.inputs))
    return torch.cat(losses)


def batch_of(rows):
    return collate([rows.row(index) for index in range(len(rows))], "causal", 0)


def transformers_loss(task, rows, count):
    """Return the loss that Transformers' model computes for the first `count` rows in one batch."""
    batch = collate([rows.row(index) for index in range(count)], task.text_model.kind, 0)
    with torch.no_grad():
        return float(task.text_model.model(**batch).loss)


@pytest.mark.parametrize("kind", texts.KINDS)
def test_losses_and_metrics_equal_transformers_for_every_batch_size(tmp_path, kind):
    task = task_of(tmp_path, kind, eval_train_samples=5)
    (batch,) = task.micro_batches([(0, tuple(range(8)))], 8)
    del batch.inputs["weights"]  # Transformers' model does not accept slot weights
    with torch.no_grad():
        loss = task.text_model.model(**batch.inputs).loss
    uncut_losses = step_losses(task, pieces=1)
    assert float(uncut_losses.mean()) == pytest.approx(float(loss), abs=1e-6)
    for pieces in (2, 4, 8):
        torch.testing.assert_close(step_losses(task, pieces), uncut_losses, atol=1e-6, rtol=0)
    if kind != "classification":
        # Targets differ in length, so the mean of the micro-batches' means would be wrong.
        assert len(set(task.data.train.target_tokens[:8])) > 1

    evaluation = task.evaluation
    expected = {
        "heldout_loss": transformers_loss(task, evaluation.rows, 7),
        "train_grid_loss": transformers_loss(task, task.data.train, 5),
    }
    measured = evaluation.measure()
    losses = {name: measured[name] for name in expected}
    assert losses == pytest.approx(expected, abs=1e-6)
    evaluation.cfg = dataclasses.replace(task.cfg, eval_batch_size=1)
    assert evaluation.measure() == pytest.approx(measured, abs=1e-6)


def test_group_by_length_reduces_padding(tmp_path):
    plain = task_of(tmp_path, "causal")
    grouped = task_of(tmp_path, "causal", tmp_path / "base", group_by_length=True)

    def count_padding(task):
        schedule = [(step, (0, 1, 2, 3)) for step in range(6)]  # one epoch
        masks = [batch.inputs["attention_mask"] for batch in task.micro_batches(schedule, 4)]
        return sum(int((mask == 0).sum()) for mask in masks)

    assert count_padding(grouped) < count_padding(plain) / 2


def test_batched_predictions_equal_single_ones(tmp_path):
    """Left padding must not change a causal model's answers."""
    task = task_of(tmp_path, "causal", generation_max_new_tokens=6)
    values = task.validate(3, tmp_path / "run", contextlib.nullcontext())
    file = tmp_path / "run" / "validation" / "step-3" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = texts.rows_for("causal", 7, first=24)
    tokenizer = task.text_model.tokenizer
    hits = 0
    for line, row in zip(lines, rows, strict=True):
        assert (line["prompt"], line["reference"]) == (row["prompt"], row["answer"])
        hits += line["prediction"] == line["reference"]
        inputs = tokenizer([line["prompt"] + "\n"], return_tensors="pt")
        tokens = task.text_model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        assert line["prediction"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert values == {"heldout_exact_match": hits / 7}


def test_running_out_of_memory_gives_one_sentence_with_the_option_that_helps(tmp_path):
    def fill_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    task = task_of(tmp_path, "causal")
    task.text_model.model.register_forward_pre_hook(fill_memory)
    for measure in (task.evaluation.measure, lambda: task.evaluation.answer(tmp_path)):
        with pytest.raises(TrainingError, match=r"of 7 rows needs .* --eval_batch_size \(now 16\)"):
            measure()


def test_an_empty_prompt_gets_an_answer_and_changes_no_other_answer(tmp_path):
    text_model = task_of(tmp_path, "causal").text_model
    prompt = text_model.tokenizer("nine plus one\n")["input_ids"]
    (expected_answer,) = generate(text_model, [prompt], 4)
    generate(text_model, [[]], 4)
    assert generate(text_model, [[], prompt], 4)[1] == expected_answer


def test_prompts_and_answers_stay_within_learned_positions(tmp_path):
    """GPT-2 has a fixed number of positions; long prompts are cut on the left, as in training."""
    base = texts.save_gpt2(tmp_path / "base")
    long_prompts = [{"prompt": "say hello to me " * 40 + str(n), "answer": "one"} for n in range(3)]
    heldout_file = texts.write_rows(tmp_path / "long.jsonl", long_prompts)
    # By default, a task generates up to 256 new tokens.
    task = task_of(tmp_path, "causal", base, validation_file=heldout_file)
    values = task.validate(1, tmp_path / "run", contextlib.nullcontext())
    # It works, with fewer new tokens than that.
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
LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
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


def model(kind, attention=None):
    torch.manual_seed(0)
    network = hf.AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention)
    if kind in ("llama", "mistral", "gpt2"):
        for weight in network.parameters():
            # Large weights make a token's loss depend on the visible tokens and their positions.
            torch.nn.init.normal_(weight, std=0.3)
    return network.eval()


def token_losses(network, batch):
    """Return the losses of all target tokens, row by row."""
    with torch.no_grad():
        logits = network(**batch, use_cache=False).logits.float()  # (rows, tokens, vocabulary)
    targets = batch["labels"][:, 1:]  # a token's logits predict the next token
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return losses[targets != -100].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_packing_does_not_change_any_tokens_loss(kind, attention):
    network = model(kind, attention)
    single = texts.encoded(EXAMPLES, chat_tokenizer(), max_length=64)
    packed = pack(single, 100)
    assert len(packed) < len(single)
    expected_losses = []
    for sources in packed.sources:  # the examples of each row
        for source in sources:
            expected_losses += token_losses(network, collate([single.row(source)], "causal", 0))
    # If all losses were equal, the test would prove nothing.
    assert max(expected_losses) - min(expected_losses) > 0.1

    widths = {len(packed.row(index)["input_ids"]) for index in range(len(packed))}
    assert len(widths) > 1  # so one of the rows is padded
    batch = batch_of(packed)
    assert token_losses(network, batch) == pytest.approx(expected_losses, abs=1e-5)
    # With an ordinary mask, a token also sees the preceding examples.
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    assert token_losses(network, batch) != pytest.approx(expected_losses, abs=1e-3)
    first_names = [single.name(source) for source in packed.sources[0]]
    assert packed.name(0) == " and ".join(first_names)
    require_packable(network)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_each_example_is_packed_once_and_no_row_is_too_long(lengths):
    examples = []
    half_empty_rows = 0
    for row in best_fit(lengths, 20):
        size = sum(lengths[example] for example in row)
        assert 0 < size <= 20
        half_empty_rows += size <= 10
        examples += row
    assert sorted(examples) == list(range(len(lengths)))
    # Two rows that fit into one are always merged, so at most one row is half full or less.
    assert half_empty_rows <= 1


def test_each_example_goes_into_the_fullest_row_that_has_space():
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("jamba", "lets a token see the preceding example"),
        ("mamba", "takes no position_ids"),
        ("llama", "--attn_implementation sdpa"),
    ],
)
def test_models_that_mix_examples_are_refused(kind, reason):
    network = model(kind)
    if kind == "llama":
        network.config._attn_implementation = "flash_attention_2"  # it accepts no mask
    with pytest.raises(UserError, match=reason):
        require_packable(network)
