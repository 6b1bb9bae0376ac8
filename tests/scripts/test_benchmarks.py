"""The benchmarks as a user runs them, on their smallest models, and the full models' sizes."""

import importlib
import json
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.methods import names
from eval.clip_scores.prompts import read
from eval.sweep import plan, scoring
from tests.scripts.runs import ROOT, SCRIPT, TEXT_SCRIPT

BENCHMARKS = ROOT / "benchmarks"
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
TINY = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (1, 1, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,  # 32 + 6 * 8
    },
    "vae": {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "sample_size": 64,
        "norm_num_groups": 4,
    },
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
}
"""Changes to the configurations of SDXL's models, which keep their architecture."""


@pytest.fixture
def load(monkeypatch):
    """Return a function that imports a benchmark; benchmarks import each other by file name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.matrix
@pytest.mark.slow
def test_step_cost_writes_a_table_and_json_with_all_requested_methods(
    load, monkeypatch, tmp_path, capsys
):
    file = tmp_path / "result.json"
    step_cost = load("step_cost")
    flags = f"--model mini --steps 1 --json {file}"
    step_cost.main(f"{flags} --variants lora".split())
    (row,) = json.loads(file.read_text())["variants"].values()
    assert row["peak_memory_bytes"] > 2**27
    assert f"| {row['peak_memory_bytes'] / 1e9:.2f} |" in capsys.readouterr().out
    # Memory is measured in a separate process for each method, which is slow.
    monkeypatch.setattr(step_cost, "memory_of", lambda *_: 0)
    step_cost.main(f"{flags} --methods all".split())
    variants = json.loads(file.read_text())["variants"]
    assert next(iter(variants)) == "lora"
    assert set(variants) == set(names()) - {"full"}


def test_step_cost_measures_full_fine_tuning_at_the_requested_batch_and_length(
    load, monkeypatch, tmp_path, capsys
):
    file = tmp_path / "result.json"
    step_cost = load("step_cost")
    narrow = narrow_llama(load, step_cost)
    monkeypatch.setitem(step_cost.WORKLOADS, "llama-7b-layer", narrow)
    commands = []

    def peak_memory(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="1\n", stderr="")

    monkeypatch.setattr(step_cost, "subprocess", SimpleNamespace(run=peak_memory))
    flags = f"--model llama-7b-layer --steps 1 --batch 3 --length 5 --json {file}"
    step_cost.main(f"{flags} --methods all,full".split())
    result = json.loads(file.read_text())
    assert set(result["variants"]) == set(names())
    assert (result["batch"], result["length"]) == (3, 5)
    assert "batch 3 of 5 tokens" in capsys.readouterr().out
    assert len(commands) == len(names())
    assert all(command[-4:] == ["--batch", "3", "--length", "5"] for command in commands)
    variants = result["variants"]
    assert variants["full"]["trained_parameters"] > variants["lora"]["trained_parameters"]


def narrow_llama(load, step_cost):
    """Return the workload of Llama's layers with a narrow model."""
    llama = step_cost.WORKLOADS["llama-7b-layer"]
    return replace(llama, build=partial(load("random_models").llama_7b, **LLAMA))


@pytest.mark.parametrize(
    ("model", "layers"), [pytest.param("mini", 56, marks=pytest.mark.slow), ("llama-7b-layer", 14)]
)
def test_the_fused_forward_of_bilora_trains_like_peft_s(model, layers, load, tmp_path, monkeypatch):
    step_cost = load("step_cost")
    file = tmp_path / "result.json"
    monkeypatch.setitem(step_cost.WORKLOADS, "llama-7b-layer", narrow_llama(load, step_cost))
    monkeypatch.setattr(step_cost, "memory_of", lambda *_: 0)
    step_cost.main(f"--model {model} --steps 5 --json {file}".split())
    result = json.loads(file.read_text())
    assert result["layers"] == layers  # Llama: two blocks of seven, not the output head
    assert list(result["variants"]) == ["lora", "bilora", "bilora-peft"]
    for row in result["variants"].values():
        low, high = row["ratio_interval_95"]
        assert low <= row["ratio_to_lora"] <= high
    lora, fused, peft = result["variants"].values()
    assert lora["ratio_to_lora"] == 1.0
    assert fused["trained_parameters"] == peft["trained_parameters"]
    assert fused["trained_parameters"] == 2 * lora["trained_parameters"]
    assert fused["last_loss"] == pytest.approx(peft["last_loss"], rel=1e-5)
    assert fused["last_loss"] < fused["first_loss"]


