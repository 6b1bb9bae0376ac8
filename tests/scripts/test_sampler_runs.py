"""Runs that sample images with a LoRA file, a scheduler or a model that training does not use."""

import json
import shutil

import pytest
import torch
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import hash_of_file
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.export.reader import read
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.image.validation import INDEX
from bilora_diffusion.run import runlog
from eval.clip_scores import ClipScores, settings
from eval.load import applied
from eval.sampler import sampler_of_runs
from eval.subjects import single
from tests.export.export_models import rewrite, write_lora
from tests.image.image_folders import difference as pixel_difference
from tests.scripts.runs import assert_same_run, resumed, resumes_exactly, train, two_icons

TRAILING = "EulerDiscreteScheduler:timestep_spacing=trailing"
FEW_STEPS = {
    "validation_prompt": "a TOK icon of a fox --am 0.5",
    "num_validation_images": 1,
    "validation_num_inference_steps": 4,
    "validation_guidance_scale": 1,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "train_batch_size": 1,
    "learning_rate": 3e-2,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pipeline = load_pipeline("mini", dtype=torch.float32)
    return write_lora(tmp_path_factory.mktemp("lightning"), pipeline, size=0.5)


def sampler_of(file):
    return {"sampling_lora": f"{file}:0.7", "sampling_scheduler": TRAILING}


@pytest.fixture(scope="module")
def run(tmp_path_factory, file):
    """Train a run whose images are sampled with a LoRA file and a scheduler."""
    return train(tmp_path_factory.mktemp("runs") / "run", **FEW_STEPS, **sampler_of(file))


def test_a_sampling_lora_changes_the_images_and_is_recorded(run, file):
    facts = {"sampling_lora_sha256": hash_of_file(file), "sampling_lora_strength": 0.7}
    assert facts.items() <= runlog.read_run(run)["config"].items()
    picture = run / "validation" / "step-4" / "000.png"
    (entry,) = json.loads(picture.with_name(INDEX).read_text())["images"]
    facts |= {"sampling_scheduler": TRAILING, "sampling_lora": file.name}
    assert facts.items() <= entry.items()
    with Image.open(picture) as image:
        assert facts.items() <= json.loads(str(image.info["settings"])).items()
        pipeline = load_pipeline("mini", dtype=torch.float32)
        pipeline.load_lora_weights(str(run), weight_name=FILE_NAME, adapter_name="trained")
        pipeline.load_lora_weights(str(file), adapter_name="sampling")
        pipeline.set_adapters(["trained", "sampling"], [0.5, 0.7])
        options = {"size": 64, "steps": 4, "guidance_scale": 1.0}
        prompts = ["a TOK icon of a fox"]
        expected = generate(pipeline, prompts, [0], scheduler=TRAILING, **options)
        assert pixel_difference([image], expected) <= 1
        assert pixel_difference([image], generate(pipeline, prompts, [0], **options)) > 1
    card = (run / "README.md").read_text()
    for words in (
        f'load_lora_weights({file.name!r}, adapter_name="sampling")',
        'set_adapters(["trained", "sampling"], [1.0, 0.7])',
        "= EulerDiscreteScheduler.from_config(",
        "timestep_spacing='trailing'",
        "num_inference_steps=4, guidance_scale=1)",
    ):
        assert words in card


def test_scores_use_a_sampler_that_all_runs_share(run, file, tmp_path):
    def sampling(*words):
        names = [word for word in words if not str(word).startswith("--")]
        flags = [word.split("=") for word in words if str(word).startswith("--")]
        argv = [part for flag in flags for part in flag]
        subjects = single([str(name) for name in names])
        args = ClipScores.parser().read(["--prompts", "3d_icon", *argv])
        return settings.sampling(args, "mini", subjects)

    run_sampling = sampling(run, "base")
    assert run_sampling.lora is not None
    assert (
        run_sampling.lora.strength,
        run_sampling.scheduler,
        run_sampling.steps,
        run_sampling.guidance_scale,
    ) == (
        0.7,
        TRAILING,
        4,
        1.0,
    )
    assert {"scheduler", "sampling_lora_sha256"} <= run_sampling.to_dict().keys()
    # Adapters with different samplers are compared with the model's default sampler.
    for usual in (sampling(run, file), sampling(run, "--sampling_lora=none")):
        assert (usual.lora, usual.scheduler, usual.steps) == (None, None, 25)
        assert not {"scheduler", "sampling_lora_sha256"} & usual.to_dict().keys()
    flag_sampling = sampling(file, f"--sampling_lora={file}:0.5", "--num_inference_steps=8")
    assert flag_sampling.lora is not None
    assert (flag_sampling.lora.strength, flag_sampling.steps) == (0.5, 8)
    with pytest.raises(UserError, match="use one of LCMScheduler"):
        sampling(run, "--sampling_scheduler=Euler")

    # The base model is sampled with the file too, and is unchanged afterwards.
    pipeline = load_pipeline("mini", dtype=torch.float32)
    options = {"size": 64, "steps": 2, "guidance_scale": 1.0}
    before = generate(pipeline, ["a"], [1], **options)
    (base,) = single(["base"])
    with applied(pipeline, base, 1.0, run_sampling.lora):
        assert pixel_difference(generate(pipeline, ["a"], [1], **options), before) > 0
    assert pixel_difference(generate(pipeline, ["a"], [1], **options), before) == 0

    config = runlog.read_run(run)["config"]
    moved = tmp_path / "moved.safetensors"
    with pytest.raises(UserError, match="is not a file"):
        sampler_of_runs([{**config, "sampling_lora": str(moved)}])
    rewrite(file, moved, lambda tensors, _: next(iter(tensors.values())).mul_(2))
    with pytest.raises(UserError, match="is not the file that"):
        sampler_of_runs([{**config, "sampling_lora": str(moved)}])


@pytest.mark.slow
def test_the_sampler_may_change_on_resume_unless_it_chooses_the_step(run, file, tmp_path):
    sampler = sampler_of(file)
    resumes_exactly(run, 2, **FEW_STEPS, **sampler)
    shutil.rmtree(run.with_name("run-parts"))
    assert_same_run(run, resumed(run, 2, **FEW_STEPS))
    shutil.rmtree(run.with_name("run-parts"))
    chosen = {
        **FEW_STEPS,
        **two_icons(tmp_path / "icons"),
        "keep_best": True,
        "validation_loss_steps": 2,
    }
    best = train(tmp_path / "best", **chosen, **sampler)
    moved = shutil.copy(file, tmp_path / "moved.safetensors")
    resumes_exactly(best, 2, **chosen, **{**sampler, "sampling_lora": f"{moved}:0.7"})
    shutil.rmtree(best.with_name("best-parts"))
    for changes, words in (
        ({"sampling_lora": file}, "sampling_lora_strength was 0.7 and is 1.0"),
        ({"sampling_scheduler": "LCMScheduler"}, "sampling_scheduler was"),
        ({"sampling_lora": None}, "sampling_lora_sha256"),
    ):
        with pytest.raises(UserError, match=words):
            resumed(best, 2, **chosen, **{**sampler, **changes})
        shutil.rmtree(best.with_name("best-parts"))


@pytest.mark.slow
def test_sampling_options_do_not_change_the_training(run, tmp_path):
    """If --validation_model is the base model, the images are those of a run without the option."""
    plain = train(tmp_path / "plain", **FEW_STEPS)
    assert_same_run(plain, run, "grad_norm", "auxiliary_norm")
    layers = [layer.name for layer in read(run / FILE_NAME).parts["unet"].layers]
    assert layers == [layer.name for layer in read(plain / FILE_NAME).parts["unet"].layers]
    pipeline = load_pipeline("mini", dtype=torch.float32)
    del pipeline.origin
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.mul_(1.02)
    pipeline.save_pretrained(tmp_path / "turbo")
    same_run = train(tmp_path / "same", **FEW_STEPS, validation_model="mini")
    other_run = train(tmp_path / "other", **FEW_STEPS, validation_model=tmp_path / "turbo")
    for run in (same_run, other_run):
        assert_same_run(plain, run, "grad_norm", "auxiliary_norm")
    pictures = [
        Image.open(run / "validation" / "step-4" / "000.png")
        for run in (plain, same_run, other_run)
    ]
    assert pixel_difference(pictures[:1], pictures[1:2]) == 0
    assert pixel_difference(pictures[:1], pictures[2:]) > 0
    assert "`turbo`" in (tmp_path / "other" / "README.md").read_text()
    resumes_exactly(other_run, 2, **FEW_STEPS, validation_model=tmp_path / "turbo")


def test_a_sampling_lora_is_refused_for_full_fine_tuning_or_if_its_file_is_missing(tmp_path):
    with pytest.raises(UserError, match="--sampling_lora"):
        train(tmp_path / "full", **FEW_STEPS, method="full", sampling_lora=tmp_path)
    with pytest.raises(UserError, match="is a folder without"):
        train(tmp_path / "none", **FEW_STEPS, sampling_lora=tmp_path)
