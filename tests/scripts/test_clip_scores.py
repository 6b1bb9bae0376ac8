"""``python -m eval.clip_scores`` on runs of the miniature: whole, killed, repeated, refused."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from app.scored import scored
from bilora_diffusion.core.durable import TEMPORARY
from bilora_diffusion.run.runlog import read_metrics
from eval import clip_scores, table
from eval.sources import find
from tests.eval.clip_models import save_blip, save_dinov2, save_open_clip
from tests.export.export_models import rewrite
from tests.scripts.runs import ON_CPUS, TORCHRUN, copied, process, started, train_once

PROMPTS = """a ToK icon of a Fluffy Rabbit, in the style of ToK
a ToK icon of a red car, in the style of ToK
a flat icon of an apple
"""
LORA = "pytorch_lora_weights.safetensors"
SCORES = ("-m", "eval.clip_scores")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def scored_runs(tmp_path_factory):
    """Two runs of two steps as `make demo` leaves them, at a rate that changes images visibly."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "bilora"):
        copied(train_once(method, method=method, learning_rate=3e-2), folder / "demo" / method)
    return folder


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """Flags for a small random scorer, captioner and DINOv2 of the real classes."""
    folder = tmp_path_factory.mktemp("models")
    clip, blip = save_open_clip(folder / "clip"), save_blip(folder / "blip")
    dino = save_dinov2(folder / "dino")
    models = ["--scorer", f"open_clip:{clip}", "--captioner", f"blip:{blip}"]
    return [*models, "--image_model", f"dinov2:{dino}"]


def words(output, *options, steps=2):
    prompts = output.parent / "prompts.txt"
    prompts.write_text(PROMPTS)
    return [
        *options,
        *("--prompts", str(prompts), "--general_prompts", "general", "--max_prompts", "3"),
        *("--num_inference_steps", str(steps), "--seeds", "0", "--output_dir", str(output)),
    ]


def run(*argv):
    """Score in this process and read the result."""
    assert clip_scores.main(argv) == 0
    return table.read(Path(argv[argv.index("--output_dir") + 1]))


def pictures(folder):
    """Every whole image, and when it was written."""
    files = (folder / "images").glob("**/*.png")
    pngs = [file for file in files if not file.name.startswith(TEMPORARY)]
    return {file.relative_to(folder).as_posix(): file.stat().st_mtime_ns for file in pngs}


def require_close(first, second, left_out=""):
    """Every value is the other's too, but for a subject that only the other has."""
    left, right = (
        {
            (r.subject, r.metric, r.item, r.seed): r.value
            for r in result.rows
            if r.subject != left_out
        }
        for result in (first, second)
    )
    assert left == pytest.approx(right, abs=1e-6)


