"""Lists of concepts: what is read of them, how it is dealt, and what is refused with its place."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import train_dreambooth_bilora
from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.script import (
    class_images,
    heldout_images,
    joined,
    training_images,
)
from bilora_diffusion.image.stream import TrainingStream, centered_samples

MINI = ["--pretrained_model_name_or_path", "mini", "--disk_cache", "no"]
DOG = "- {dataset: dog, instance_prompt: a TOK dog}\n"
CAT = "- {dataset: cat, instance_prompt: a SKS cat, %s}\n"
PRIOR = "--with_prior_preservation"
CLASS = f"{PRIOR} --class_data_dir class --class_prompt a"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Folders of pictures in the working directory, some of them wrong in one way."""
    monkeypatch.chdir(tmp_path)
    icons = sorted(mini.train_dir().glob("*.png"))
    pictures = {"dog": icons[:3], "cat": icons[3:5], "held/dog": icons[5:7], "bare": icons[7:8]}
    for name in (*pictures, "empty", "broken", "half", "class"):
        (tmp_path / name).mkdir(parents=True)
        for picture in pictures.get(name, icons[8:9] if name == "half" else []):
            shutil.copy(picture, tmp_path / name)
    shutil.copy(icons[9], tmp_path / "half" / "other.png")
    (tmp_path / "half" / "other.txt").write_text("a caption")
    (tmp_path / "whole").mkdir()
    (tmp_path / "dog").rename(tmp_path / "whole" / "dog")
    (tmp_path / "dog").symlink_to(tmp_path / "whole" / "dog")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "other.png").symlink_to(tmp_path / "dog" / icons[0].name)
    (tmp_path / "broken" / "broken.png").write_bytes(icons[0].read_bytes()[:200])
    return tmp_path


def read(text, *flags):
    Path("concepts.yaml").write_text(text)
    return resolve(["--dataset", "concepts.yaml", *MINI, *flags])


def test_options_of_the_command_line_are_the_defaults_of_each_concept():
    text = DOG + CAT % "repeats: 7, caption_dropout: 0.5, validation_dataset: held/dog"
    cfg = read(text, "--repeats", "3", "--trigger_word", "TOK", "--rank", "2")
    dog, cat = cfg.concept_configs
    assert [concept.concept for concept in cfg.concept_configs] == ["dog", "cat"]
    assert (dog.repeats, dog.trigger_word, dog.caption_dropout, dog.rank) == (3, "TOK", 0.0, 2)
    assert (cat.repeats, cat.caption_dropout, cat.instance_prompt) == (7, 0.5, "a SKS cat")
    assert (dog.validation_dataset, cat.validation_dataset) == (None, "held/dog")
    assert cfg.source == cfg.validation_dataset == "concepts.yaml"
    assert (dog.source, cat.source) == ("dog", "cat")
    assert resolve(["--dataset", "mini"]).concept_configs == [resolve(["--dataset", "mini"])]

    recipe = json.dumps({"dataset": [{"dataset": "dog", "instance_prompt": "a", "repeats": "2"}]})
    Path("run.yaml").write_text(recipe)
    cfg = resolve(["--config", "run.yaml", *MINI])
    assert (cfg.source, cfg.concept_configs[0].source, cfg.concept_configs[0].repeats) == (
        "run.yaml",
        "dog",
        2,
    )
    assert resolve(["--config", "run.yaml", "--dataset", "mini"]).concepts == []


def test_a_set_that_brings_captions_and_held_out_images_does_so_as_a_concept():
    cfg = read("- dataset: mini\n- {dataset: mini-animals, instance_prompt: an animal}\n")
    icons, animals = cfg.concept_configs
    assert (icons.caption_column, icons.validation_dataset) == ("prompt", "mini-heldout")
    assert (animals.caption_column, animals.instance_prompt) == (None, "an animal")
    assert cfg.validation_prompts == []
    assert read("- dataset: mini\n", "--validation_dataset", "none").validation_dataset is None


def test_names_are_the_folders_or_their_paths_where_these_are_alike():
    two_dogs = "- {dataset: dog, instance_prompt: a}\n- {dataset: held/dog, instance_prompt: b}\n"
    assert [concept.concept for concept in read(two_dogs).concept_configs] == ["dog", "held/dog"]


def test_prompts_of_a_concept_are_drawn_with_those_of_the_run():
    prompts = "validation_prompts: [{prompt: a SKS cat at sea, seed: 4}], validation_prompt: a cat"
    cfg = read(DOG + CAT % prompts, "--validation_prompts", "a bird", "--num_validation_images=1")
    samples = [(sample.prompt, sample.seed, sample.concept) for sample in cfg.samples]
    assert samples == [("a bird", 0, ""), ("a cat", 0, "cat"), ("a SKS cat at sea", 4, "cat")]


