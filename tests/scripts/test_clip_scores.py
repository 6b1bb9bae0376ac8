"""``python -m eval.clip_scores`` on runs of the miniature: complete, killed and repeated."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from app.scores import read_scores
from bilora_diffusion.core.durable import TEMPORARY
from bilora_diffusion.run.runlog import read_metrics
from eval import clip_scores
from eval.results import table
from eval.sources import find
from tests.eval.clip_models import save_blip, save_dinov2, save_open_clip
from tests.export.export_models import rewrite
from tests.scripts.runs import ON_CPUS, copied, run_python, started, train_once

PROMPTS = """a ToK icon of a Fluffy Rabbit, in the style of ToK
a ToK icon of a red car, in the style of ToK
a flat icon of an apple
"""
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory):
    """Create two-step runs in the folders of `make demo`, at a rate that changes images visibly."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "bilora"):
        run = train_once(method, method=method, learning_rate=3e-2)
        copied(run, folder / "demo" / method)
    return folder


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """Return flags for small random models: a scorer, a captioner and a DINOv2."""
    folder = tmp_path_factory.mktemp("models")
    scorer = save_open_clip(folder / "clip")
    captioner = save_blip(folder / "blip")
    image_model = save_dinov2(folder / "dino")
    return (
        f"--scorer open_clip:{scorer} --captioner blip:{captioner}"
        f" --image_model dinov2:{image_model}"
    )


def command_line(output, flags, steps=2):
    """Write three prompts next to the output folder, and return the flags that score them."""
    prompts = output.parent / "prompts.txt"
    prompts.write_text(PROMPTS)
    return (
        f"{flags} --prompts {prompts} --general_prompts general --max_prompts 3"
        f" --num_inference_steps {steps} --seeds 0 --output_dir {output}"
    )


def score(line):
    """Run a command line in this process and return its result."""
    argv = line.split()
    assert clip_scores.main(argv) == 0
    return table.read(Path(argv[argv.index("--output_dir") + 1]))


def write_times(folder):
    """Return the time at which each complete image was written, by the image's path."""
    times = {}
    for file in (folder / "images").glob("**/*.png"):
        if not file.name.startswith(TEMPORARY):
            times[file.relative_to(folder).as_posix()] = file.stat().st_mtime_ns
    return times


def values_of(result):
    return {(row.subject, row.metric, row.item, row.seed): row.value for row in result.rows}


