"""Settings of single validation prompts: kohya's form, recipes, what is refused, and the images."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.image import inputs
from bilora_diffusion.image.base_model import BaseModel
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.script import train
from bilora_diffusion.run.runlog import read_run
from tests.scripts.runs import flags

DATA = ["--dataset", "mini"]
KOHYA = "a photo of TOK dog --n blurry, dark --w 832 --h 1216 --s 30 --l 4 --d 7 --am 0.5"
SETTINGS = {
    **{"negative_prompt": "blurry, dark", "width": 832, "height": 1216, "steps": 30},
    **{"guidance": 4.0, "seed": 7, "strength": 0.5},
}


@pytest.mark.parametrize(
    ("given", "prompt", "settings"),
    [
        (KOHYA, "a photo of TOK dog", SETTINGS),
        ("a dog --W 64 --n not: --5 or -- that", "a dog", {"width": 64, "negative_prompt": ...}),
        ("a dog -- running --s 4", "a dog -- running", {"steps": 4}),
        ("a --n ", "a", {"negative_prompt": ""}),
        (
            "a dog --am -1.5 --negative_prompt b",
            "a dog",
            {"strength": -1.5, "negative_prompt": "b"},
        ),
    ],
)
def test_a_prompt_in_kohyas_form(given, prompt, settings):
    cfg = resolve([*DATA, "--validation_prompts", given])
    (found,) = cfg.validation_settings
    assert cfg.validation_prompts == [prompt]
    assert found.keys() == settings.keys()
    assert all(value in (..., found[name]) for name, value in settings.items())


def test_a_recipe_a_file_and_several_flags_give_the_same(tmp_path):
    """Images without a seed of their own have the run's, so that paired runs stay paired."""
    recipe, lines = tmp_path / "run.yaml", tmp_path / "prompts.txt"
    items = [{"prompt": "a photo of TOK dog", **SETTINGS, "height": None}, "a lion"]
    recipe.write_text(json.dumps({"dataset": "mini", "validation_prompts": items}))
    short = KOHYA.replace(" --h 1216", "")
    lines.write_text(f"# kohya's comment\n{short}\n\na lion\n")
    several = ["--validation_prompts", short, "--validation_prompts", "a lion"]
    ways = [["--config", recipe], [*DATA, "--validation_prompts", lines], [*DATA, *several]]
    found = [resolve([*map(str, way), "--seed", "3"]) for way in ways]
    assert found[0] == found[1].__class__(**{**vars(found[1]), "config": str(recipe)})
    assert found[1] == found[2]
    asked = [(s["prompt"], s["seed"], s["width"], s["height"]) for s in found[0].samples]
    first = [("a photo of TOK dog", seed, 832, 64) for seed in (7, 8, 9, 10)]
    assert asked == [*first, *(("a lion", seed, 64, 64) for seed in (3, 4, 5, 6))]
    assert found[0].fingerprint() == resolve([*DATA, "--seed", "3"]).fingerprint()


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ("a --x 3", '"--x"'),
        ("a --negativ x", "--negative_prompt"),
        ("a --g 3.5", "--l"),
        ("a --help", "--help"),
        ("a --w 833", "832"),
        ("a --n b --l 1", "guidance of 1"),
        ("--n b", "no prompt"),
        ("a --w 64 --width 128", "twice"),
        ({"negative_prompt": "b"}, "no prompt"),
        ({"prompt": "a", "width": ["64"]}, "single value"),
    ],
    ids=str,
)
def test_bad_settings_are_a_sentence_with_their_place(item, named, tmp_path, capsys):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(json.dumps({"dataset": "mini", "validation_prompts": ["a", item]}))
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert run_cli(lambda: train(argv)) == 2
    sentence = capsys.readouterr().err
    assert "number 2 of --validation_prompts" in sentence
    assert named in sentence
    assert sentence.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_of_prompts_that_is_not_there_is_no_prompt():
    for path in ("prompts.txt", "/no/such/prompts"):
        with pytest.raises(UserError, match=f'"{path}" is not there'):
            resolve([*DATA, "--validation_prompts", path])
    for text in ("a page that says prompts.txt", "longer than a file's name, " * 20):
        assert resolve([*DATA, "--validation_prompts", text]).validation_prompts == [text]


def test_what_a_strength_does_not_go_with():
    with pytest.raises(UserError, match="--method full"):
        resolve([*DATA, "--validation_prompts", "a --am 0.5", "--method", "full"])


@pytest.mark.parametrize("pipeline", ["FluxPipeline", "Lumina2Pipeline"])
def test_a_negative_prompt_where_none_is_read(pipeline, monkeypatch):
    model = BaseModel("some/model", {"_class_name": pipeline}, {"transformer": {}, "vae": {}})
    monkeypatch.setattr(inputs, "describe", lambda *_: model)
    assert resolve([*DATA, "--resolution", "64", "--validation_prompts", "a --l 9"])
    with pytest.raises(UserError, match=r"number 1 .* negative prompt.* reads none"):
        resolve([*DATA, "--resolution", "64", "--validation_prompts", "a --l 9 --n b"])


def test_images_equal_the_pipelines_with_the_same_settings(tmp_path):
    """Two prompts of different settings, one seed given and one the run's; sizes, file, record."""
    own = "a TOK icon of a frog --n a lion --w 96 --h 48 --s 3 --l 3 --d 5 --am 0.5"
    prompts = ["--validation_prompts", own, "a TOK icon of a sun --s 2"]
    given = {"num_validation_images": 1, "seed": 11, "report_to": "tensorboard", "rank": 2}
    AcceleratorState._reset_state()  # of other tests in this process
    train([*flags(tmp_path, **given), *prompts])
    files = sorted(tmp_path.glob("validation/step-2/*.png"))
    images = [Image.open(file) for file in files]
    assert [image.size for image in images] == [(96, 48), (64, 64)]
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        {"negative_prompt": "a lion", "guidance_scale": 3.0, "num_inference_steps": 3},
        {"num_inference_steps": 2, "guidance_scale": 5.0},
    ]
    sizes = [{"width": 96, "height": 48}, {"width": 64, "height": 64}]
    texts = ["a TOK icon of a frog", "a TOK icon of a sun"]
    for text, size, how, seed, strength, image in zip(
        texts, sizes, drawn, (5, 11), (0.5, 1.0), images, strict=True
    ):
        pipeline.set_adapters(pipeline.get_active_adapters(), [strength])
        random = torch.Generator().manual_seed(seed)
        expected = pipeline(text, generator=random, **size, **how).images[0]
        apart = np.abs(np.asarray(expected).astype(int) - np.asarray(image).astype(int))
        assert apart.max() <= 1
    told: Any = json.loads(images[0].info["settings"])
    assert told == {
        **{"prompt": texts[0], "negative_prompt": "a lion", "seed": 5, "width": 96, "height": 48},
        **{"guidance": 3.0, "steps": 3, "strength": 0.5},
    }
    config = read_run(tmp_path)["config"]
    assert config["validation_prompts"] == texts  # as the viewer reads them
    assert config["validation_settings"][1] == {"steps": 2}
