"""Validation images: the settings in prompts, the images, and the index."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.image import config
from bilora_diffusion.image.base_model import BaseModel
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.image.script import train as main
from bilora_diffusion.image.validation import INDEX, ValidationImage, ValidationSample, read_index
from bilora_diffusion.run.runlog import read_run
from tests.image.image_folders import difference
from tests.scripts.runs import flags, words

DATA = ["--dataset", "mini"]
KOHYA = "a photo of TOK dog --n blurry, dark --w 832 --h 1216 --s 30 --l 4 --d 7 --am 0.5"
DOG = ValidationSample("a photo of TOK dog", "blurry, dark", 7, 0.5, 832, 1216, 4.0, 30)
PLAIN = ValidationSample("a dog", "", 0, 1.0, 64, 64, None, None)


def samples(*prompts, **options):
    return resolve([*DATA, "--validation_prompts", *prompts, *words(options)]).samples


@pytest.mark.parametrize(
    ("text", "sample"),
    [
        (KOHYA, DOG),
        (
            "a dog --W 128 --n not: --5 or -- that",
            replace(PLAIN, width=128, negative_prompt="not: --5 or -- that"),
        ),
        ("a dog -- running --s 4", replace(PLAIN, prompt="a dog -- running", steps=4)),
        ("a dog --n ", PLAIN),
        ("a dog --am -1.5 --negative_prompt b", replace(PLAIN, strength=-1.5, negative_prompt="b")),
        ("a dog --guidance_from 0.5", replace(PLAIN, guidance_from=0.5)),
        ("a dog --guidance_from 0.0", replace(PLAIN, guidance_from="base")),
        ("a dog --guidance_from 1", PLAIN),
    ],
)
def test_a_prompts_settings_are_read_in_kohyas_form(text, sample):
    assert samples(text, num_validation_images=1) == [sample]
    one_prompt = resolve([*DATA, "--validation_prompt", text, "--num_validation_images", "1"])
    assert one_prompt.samples == [sample]


def test_a_recipe_a_file_and_several_flags_give_the_same_samples(tmp_path):
    """A prompt without a seed uses the run's seed, so paired runs stay paired."""
    dog = replace(DOG, height=64)
    dog_text = KOHYA.replace(" --h 1216", "")
    recipe = tmp_path / "run.yaml"
    item = {
        "prompt": "a photo of TOK dog",
        "negative_prompt": "blurry, dark",
        "width": 832,
        "height": None,
        "steps": 30,
        "guidance": 4.0,
        "seed": 7,
        "strength": 0.5,
    }
    recipe.write_text(json.dumps({"dataset": "mini", "validation_prompts": [item, "a lion"]}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"# kohya's comment\n{dog_text}\n\na lion\n")

    expected = [replace(dog, seed=seed) for seed in (7, 8, 9, 10)]
    expected += [replace(PLAIN, prompt="a lion", seed=seed) for seed in (3, 4, 5, 6)]
    by_recipe = resolve(["--config", str(recipe), "--seed", "3"])
    assert by_recipe.samples == expected
    assert samples(str(prompts), seed=3) == expected
    assert samples(dog_text, "--validation_prompts", "a lion", seed=3) == expected
    # Validation prompts change no training sample, so a resumed run may have other ones.
    assert by_recipe.resume_settings() == resolve([*DATA, "--seed", "3"]).resume_settings()


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("a --negativ x", "--negative_prompt"),
        ("a --g 3.5", "--l"),
        ("a --w 833", "832"),
        ("a --n b --l 1", "guidance of 1"),
        ("a --guidance_from base --l 1", "guidance above 1"),
        ("a --guidance_from 0.5 --l 1", "guidance from the adapter at strength 0.5 is refused"),
        ("a --guidance_from 2", '"2": give adapter, base or a number from 0 to 1'),
        ("--n b", "no prompt"),
        ("a --w 64 --width 128", "twice"),
        ({"prompt": "a", "width": ["64"]}, "single value"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused_in_one_sentence_with_the_prompts_number(
    item, part, tmp_path, capsys
):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(json.dumps({"dataset": "mini", "validation_prompts": ["a", item]}))
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert run_cli(lambda: main(argv)) == 2
    sentence = capsys.readouterr().err
    assert "number 2 of --validation_prompts" in sentence
    assert part in sentence
    assert sentence.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["prompts.txt", "/no/such/prompts"])
def test_a_missing_file_of_prompts_is_refused_and_not_used_as_a_prompt(path):
    with pytest.raises(UserError, match=f'"{path}" is not there'):
        samples(path)


@pytest.mark.parametrize(
    "text", ["a page that says prompts.txt", "longer than a file's name, " * 20]
)
def test_a_prompt_that_mentions_a_file_is_not_read_as_a_file(text):
    assert samples(text)[0].prompt == text


def test_settings_without_effect_are_refused():
    with pytest.raises(UserError, match="--method full"):
        samples("a --am 0.5", method="full")
    from_base = r"eval.clip_scores --guidance_from base"
    for source in ("base", "0.5"):
        with pytest.raises(UserError, match=from_base):
            samples(f"a --guidance_from {source}", init_lora_weights="pissa")
        with pytest.raises(UserError, match=from_base):
            samples("a", validation_guidance_from=source, init_lora_weights="pissa")
        with pytest.raises(UserError, match="--method full is refused"):
            samples("a", validation_guidance_from=source, method="full")
    assert samples("a", validation_guidance_from="1", init_lora_weights="pissa")


@pytest.mark.parametrize(
    ("flags", "source"),
    [
        ("", "adapter"),  # no step is chosen
        ("--keep_best", 0.5),
        ("--keep_best --choose_by loss", "adapter"),
        ("--keep_best --choice_guidance_from 1", "adapter"),
        ("--keep_best --validation_guidance_from base", "base"),
        ("--keep_best --validation_guidance_from base --choice_guidance_from 0.25", 0.25),
        ("--keep_best --validation_guidance_scale 1", "adapter"),
        ("--keep_best --guided_target 2", "adapter"),
        ("--keep_best --method full", "adapter"),
        ("--keep_best --init_lora_weights lora-ga", "adapter"),
    ],
)
def test_samples_that_choose_a_step_are_guided_from_half_the_adapter_by_default(flags, source):
    cfg = resolve([*DATA, *flags.split()])
    assert cfg.choice_guidance_from == source
    is_given = "--validation_guidance_from" in flags
    assert cfg.samples[0].guidance_from == ("base" if is_given else "adapter")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--keep_best --choice_guidance_from 0.5 --method full", "--method full is refused"),
        ("--keep_best --choice_guidance_from 0.5 --init_lora_weights pissa", "guidance_from base"),
        ("--keep_best --choice_guidance_from base --guided_target 2", "a guidance above 1"),
    ],
)
def test_choice_guidance_from_is_refused_where_it_has_no_effect(flags, words):
    with pytest.raises(UserError, match=words):
        resolve([*DATA, *flags.split()])