@pytest.mark.slow
def test_the_runs_of_the_demo_and_the_base_model_are_scored(
    demo_runs, tiny_models, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "scores"
    monkeypatch.chdir(demo_runs)
    command = command_line(output, tiny_models)
    result = score(command)
    stdout = capsys.readouterr().out
    assert "18 of 18 images will be generated" in stdout
    assert "No adapter is given" in stdout

    subjects = [(subject.label, subject.kind) for subject in result.subjects]
    assert subjects == [("LoRA", "run"), ("Bi-LoRA", "run"), ("base model", "base")]
    assert result.settings["sampling"]["guidance_scale"] == 4.0
    assert result.settings["sampling"]["size"] == 64
    # 3 subjects x (3 prompts of the style + 3 general ones) x 1 seed; the base has no drift.
    counts = {"image": 18, "i2t": 9, "t2t": 9, "nearest": 9, "dino_nearest": 9, "drift": 6}
    for name in ("image", *clip_scores.METRICS):
        assert len(result.select(name)) == counts.get(name, 0), name
    assert result.settings["image_model"]["kind"] == "dinov2"
    for name in ("t2t", "nearest"):
        assert all(row.note for row in result.select(name))
    compared = {(line.group, line.control) for line in result.summaries if line.pairs}
    assert compared == {("Bi-LoRA", "LoRA"), ("base model", "LoRA")}

    # A text file of prompts has no ground truth.
    prompts = read_scores(result).settings.prompts
    assert [prompt.reference for prompt in prompts] == [None] * 6

    assert result.figures == ["grid.png"]
    for name in (table.FILE, table.ROWS, table.SUMMARY, table.REPORT, "grid.png"):
        assert str(tmp_path).encode() not in (output / name).read_bytes()

    # The same command writes the same rows. Renamed subjects reuse the images.
    images = write_times(output)
    first_rows = (output / table.ROWS).read_bytes()
    assert len(images) == 18
    score(command)
    assert (output / table.ROWS).read_bytes() == first_rows
    copy = shutil.copyfile(demo_runs / "demo" / "lora" / LORA, tmp_path / "copy.safetensors")
    renamed = f"demo/bilora LoRA=demo/lora base copy={copy} --control LoRA --train_data mini"
    repeated = score(f"{renamed} {command}")
    assert capsys.readouterr().out.count("0 of 18 images will be generated") == 2
    assert write_times(output) == images
    values = values_of(repeated)
    copy_values = {key: value for key, value in values.items() if key[0] == "copy"}
    assert values == pytest.approx(values_of(result) | copy_values, abs=1e-6)
    summaries = [line for line in repeated.summaries if line.group == "copy"]
    assert {line.metric for line in summaries} == {*clip_scores.METRICS} - {"truth", "dino_truth"}
    for line in summaries:
        assert (line.difference, line.higher, line.equal, line.lower) == (0, 0, 3, 0)


@pytest.mark.slow
def test_every_checkpoint_is_scored_and_its_images_are_generated_once(
    tiny_models, tmp_path, capsys
):
    steps = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_loss_steps": 1}
    run = train_once("dog", learning_rate=3e-2, validation_dataset="mini", **steps)
    command = command_line(tmp_path / "scores", f"{run} {tiny_models}")
    result = score(f"{command} --max_prompts 2 --steps all")
    stdout = capsys.readouterr().out
    assert "10 of 10 images will be generated" in stdout  # including the base model's
    assert [subject.label for subject in result.subjects] == result.groups == ["step 1", "step 2"]
    assert result.subjects[1].digest == find(str(run)).digest  # the end of the run
    recorded = {row["step"]: row.get("heldout_loss") for row in read_metrics(run)}
    losses = {row.subject: row.value for row in result.select("heldout_loss")}
    assert losses == {"step 1": recorded[1], "step 2": recorded[2]}
    compared = {(line.group, line.control) for line in result.summaries if line.pairs}
    assert compared == {("step 1", "step 2")}
    assert result.figures == ["grid.png", "steps.png"]
    assert len(result.settings["best_steps"]) == len({line.metric for line in result.summaries})
    assert read_scores(result).labels == ["step 1", "step 2"]  # as the viewer reads it
    # One sentence names the best step: the last line of the output, the first of the report.
    (answer,) = read_scores(result).settings.answers
    assert (answer.last, answer.candidate) == (2, 1)
    assert stdout.splitlines()[-1] == answer.sentence
    report = (tmp_path / "scores" / table.REPORT).read_text()
    assert report.splitlines()[0] == f"**{answer.sentence}**"
    assert "| step 2 (last) | 1 |" in report
    assert "| training seeds |" in report
    assert "Table 4" not in report  # it has other prompts


@pytest.mark.slow
def test_the_embedded_scorer_ranks_a_broken_adapter_lower(demo_runs, tmp_path):
    def break_weights(tensors, _):
        for value in tensors.values():
            value.normal_()

    torch.manual_seed(0)
    lora = demo_runs / "demo" / "lora"
    broken = rewrite(lora / LORA, tmp_path / "broken.safetensors", break_weights)
    result = score(
        f"LoRA={lora} broken={broken} --max_prompts 8 --num_inference_steps 8 --seeds 0"
        f" --general_prompts none --train_data none --output_dir {tmp_path / 'out'}"
    )
    assert result.settings["scorer"]["kind"] == "embedded"
    assert result.settings["captioner"]["kind"] == "retrieval"
    assert result.settings["prompts"][0]["reference"] == "truth/000.png"
    assert len(result.select("truth")) == 2 * 8
    line = result.summary("broken", "i2t")
    assert line.higher < line.lower


def content_of(folder):
    """Return a result without its provenance, which names the folder and the commit."""
    head = json.loads((folder / table.FILE).read_text())
    del head["provenance"]
    return head, (folder / table.ROWS).read_text(), (folder / table.SUMMARY).read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_repeats_no_image_and_two_processes_give_the_same_scores(
    demo_runs, tiny_models, tmp_path, capsys
):
    demo = demo_runs / "demo"
    flags = f"{demo / 'lora'} {demo / 'bilora'} {tiny_models} --batch_size 2"
    output = tmp_path / "killed"
    command = command_line(output, flags, steps=3)
    process = started("-m", "eval.clip_scores", *command.split())
    while not write_times(output) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = write_times(output)
    assert 0 < len(before) < 15
    assert not (output / table.FILE).exists()

    continued = score(command)
    assert f"{15 - len(before)} of 15 images will be generated" in capsys.readouterr().out
    after = write_times(output)
    assert len(after) == 15
    assert before.items() <= after.items()

    # Without the kill, and with two processes that the command starts.
    uninterrupted = tmp_path / "uninterrupted"
    score(command_line(uninterrupted, f"{flags} --processes 2", steps=3))
    assert len(write_times(uninterrupted)) == 15
    assert content_of(uninterrupted) == content_of(output)

    two = tmp_path / "two"
    words = ["-m", "eval.clip_scores", *command_line(two, flags, steps=3).split()]
    launched = run_python(words, processes=2, environment=ON_CPUS)
    assert launched.stdout.count("written: ") == 1
    assert len(write_times(two)) == 15
    assert values_of(table.read(two)) == pytest.approx(values_of(continued), abs=1e-6)
