"""``benchmarks.gpu_day``: the parts that it plans, its table, and how it continues."""

import json

import pytest
import yaml
from PIL import Image

from benchmarks import gpu_day, gpu_photographs, gpu_result
from benchmarks.gpu_part import Part, failure
from bilora_diffusion.core.errors import TrainingError, UserError
from eval.clip_scores.prompts import read as read_prompts
from eval.sweep import plan as sweep_plan

H100 = "NVIDIA H100 80GB HBM3"


def measured(**changes):
    return {
        "title": "Stable Diffusion XL",
        "part": {
            "model": "sdxl",
            "pixels": 1024,
            "batch": 1,
            "method": "lora",
            "quantize": "none",
            "compile": False,
        },
        "outcome": "measured",
        "seconds": [0.4, 0.5, 0.6],
        "step_seconds": 0.5,
        "operations": 98.9e12,
        "images_per_second": 2.0,
        "peak_bytes": 6_000_000_000,
        "estimated_bytes": 5_800_000_000,
        **changes,
    }


def results(**parts):
    versions = {"torch": "2.13", "diffusers": "0.42"}
    return {"device": {"name": H100, "gpu": H100}, "versions": versions, "parts": parts}


def test_the_plan_starts_with_each_model_s_basic_part_and_then_varies_one_option():
    parts = gpu_day.plan(["sdxl", "flux1"], "cuda")
    assert [part.key for part in parts[:3]] == [
        "sdxl, 1024 px, batch 1, lora",
        "flux1, 1024 px, batch 1, lora",
        "sdxl, 1024 px, batch 1, bilora",
    ]
    assert len({part.key for part in parts}) == len(parts) == 16
    sdxl = [part for part in parts if part.model == "sdxl"]
    assert {part.pixels for part in sdxl} == {1024, 512}
    assert {part.batch for part in sdxl} == {1, 4}
    assert {part.method for part in sdxl} == {"lora", "bilora", "lora-sam"}
    assert {part.quantize for part in sdxl} == {"none", "nf4"}
    assert any(part.compile for part in sdxl)
    assert {part.pixels for part in gpu_day.plan(["mini"], "cuda")} == {64, 32}


def test_the_share_of_the_peak_is_computed_for_known_gpus_only():
    row = measured()
    assert gpu_result.share_of_peak(row, H100) == pytest.approx(0.2)
    assert gpu_result.peak_of("NVIDIA H100 PCIe") == 756e12
    assert gpu_result.peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_result.peak_of("NVIDIA L40S") == 362e12
    assert gpu_result.peak_of("NVIDIA L4") == 121e12
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "T4"):
        assert gpu_result.peak_of(name) is None
    assert gpu_result.share_of_peak(row, None) is None


def test_the_table_has_the_measured_and_the_failed_parts():
    sampling = {"outcome": "measured", "seconds": 4.0, "sampler_steps": 25, "peak_bytes": 9e9}
    table = gpu_result.table(
        results(
            a=measured(sampling=sampling),
            b=measured(outcome="out of memory"),
            c={"title": "photographs", "outcome": "skipped", "text": "skipped: no --real"},
        )
    )
    assert "| 0.5 (0.4 to 0.6) | 2 | 20% | 6 GB | 5.8 GB | 9 GB | 4.0 in 25 steps |" in table
    assert "| out of memory |" in table
    assert "| skipped: no --real |" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_out_of_memory_is_distinguished_from_other_errors():
    error = TrainingError("sampling needs more memory than is left")
    error.__cause__ = MemoryError()
    assert failure(error) == {"outcome": "out of memory"}
    assert failure(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))["outcome"] == (
        "out of memory"
    )
    assert failure(TrainingError("no such thing"))["outcome"] == "failed"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--device cpu --models sdxl,sd9", "sd9"),
        ("--device cpu --minutes 0", "0"),
        ("--device cpu --real sdxl", "--images"),
        ("--device cpu --script no.py", "no.py"),
    ],
)
def test_bad_input_is_refused(words, value, tmp_path):
    with pytest.raises(UserError, match=value):
        gpu_day.main([*words.split(), "--output_dir", str(tmp_path)])