@pytest.mark.parametrize("pipeline", ["FluxPipeline", "Lumina2Pipeline"])
def test_settings_that_a_model_ignores_are_refused(pipeline, monkeypatch):
    model = BaseModel("some/model", {"_class_name": pipeline}, {"transformer": {}, "vae": {}})
    monkeypatch.setattr(config, "read_base_model", lambda *_: model)
    assert samples("a --l 9", resolution=64)
    assert resolve([*DATA, "--keep_best", "--resolution=64"]).choice_guidance_from == (
        "adapter" if pipeline == "FluxPipeline" else 0.5
    )
    if pipeline == "FluxPipeline":
        with pytest.raises(UserError, match=r"makes no unconditional prediction .*: drop it"):
            samples("a", validation_guidance_from="0.5", resolution=64)
    with pytest.raises(UserError, match=r"number 1 .* negative prompt.* reads none"):
        samples("a --l 9 --n b", resolution=64)


def test_a_distilled_model_reads_no_negative_prompt(monkeypatch):
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
    model = BaseModel("some/model", index, {"transformer": {}, "vae": {}})
    monkeypatch.setattr(config, "read_base_model", lambda *_: model)
    with pytest.raises(UserError, match=r"negative prompt.* reads none"):
        samples("a --l 9 --n b", resolution=64)