AGAINST = f"against_diffusers --script {TEXT_SCRIPT}"


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("step_cost --model mini --variants bilora", "--variants"),
        ("step_cost --model mini --length 256", "--length"),
        ("step_cost --model t5-base --length 0", "--length"),
        ("step_cost --model mini --json no/such/a.json", "no/such/a.json"),
        ("against_diffusers --script no.py", "no.py"),
        (f"{AGAINST} --device cuda", "--device"),
        (f"{AGAINST} --preset sdxl", "--preset"),
        (f"{AGAINST} --rounds 0", "--rounds"),
        (f"{AGAINST} --peer_flags it's", "--peer_flags"),
    ],
)
def test_bad_input_gives_one_sentence(line, part, load, capsys):
    program, *arguments = line.split()
    main = load(program).main
    assert run_cli(lambda: main(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_rounds_are_fair_and_the_ratio_is_paired(load):
    measure = load("measure")
    order = []

    def variant(name):
        def seconds(number):
            order.append(name)
            return float(number)

        return seconds

    times = measure.interleave([variant("A"), variant("B"), variant("C")], rounds=3, warmup=1)
    assert times == [[0.0, 1.0, 2.0]] * 3  # the warm-up does not count
    assert "".join(order) == "CABABCBCACAB"  # warm-up CAB; then each variant is first once
    baseline = [1.0, 2.0, 1.0, 4.0, 1.0, 1.0]  # a machine that is slow at times
    ratio, interval = measure.paired_ratio([1.1 * value for value in baseline], baseline)
    assert ratio == pytest.approx(1.1)
    assert interval == pytest.approx((1.1, 1.1))
    assert measure.paired_ratio([1.0], [2.0]) == (0.5, None)


@pytest.mark.parametrize(
    ("builder", "parameters"),
    [
        (("sdxl", "unet"), 2_567_463_684),
        (("sdxl", "vae"), 83_653_863),
        (("sdxl", "text_encoder"), 123_060_480),
        (("sdxl", "text_encoder_2"), 694_659_840),
        (("t5_base",), 222_903_552),
        (("llama_7b",), 6_738_415_616),
    ],
)
def test_the_real_architectures_have_their_published_sizes(builder, parameters, load):
    name, *arguments = builder
    with torch.device("meta"):
        model = getattr(load("random_models"), name)(*arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.slow
def test_diffusers_loads_and_runs_the_random_pipeline(load, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    tiny = tmp_path / "tiny"
    assert load("random_models").write_pipeline(tiny, TINY)["unet"] == 1_545_956
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tiny, dtype=torch.bfloat16, add_watermarker=False
    )
    output: Any = pipeline(
        "a TOK icon", num_inference_steps=2, height=64, width=64, output_type="pt"
    )
    assert torch.isfinite(output.images).all()
    assert output.images.float().std() > 0.05


@pytest.mark.matrix
def test_a_script_is_timed_against_another_with_the_same_flags(load, tmp_path, capsys):
    """This project's own script replaces diffusers', which is not installed."""
    file = tmp_path / "result.json"
    peer_flags = (
        "--method lora --lora_alpha 4 --init_lora_weights gaussian --validation_dataset none"
    )
    flags = f"--script {SCRIPT} --steps 3 --rounds 1 --variants lora --json {file} --peer_flags"
    load("against_diffusers").main([*flags.split(), peer_flags])
    result = json.loads(file.read_text())
    assert result["images"] == 23
    peer, lora = result["variants"].values()
    for row in (peer, lora):
        assert row["start"]["median"] + 3 * row["step"]["median"] < row["seconds"]["median"]
        assert row["memory"]["median"] > 2**28
    assert lora["heldout_loss"]["ratio"] == pytest.approx(1, abs=1e-6)  # the same run
    # Both the estimate and the measurement are of one process with its libraries.
    assert lora["estimate"]["median"] == pytest.approx(lora["memory"]["median"], rel=0.5)
    assert str(tmp_path) not in file.read_text()
    assert "| diffusers, LoRA | " in capsys.readouterr().out


def test_the_split_of_peft_s_cat_pictures_fits_its_experiment(tmp_path, monkeypatch, hub):
    script = importlib.import_module("benchmarks.peft_cat")
    pictures = [Image.new("RGB", (64, 64), (10 * row, 0, 0)) for row in range(20)]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"image": pictures})
    monkeypatch.chdir(tmp_path)
    script.main([])
    counts = {part.name: len(list(part.glob("*.png"))) for part in Path("peft_cat").iterdir()}
    assert counts == {"train": 14, "valid": 2, "heldout": 4}
    (sweep_plan,) = plan.load(ROOT / "eval" / "experiments" / "peft_cat.yaml")
    assert [variant.label for variant in sweep_plan.variants] == ["LoRA", "Bi-LoRA", "LoRA-SAM"]
    scores = sweep_plan.experiment.scores
    assert scores is not None
    captions = [prompt.text for prompt in read(scores.prompts)]
    assert captions == [script.CAPTIONS[row] for row in script.HELDOUT]
    assert scoring.Scoring(scores, tmp_path).num_checkpoint_images == 12

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"image": pictures[:3]})
    with pytest.raises(UserError, match="has 3 pictures, but 20 are expected"):
        script.main([])