@pytest.mark.slow
def test_the_demo_s_runs_and_the_base_model_from_start_to_end(
    scored_runs, tiny_models, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "scores"
    monkeypatch.chdir(scored_runs)
    argv = words(output, *tiny_models)
    result = run(*argv)
    stdout = capsys.readouterr().out
    assert "18 of 18 images are to be made" in stdout
    assert "No adapter was named" in stdout

    assert [(subject.label, subject.kind) for subject in result.subjects] == [
        *(("LoRA", "run"), ("Bi-LoRA", "run"), ("base model", "base"))
    ]
    assert result.settings["sampling"]["guidance_scale"] == 4.0
    assert result.settings["sampling"]["size"] == 64
    counts = {name: len(result.select(name)) for name in ("image", *clip_scores.METRICS)}
    counts = {name: count for name, count in counts.items() if count}
    assert counts == {"image": 18, "i2t": 9, "t2t": 9, "nearest": 9, "dino_nearest": 9, "drift": 6}
    assert result.settings["image_model"]["kind"] == "dinov2"
    assert all(row.note for name in ("t2t", "nearest") for row in result.select(name))
    compared = {(line.group, line.control) for line in result.summaries if line.pairs}
    assert compared == {("Bi-LoRA", "LoRA"), ("base model", "LoRA")}

    assert result.figures == ["grid.png"]
    for name in (table.FILE, table.ROWS, table.SUMMARY, table.REPORT, *result.figures):
        assert str(tmp_path).encode() not in (output / name).read_bytes()

    before, first = pictures(output), (output / table.ROWS).read_bytes()
    assert len(before) == 18
    run(*argv)
    assert (output / table.ROWS).read_bytes() == first
    copy = shutil.copyfile(scored_runs / "demo" / "lora" / LORA, tmp_path / "copy.safetensors")
    words_again = ["demo/bilora", "LoRA=demo/lora", "base", f"copy={copy}", "--control", "LoRA"]
    repeated = run(*words_again, "--train_data", "mini", *argv)  # another name is no other image
    assert capsys.readouterr().out.count("0 of 18 images are to be made") == 2
    assert pictures(output) == before
    require_close(result, repeated, left_out="copy")
    even = [line for line in repeated.summaries if line.group == "copy"]
    assert {line.metric for line in even} == {*clip_scores.METRICS} - {"truth", "dino_truth"}
    for line in even:
        assert (line.difference, line.higher, line.equal, line.lower) == (0, 0, 3, 0)


@pytest.mark.slow
def test_every_checkpoint_is_scored_and_its_images_are_made_once(tiny_models, tmp_path, capsys):
    steps = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_loss_steps": 1}
    trained = train_once("dog", learning_rate=3e-2, validation_dataset="mini", **steps)
    output = tmp_path / "scores"
    argv = [*words(output, str(trained), *tiny_models), "--max_prompts", "2", "--steps"]
    result = run(*argv, "all")
    assert "10 of 10 images are to be made" in capsys.readouterr().out  # with the base model's
    assert [subject.label for subject in result.subjects] == result.groups == ["step 1", "step 2"]
    assert result.subjects[1].digest == find(str(trained)).digest  # the run's own end
    recorded = {row["step"]: row.get("heldout_loss") for row in read_metrics(trained)}
    losses = {row.subject: row.value for row in result.select("heldout_loss")}
    assert losses == {f"step {step}": recorded[step] for step in (1, 2)}
    assert {(line.group, line.control) for line in result.summaries if line.pairs} == {
        ("step 1", "step 2")
    }
    assert result.figures == ["grid.png", "steps.png"]
    assert len(result.settings["best_steps"]) == len({line.metric for line in result.summaries})
    assert scored(result).labels == ["step 1", "step 2"]  # as the viewer reads it


@pytest.mark.slow
def test_a_broken_adapter_loses_by_the_embedded_scorer(scored_runs, tmp_path):
    torch.manual_seed(0)
    lora, file = scored_runs / "demo" / "lora", tmp_path / "broken.safetensors"
    broken = rewrite(
        lora / LORA, file, lambda tensors, _: [value.normal_() for value in tensors.values()]
    )
    result = run(
        *(f"LoRA={lora}", f"broken={broken}", "--output_dir", str(tmp_path / "out")),
        *("--max_prompts", "8", "--num_inference_steps", "8", "--seeds", "0"),
        *("--general_prompts", "none", "--train_data", "none"),
    )
    assert result.settings["scorer"]["kind"] == "embedded"
    assert result.settings["captioner"]["kind"] == "retrieval"
    assert result.settings["prompts"][0]["reference"] == "1f407.png"
    assert len(result.select("truth")) == 2 * 8
    line = result.summary("broken", "i2t")
    assert line.higher < line.lower


def record(folder):
    """A result without its provenance, which names the folder and the commit."""
    head = json.loads((folder / table.FILE).read_text())
    del head["provenance"]
    return head, *((folder / name).read_text() for name in (table.ROWS, table.SUMMARY))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_makes_no_image_twice_and_two_processes_score_the_same(
    scored_runs, tiny_models, tmp_path, capsys
):
    adapters = [str(scored_runs / "demo" / name) for name in ("lora", "bilora")]
    output, options = tmp_path / "killed", (*adapters, *tiny_models, "--batch_size", "2")
    argv = words(output, *options, steps=3)
    first = started(*SCORES, *argv)
    while not (before := pictures(output)) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = pictures(output)
    assert 0 < len(before) < 15
    assert not (output / table.FILE).exists()

    continued = run(*argv)
    assert f"{15 - len(before)} of 15 images are to be made" in capsys.readouterr().out
    after = pictures(output)
    assert len(after) == 15
    assert {name: after[name] for name in before} == before

    uninterrupted = tmp_path / "whole"
    run(*words(uninterrupted, *options, "--processes", "2", steps=3))
    assert len(pictures(uninterrupted)) == 15
    assert record(uninterrupted) == record(output)

    two = tmp_path / "two"
    argv = words(two, *options, steps=3)
    launched = process(*TORCHRUN, 2, *SCORES, *argv, **ON_CPUS)
    assert launched.stdout.count("written: ") == 1
    assert len(pictures(two)) == 15
    require_close(table.read(two), continued)
