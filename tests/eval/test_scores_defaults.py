"""Default prompts and sampling settings of ``eval.clip_scores``."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bilora_diffusion.core.errors import UserError
from eval.clip_scores import ClipScores, settings
from eval.clip_scores.defaults import in_contexts, learned_icons, of_subjects
from eval.clip_scores.prompts import CONTEXTS, Prompt, shipped_names
from eval.subjects import Subject

FILE = Subject("dog", "dog", "file")
BASE = Subject("base", "base model", "base", "base")
VALIDATION: dict[str, Any] = {
    "validation_prompts": ["TOK dog asleep", "TOK dog asleep", "TOK dog in a tree"],
}


def run(name: str = "dog", **config: Any):
    return Subject(name, name, folder=Path("runs", name), record={"config": config})


def texts(question):
    return [prompt.text for prompt in question.prompts]


def captioned(folder, captions):
    """Write a folder of images, each with its caption in a text file; return its path."""
    folder.mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption)
    return str(folder)


@pytest.mark.parametrize(
    ("dataset", "name", "count", "colors"),
    [
        ("mini", "3d_icon", 200, None),
        ("linoyts/3d_icon", "3d_icon", 200, None),
        ("mini-duotone", "mini-duotone-heldout", 64, "duotone"),  # plain icons are no ground truth
        ("mini-animals", "mini-animals-heldout", 64, None),
    ],
)
def test_runs_on_shipped_icons_get_prompts_for_icons(dataset, name, count, colors):
    question = of_subjects([run(dataset_name=dataset, **VALIDATION)], "mini")
    assert (question.name, len(question.prompts)) == (name, count)
    assert question.is_of_icons
    assert {prompt.colors for prompt in question.prompts} == {colors}
    assert question.prompts[0].reference.is_file()


def test_held_out_captions_are_the_first_choice_with_their_pictures_and_trigger_word(tmp_path):
    captions = [f"a dog, number {number}" for number in range(70)]
    held_out = captioned(tmp_path / "held_out", ["a dog, number 0", *captions])
    dog = run(dataset_name="photos", validation_dataset=held_out, trigger_word="TOK", **VALIDATION)
    question = of_subjects([dog], "some/model")
    assert len(question.prompts) == 64
    assert "the first 64 of 70 held-out captions of dog" in question.name
    assert not question.is_of_icons
    assert not learned_icons([dog], "mini")
    # The first of two pictures with the same caption is the ground truth.
    first, second = question.prompts[:2]
    assert (first.text, first.reference.name) == ("TOK, a dog, number 0", "000.png")
    assert (second.text, second.reference.name) == ("TOK, a dog, number 1", "002.png")


def test_held_out_images_without_a_caption_are_counted_and_not_used(tmp_path):
    held_out = captioned(tmp_path / "mixed", ["a dog asleep", "a dog in a tree", " ", ""])
    dog = run(validation_dataset=held_out, instance_prompt="a photo of TOK dog")
    question = of_subjects([dog], "some/model")
    assert texts(question) == ["a dog asleep", "a dog in a tree"]
    assert "dog has 2 held-out images that have no caption" in question.note


def test_a_run_without_held_out_captions_gets_its_validation_prompts(tmp_path):
    one_caption = captioned(tmp_path / "alike", ["a dog", "a dog"])  # a single caption is not used
    dog = run(instance_data_dir="photos", validation_dataset=one_caption, **VALIDATION)
    question = of_subjects([dog, FILE], "mini")
    assert texts(question) == ["TOK dog asleep", "TOK dog in a tree"]
    assert "held-out images of dog have no captions of their own" in question.note


def test_an_instance_prompt_is_put_into_contexts_and_validation_prompts_are_not_used():
    style = run(instance_prompt="a TOK icon, in the style of TOK", **VALIDATION)
    question = of_subjects([style], "mini")
    assert len(question.prompts) == len(set(texts(question))) == 20
    for text in texts(question):
        assert text.startswith("a TOK icon ")
    assert CONTEXTS not in shipped_names()  # the contexts alone are not a prompt set
    in_snow = Prompt("a TOK icon in fresh snow, in the style of TOK", "in fresh snow")
    assert question.prompts[1] == in_snow
    assert texts(in_contexts([run(trigger_word="TOK", **VALIDATION)]))[1] == "TOK in fresh snow"
    with pytest.raises(UserError, match="dog was trained with neither"):
        in_contexts([run()])


def test_each_concepts_instance_prompt_is_put_into_contexts():
    concepts = [{"concept": name, "instance_prompt": f"TOK {name}"} for name in "abcd"]
    prompts = texts(of_subjects([run(concepts=concepts)], "mini"))
    assert len(prompts) == 64
    assert {text[:5] for text in prompts} == {"TOK a", "TOK b", "TOK c", "TOK d"}


def test_captions_of_training_images_are_the_last_resort(tmp_path):
    photos = captioned(tmp_path / "photos", [f"TOK dog {number}" for number in range(30)])
    question = of_subjects([run(instance_data_dir=photos)], "mini")
    assert len(question.prompts) == 20
    assert question.prompts[0] == Prompt("TOK dog 0")  # not its picture, which was learned
    bare = run(instance_data_dir=captioned(tmp_path / "bare", [" "]))
    with pytest.raises(UserError, match=r"dog has no .*: give --prompts"):
        of_subjects([bare], "mini")


def test_runs_that_would_get_other_prompts_are_named_and_files_need_prompts():
    dog, cat = run(**VALIDATION), run("cat", validation_prompts=["TOK cat"])
    assert of_subjects([dog, run("dog-2", **VALIDATION)], "mini").note == ""
    question = of_subjects([dog, cat, cat], "mini")
    assert "from dog; scored alone, cat would" in question.note
    without_prompts = run("owl", instance_data_dir=None)  # needed only for the note
    assert "scored alone, owl would" in of_subjects([dog, without_prompts], "mini").note
    assert of_subjects([FILE], "mini").name == "3d_icon"
    with pytest.raises(UserError, match="give --prompts"):
        of_subjects([FILE], "some/model")


@pytest.mark.parametrize(
    ("flags", "source"),
    [
        ("", 0.5),
        ("--guidance_from adapter", "adapter"),
        ("--guidance_from base", "base"),
        ("--guidance_scale 1", "adapter"),  # there is only one prediction
        ("--base_precision int8", "adapter"),  # the adapter is merged
        ("--weight_noise 0.1", "adapter"),
    ],
)
def test_adapters_have_half_strength_in_the_unconditional_prediction_by_default(flags, source):
    args = ClipScores.parser().read(["--prompts", "3d_icon", *flags.split()])
    sampling = settings.sampling(args, "mini", [FILE, BASE])
    assert sampling.guidance_from == source
    assert bool(settings.strength_note(args, sampling)) == (source == 0.5)


def test_all_subjects_get_the_guidance_of_a_whole_model_among_them(tmp_path):
    args = ClipScores.parser().read(["--prompts", "3d_icon"])
    full_model = Subject("full", "Full FT", weights=tmp_path)
    assert settings.sampling(args, "mini", [FILE, full_model]).guidance_from == "adapter"