def test_every_fifth_photograph_is_held_out_and_its_caption_is_sampled(tmp_path):
    photographs, folder = tmp_path / "photographs", tmp_path / "split"
    photographs.mkdir()
    for number in range(10):
        place = photographs / f"{number}.png"
        Image.new("RGB", (64, 64), (25 * number, 0, 0)).save(place)
        place.with_suffix(".txt").write_text(f"caption {number}")
    gpu_photographs.split_photographs(photographs, folder)
    assert len(list((folder / "train").glob("*.png"))) == 8
    file = tmp_path / "experiment.yaml"
    experiment = gpu_photographs.experiment_of("mini", folder)
    file.write_text(yaml.safe_dump(experiment))
    [plan] = sweep_plan.load(file)
    assert plan.experiment.scores.steps == (200, 400)
    prompts = read_prompts(plan.experiment.scores.prompts)
    assert [prompt.text for prompt in prompts] == ["caption 4", "caption 9"]
    assert all(prompt.reference for prompt in prompts)

    (photographs / "2.txt").unlink()
    gpu_photographs.split_photographs(photographs, folder)  # an existing split is kept
    for source, sentence in ((photographs, r"2\.png in .* has no caption"), (folder, "at least 5")):
        with pytest.raises(UserError, match=sentence):
            gpu_photographs.split_photographs(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.matrix
@pytest.mark.slow
def test_an_interrupted_day_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    plan = [Part("mini", 64), Part("mini", 32, method="bilora")]
    monkeypatch.setattr(gpu_day, "plan", lambda *_: plan)
    flags = f"--device cpu --models mini --name here --output_dir {tmp_path}".split()
    # A part that is interrupted because time is up has no row.
    monkeypatch.setattr(gpu_day, "FIRST_PART_SECONDS", {"cpu": 0.0})
    gpu_day.main([*flags, "--minutes", "0.01"])
    assert not (tmp_path / "here.json").exists()
    assert "give the same command again" in capsys.readouterr().out

    # Without time for a second part, only the first is measured.
    needed_seconds = gpu_day.Day.needed_seconds
    monkeypatch.setattr(
        gpu_day.Day, "needed_seconds", lambda day, _: 1e9 if day.results["parts"] else 0.0
    )
    gpu_day.main(flags)
    rows = json.loads((tmp_path / "here.json").read_text())["parts"]
    assert list(rows) == [plan[0].key]
    monkeypatch.setattr(gpu_day.Day, "needed_seconds", needed_seconds)
    gpu_day.main(flags)
    complete = json.loads((tmp_path / "here.json").read_text())["parts"]
    assert complete[plan[0].key] == rows[plan[0].key]
    for part in plan:
        row = complete[part.key]
        assert row["outcome"] == row["sampling"]["outcome"] == "measured"
        assert row["operations"] > 1e8
        assert row["estimated_bytes"] == pytest.approx(row["peak_bytes"], rel=0.3)
    assert complete[gpu_day.REAL]["outcome"] == "skipped"
    assert (tmp_path / "here.md").read_text() in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "here.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind", "quantize"),
    [
        pytest.param("flux1", "FluxPipeline", "none", marks=pytest.mark.matrix),
        # In a 4-bit model, the first floating-point weights are the adapters'.
        ("flux2_klein_4b", "Flux2KleinPipeline", "nf4"),
        pytest.param("z_image", "ZImagePipeline", "none", marks=pytest.mark.matrix),
        pytest.param("qwen_image", "QwenImagePipeline", "none", marks=pytest.mark.matrix),
    ],
)
def test_every_flow_model_is_measured(model, kind, quantize, monkeypatch):
    """The models are tiny, but of the same classes."""
    from dataclasses import replace

    import torch

    from benchmarks import gpu_part, random_pipelines
    from tests.image.tiny import FILES

    shape = random_pipelines.SHAPES[model]
    sizes = FILES[kind]
    tiny = replace(shape, changes=sizes["transformer"], vae=sizes["vae"], prompt_tokens=16)
    monkeypatch.setitem(random_pipelines.SHAPES, model, tiny)
    reports = []
    gpu_part.measure(Part(model, 64, quantize=quantize), torch.device("cpu"), reports.append)
    assert reports[-1]["sampling"]["outcome"] == "measured"
    assert reports[-1]["operations"] > 0