def test_buckets_do_not_hide_a_size_of_validation_images_that_the_model_refuses():
    flags = "--pretrained_model_name_or_path mini-flow --aspect_ratio_buckets 64,64 --resolution 72"
    with pytest.raises(UserError, match="72 pixels"):
        resolve([*DATA, *flags.split(), "--validation_prompt", "a TOK icon"])


@pytest.mark.slow
def test_images_and_index_match_the_samples(tmp_path):
    """Each image equals the pipeline's with the same settings and the prompt's or run's seed."""
    sun = "a TOK icon of a sun --s 2 --guidance_from base"
    tree = "a TOK icon of a tree --s 2 --guidance_from 0.5"
    frog = "a TOK icon of a frog --n a lion --w 96 --h 48 --s 3 --l 3 --d 5 --am 0.5"
    options = {"num_validation_images": 1, "seed": 11, "report_to": "tensorboard", "rank": 2}
    options["learning_rate"] = 3e-2  # high, so that two steps change images visibly
    AcceleratorState._reset_state()  # it was set by other tests in this process
    main([*flags(tmp_path, **options), "--validation_prompts", frog, sun, tree])
    expected = [
        ValidationSample("a TOK icon of a frog", "a lion", 5, 0.5, 96, 48, 3.0, 3),
        ValidationSample("a TOK icon of a sun", "", 11, 1.0, 64, 64, None, 2, "base"),
        ValidationSample("a TOK icon of a tree", "", 11, 1.0, 64, 64, None, 2, 0.5),
    ]
    folder = tmp_path / "validation" / "step-2"
    entries = json.loads((folder / INDEX).read_text())["images"]
    files = [entry.pop("file") for entry in entries]
    assert files == sorted(path.name for path in folder.glob("*.png"))
    assert entries == [sample.to_dict() for sample in expected]
    config = read_run(tmp_path)["config"]
    assert config["validation_prompts"] == [sample.prompt for sample in expected]

    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    # Load the exported file into diffusers' own pipeline.
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    for file, sample in zip(files, expected, strict=True):
        image = Image.open(folder / file)
        assert json.loads(str(image.info["settings"])) == sample.to_dict()
        pipeline.set_adapters(pipeline.get_active_adapters(), [sample.strength])
        (reference,) = pipeline(
            sample.prompt,
            negative_prompt=sample.negative_prompt or None,
            width=sample.width,
            height=sample.height,
            num_inference_steps=sample.steps,
            guidance_scale=sample.guidance or 5.0,
            generator=torch.Generator().manual_seed(sample.seed),
        ).images
        if sample.guidance_from != "adapter":
            # diffusers' pipeline has no such guidance, so the reference is from `generate`.
            assert difference([reference], [image]) > 4
            settings: dict[str, Any] = {"steps": 2, "guidance_from": sample.guidance_from}
            prompt, seed = [sample.prompt], [sample.seed]
            (reference,) = generate(pipeline, prompt, seed, size=64, **settings)
        assert difference([reference], [image]) <= 1


OLD_RUN = {"validation_prompts": ["a", "b"], "num_validation_images": 2}


def test_a_missing_index_is_derived_from_the_runs_options(tmp_path):
    entries = [("000.png", "a"), ("001.png", "a"), ("002.png", "b"), ("003.png", "b")]
    assert read_index(tmp_path / INDEX, OLD_RUN) == [ValidationImage(*entry) for entry in entries]
    assert read_index(tmp_path / INDEX, {}) == []


@pytest.mark.parametrize(
    "content",
    [
        '{"images"',
        '{"images": 1}',
        "[]",
        "[" * 100_000,
        "\udcff",
        '{"images": [1]}',
        '{"images": [{"file": "a.png"}]}',
        '{"images": [{"file": 1, "prompt": "a"}]}',
        '{"images": [{"file": "../../x.png", "prompt": "a"}]}',
        '{"images": [{"file": "a.png", "prompt": "a", "guidance": NaN}]}',
        '{"images": [{"file": "a.png", "prompt": "a", "guidance_from": "auxiliary"}]}',
        '{"images": [{"file": "a.png", "prompt": "a", "guidance_from": [0.5]}]}',
        r'{"images": [{"file": "a.png", "prompt": "\ud800"}]}',
    ],
)
def test_a_damaged_index_is_refused(content, tmp_path):
    path = tmp_path / INDEX
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=INDEX):
        read_index(path, OLD_RUN)
