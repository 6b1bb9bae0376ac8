"""What ``eval.clip_scores`` asks without ``--prompts``: what the runs were trained on."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bilora_diffusion.core.errors import UserError
from eval.clip_scores.defaults import in_contexts, learned_icons, of_subjects
from eval.clip_scores.prompts import CONTEXTS, FOLDER, Prompt, numbered_lines, shipped
from eval.subjects import Subject

FILE = Subject("dog", "dog", "file")
VALIDATION: dict[str, Any] = {
    "validation_prompts": ["TOK dog asleep", "TOK dog asleep", "TOK dog in a tree"]
}


def run(name: str = "dog", **config: Any):
    return Subject(name, name, folder=Path("runs", name), record={"config": config})


def captioned(folder, captions):
    """A folder of images, each with its caption in a text file."""
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
        ("mini-duotone", "mini-duotone-heldout", 64, "duotone"),  # plain icons are no truth there
        ("mini-animals", "mini-animals-heldout", 64, None),
    ],
)
def test_runs_on_shipped_icons_are_asked_for_icons(dataset, name, count, colors):
    question = of_subjects([run(dataset_name=dataset, **VALIDATION)], "mini")
    assert (question.name, len(question.prompts)) == (name, count)
    assert question.is_of_icons
    assert {prompt.colors for prompt in question.prompts} == {colors}
    assert question.prompts[0].reference.is_file()


def test_held_out_captions_come_first_with_their_pictures_and_the_trigger_word(tmp_path):
    captions = [f"a dog, number {number}" for number in range(70)]
    held_out = captioned(tmp_path / "held_out", ["a dog, number 0", *captions])
    dog = run(dataset_name="photos", validation_dataset=held_out, trigger_word="TOK", **VALIDATION)
    question = of_subjects([dog], "some/model")
    assert len(question.prompts) == 64
    assert "the first 64 of 70 held-out captions of dog" in question.name
    assert not question.is_of_icons
    assert not learned_icons([dog], "mini")
    # Of two pictures with one caption the first is its truth.
    assert [(prompt.text, prompt.reference.name) for prompt in question.prompts[:2]] == [
        ("TOK, a dog, number 0", "000.png"),
        ("TOK, a dog, number 1", "002.png"),
    ]


def test_without_them_the_run_is_asked_its_validation_prompts_then_its_prompt_in_contexts(tmp_path):
    one_caption = captioned(tmp_path / "alike", ["a dog", "a dog"])
    options: dict[str, Any] = {"instance_data_dir": "photos", "validation_dataset": one_caption}
    dog = run(**options, **VALIDATION)
    assert [prompt.text for prompt in of_subjects([dog, FILE], "mini").prompts] == [
        *("TOK dog asleep", "TOK dog in a tree")
    ]
    style = run(**options, instance_prompt="a TOK icon, in the style of TOK")
    contexts = of_subjects([style], "mini")
    assert len(contexts.prompts) == len({prompt.text for prompt in contexts.prompts}) == 20
    assert contexts.prompts[1] == Prompt(
        "a TOK icon in fresh snow, in the style of TOK", "in fresh snow"
    )
    assert in_contexts([run(**options, trigger_word="TOK", **VALIDATION)]).prompts[1].text == (
        "TOK in fresh snow"
    )
    concepts = [{"concept": name, "instance_prompt": f"TOK {name}"} for name in "abcd"]
    texts = [prompt.text for prompt in of_subjects([run(concepts=concepts)], "mini").prompts]
    assert len(texts) == 64
    assert {text[:5] for text in texts} == {"TOK a", "TOK b", "TOK c", "TOK d"}
    with pytest.raises(UserError, match="dog was trained with neither"):
        in_contexts([run(**options)])


def test_captions_of_training_images_are_the_last_resort(tmp_path):
    photos = captioned(tmp_path / "photos", [f"TOK dog {number}" for number in range(30)])
    question = of_subjects([run(instance_data_dir=photos)], "mini")
    assert len(question.prompts) == 20
    assert question.prompts[0] == Prompt("TOK dog 0")  # its picture was learned: no ground truth
    bare = run(instance_data_dir=captioned(tmp_path / "bare", [" "]))
    with pytest.raises(UserError, match=r"dog has neither .*: give --prompts"):
        of_subjects([bare], "mini")


def test_runs_on_other_images_are_named_and_files_say_nothing():
    dog, cat = run(**VALIDATION), run("cat", validation_prompts=["TOK cat"])
    assert of_subjects([dog, run("dog-2", **VALIDATION)], "mini").note == ""
    question = of_subjects([dog, cat, cat], "mini")
    assert "those of dog; scored alone, cat would" in question.note
    assert of_subjects([FILE], "mini").name == "3d_icon"
    with pytest.raises(UserError, match="give --prompts"):
        of_subjects([FILE], "some/model")


def test_the_contexts_are_twenty_and_no_prompt_set():
    contexts = [text for _, text in numbered_lines(FOLDER / f"{CONTEXTS}.txt", CONTEXTS)]
    assert len(set(contexts)) == len(contexts) == 20
    assert all(context.startswith("{prompt} ") for context in contexts)
    assert CONTEXTS not in shipped()