def test_a_resume_needs_the_same_concepts_but_for_what_is_only_looked_at():
    fingerprints = [
        read(DOG + CAT % options).fingerprint()
        for options in ("repeats: 2", "repeats: 2, validation_dataset: held/dog", "repeats: 3")
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert "concepts" not in resolve(["--dataset", "mini"]).fingerprint()


def test_what_has_no_effect_in_a_concept_is_said_with_its_place(caplog):
    cfg = read(DOG + CAT % "class_prompt: a cat")
    assert cfg.concept_configs[1].class_prompt is None
    assert "concepts.yaml, concept 2: --class_prompt" in caplog.text


def test_each_image_is_seen_as_often_as_its_concept_repeats_and_with_its_text():
    text = "- {dataset: dog, instance_prompt: 'a, b, c', shuffle_tags: true, trigger_word: TOK}\n"
    second_options = "repeats: 4, validation_dataset: held/dog, random_flip: true"
    for shapes in ([], ["--aspect_ratio_buckets", "64,64;32,64"]):
        cfg = read(text + CAT % second_options, *shapes)
        stream = TrainingStream(cfg, training_images(cfg))
        assert stream.num_samples == 3 + 4 * 2
        samples = [stream.sample(position, 0, 1, "instance") for position in range(22)]
        times = Counter(sample.name for sample in samples)
        assert sorted(times.values()) == [2, 2, 2, 8, 8]
        assert {name[:4] for name, count in times.items() if count == 8} == {"cat/"}
        for sample in samples:
            concept = sample.name[:3]
            tags = sample.caption.split(", ")
            assert sorted(tags) == (["TOK", "a", "b", "c"] if concept == "dog" else ["a SKS cat"])
            assert sample.cfg.concept == concept
        assert {sample.name[:3] for sample in samples if sample.crop.flipped} == {"cat"}
        assert set(stream.captions()) > {sample.caption for sample in samples} - {
            samples[0].caption
        }
        heldout = heldout_images(cfg)
        assert heldout is not None
        (texts,) = {sample.caption for sample in centered_samples(heldout, cfg)}
        assert texts == "a SKS cat"


def test_class_images_have_the_prompt_of_their_concept():
    both = DOG + CAT % ""
    for name, source, count in (("dog", "dog", 2), ("cat", "held/dog", 9)):
        options = f"class_data_dir: {name}s, class_prompt: a {name}, num_class_images: {count}"
        shutil.copytree(source, f"{name}s")
        both = both.replace(f"{{dataset: {name},", f"{{dataset: {name}, {options},")
    for number in range(7):
        shutil.copy(next(Path("bare").glob("*.png")), Path("cats", f"{number}.png"))
    cfg = read(both, PRIOR)
    classes = joined(cfg, lambda options: class_images(options, Accelerator()))
    stream = TrainingStream(cfg, training_images(cfg), classes)
    texts = Counter(stream.sample(n, 0, 1, "class").caption for n in range(11))
    assert texts == {"a dog": 2, "a cat": 9}
    assert stream.num_samples == 11
    assert {"a dog", "a cat"} < set(stream.captions())


def two_concepts(second):
    """Two concepts, of which the second has these options."""
    return DOG + f"- {{{second}}}\n"


def cat(options):
    return two_concepts(f"dataset: cat, instance_prompt: a, {options}")


BAD = [
    # the file
    ("dataset: dog", "", "concepts.yaml holds no list"),
    ("- dataset: [", "", "concepts.yaml.* can't be read .line 1"),
    (DOG + "- cat", "", 'concept 2: it is "cat"'),
    # options
    (cat("repeat: 2"), "", 'concept 2: .*"repeats"'),
    (
        two_concepts("dataset: cat, unmasked-weight: 0.5"),
        "",
        "concept 2: unmasked_weight .* all concepts",
    ),
    (
        two_concepts("dataset: cat, validation_prompts: [{prompt: a, width: 3}]"),
        "",
        "concept 2: in number 1",
    ),
    # what they name
    (
        two_concepts("instance_data_dir: nowhere, instance_prompt: a"),
        "",
        'concept 2: .*"nowhere" does not',
    ),
    (two_concepts("dataset: cat"), "", 'concept 2: "cat" has no prompt'),
    (
        two_concepts("dataset: ./dog/, instance_prompt: a"),
        "",
        'concept 2: .*"./dog/", are those of conc.* 1',
    ),
    # the class
    (cat("class_data_dir: dog"), CLASS, "concept 2: .*training images of concept 1"),
    (cat("class_prompt: b"), CLASS, "concept 2: .*prompts differ"),
    # the images, before a model is read
    (
        two_concepts("dataset: links, instance_prompt: a"),
        "",
        "concept 2: .* is one of concept 1 too",
    ),
    (two_concepts("dataset: broken, instance_prompt: a"), "", "concept 2: the image broken.png"),
    (two_concepts("dataset: half"), "", "concept 2: .* in half has no caption"),
    (cat("shuffle_tags: true"), "", "concept 2: --shuffle_tags"),
]


@pytest.mark.parametrize(("text", "flags", "sentence"), BAD)
def test_a_bad_list_is_one_sentence_with_its_place_before_a_model_is_read(
    text, flags, sentence, folders, capsys, monkeypatch
):
    def loaded(*_, **__):
        pytest.fail("a model was read")

    monkeypatch.setattr("bilora_diffusion.image.script.load_base", loaded)
    AcceleratorState._reset_state()  # of other tests in this process
    Path("concepts.yaml").write_text(text)
    argv = ["--dataset", "concepts.yaml", *MINI, "--output_dir", "run", *flags.split()]
    assert train_dreambooth_bilora.main(argv) == 2
    stderr = capsys.readouterr().err
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert re.search(sentence, error), error
    if sentence.startswith("concept "):
        assert error.startswith("error: concepts.yaml, concept "), error
    assert "Traceback" not in stderr
    assert not (folders / "run" / "run.json").exists()


def test_a_bad_concept_of_a_recipe_has_the_recipes_name():
    Path("run.yaml").write_text("dataset:\n" + DOG + "- {dataset: cat}\n")
    with pytest.raises(UserError, match=r'^run.yaml, concept 2: "cat" has no prompt'):
        resolve(["--config", "run.yaml", *MINI])
    with pytest.raises(UserError, match=r'list of concepts "none\.yaml".* is not there'):
        resolve(["--dataset", "none.yaml", *MINI])
