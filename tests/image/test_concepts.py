"""Lists of concepts: their options and samples, and messages that name the concept."""

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
    join_sets,
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
    """Create folders of pictures in the working directory, some of them with an error."""
    monkeypatch.chdir(tmp_path)
    icons = sorted(mini.train_dir().glob("*.png"))
    pictures = {
        "whole/dog": icons[:3],
        "cat": icons[3:5],
        "held/dog": icons[5:7],
        "half": icons[7:9],
        "links": [],
        "broken": [],
        "class": [],
    }
    for name, files in pictures.items():
        Path(name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, name)
    Path("dog").symlink_to(tmp_path / "whole" / "dog")
    # One of two images has a caption.
    Path("half", icons[7].name).with_suffix(".txt").write_text("a caption")
    Path("links", "other.png").symlink_to(tmp_path / "dog" / icons[0].name)
    Path("broken", "broken.png").write_bytes(icons[0].read_bytes()[:200])


def read(text, *flags):
    """Return the configuration of a run with this list of concepts."""
    Path("concepts.yaml").write_text(text)
    return resolve(["--dataset", "concepts.yaml", *MINI, *flags])


def test_command_line_options_are_the_defaults_of_each_concept():
    text = DOG + CAT % "repeats: 7, caption_dropout: 0.5, validation_dataset: held/dog"
    cfg = read(text, "--repeats", "3", "--trigger_word", "TOK", "--rank", "2")
    assert cfg.source == cfg.validation_dataset == "concepts.yaml"
    dog, cat = cfg.concept_configs
    assert (dog.concept, dog.source, dog.validation_dataset) == ("dog", "dog", None)
    assert (dog.repeats, dog.trigger_word, dog.caption_dropout, dog.rank) == (3, "TOK", 0.0, 2)
    assert (cat.concept, cat.source, cat.validation_dataset) == ("cat", "cat", "held/dog")
    assert (cat.repeats, cat.caption_dropout, cat.instance_prompt) == (7, 0.5, "a SKS cat")


def test_a_run_without_a_list_is_its_own_concept():
    cfg = resolve(["--dataset", "mini"])
    assert cfg.concept_configs == [cfg]


def test_a_recipe_may_contain_the_list_and_a_flag_replaces_it():
    Path("run.yaml").write_text("dataset: [{dataset: dog, instance_prompt: a, repeats: '2'}]")
    cfg = resolve(["--config", "run.yaml", *MINI])
    (dog,) = cfg.concept_configs
    assert (cfg.source, dog.source, dog.repeats) == ("run.yaml", "dog", 2)
    assert resolve(["--config", "run.yaml", "--dataset", "mini"]).concepts == []


def test_an_embedded_set_keeps_its_captions_and_held_out_images_as_a_concept():
    cfg = read("- dataset: mini\n- {dataset: mini-animals, instance_prompt: an animal}\n")
    icons, animals = cfg.concept_configs
    assert (icons.caption_column, icons.validation_dataset) == ("prompt", "mini-heldout")
    assert (animals.caption_column, animals.instance_prompt) == (None, "an animal")
    assert cfg.validation_prompts == []
    assert read("- dataset: mini\n", "--validation_dataset", "none").validation_dataset is None


def test_a_concept_has_its_folders_name_or_its_path_if_two_folder_names_are_equal():
    two_dogs = "- {dataset: dog, instance_prompt: a}\n- {dataset: held/dog, instance_prompt: b}\n"
    assert [concept.concept for concept in read(two_dogs).concept_configs] == ["dog", "held/dog"]


def test_a_concepts_prompts_are_sampled_together_with_the_runs_prompts():
    prompts = "validation_prompts: [{prompt: a SKS cat at sea, seed: 4}], validation_prompt: a cat"
    cfg = read(DOG + CAT % prompts, "--validation_prompts", "a bird", "--num_validation_images=1")
    samples = [(sample.prompt, sample.seed, sample.concept) for sample in cfg.samples]
    assert samples == [("a bird", 0, ""), ("a cat", 0, "cat"), ("a SKS cat at sea", 4, "cat")]


def test_a_resume_needs_the_same_concepts_except_for_held_out_images():
    settings = read(DOG + CAT % "repeats: 2").resume_settings()
    # Held-out images change no training sample.
    measured = read(DOG + CAT % "repeats: 2, validation_dataset: held/dog")
    assert measured.resume_settings() == settings
    assert read(DOG + CAT % "repeats: 3").resume_settings() != settings
    assert "concepts" not in resolve(["--dataset", "mini"]).resume_settings()


def test_an_option_without_effect_is_reported_with_the_concepts_number(caplog):
    cfg = read(DOG + CAT % "class_prompt: a cat")
    assert cfg.concept_configs[1].class_prompt is None
    assert "concepts.yaml, concept 2: --class_prompt" in caplog.text


@pytest.mark.parametrize("shapes", [[], ["--aspect_ratio_buckets", "64,64;32,64"]])
def test_each_image_is_repeated_as_its_concept_says_and_has_the_concepts_text(shapes):
    dog = "- {dataset: dog, instance_prompt: 'a, b, c', shuffle_tags: true, trigger_word: TOK}\n"
    cat = CAT % "repeats: 4, validation_dataset: held/dog, random_flip: true"
    cfg = read(dog + cat, *shapes)
    stream = TrainingStream(cfg, training_images(cfg))
    assert stream.num_samples == 3 + 4 * 2
    texts = set(stream.captions())
    counts = Counter()
    for position in range(2 * stream.num_samples):  # two epochs
        sample = stream.sample(position, 0, 1, "instance")
        counts[sample.name] += 1
        assert sample.cfg.concept == sample.name.partition("/")[0]
        assert sample.caption in texts
        if sample.cfg.concept == "dog":
            # The tags are shuffled, and the trigger word is added.
            assert sorted(sample.caption.split(", ")) == ["TOK", "a", "b", "c"]
            assert not sample.crop.flipped
        else:
            assert sample.caption == "a SKS cat"
            counts["flipped"] += sample.crop.flipped
    assert counts.pop("flipped") > 0
    counts_of_cats = [counts.pop(name) for name in list(counts) if name.startswith("cat/")]
    assert counts_of_cats == [8, 8]
    assert list(counts.values()) == [2, 2, 2]
    heldout = heldout_images(cfg)
    assert heldout is not None
    for sample in centered_samples(heldout, cfg):
        assert sample.caption == "a SKS cat"


def test_class_images_have_the_prompt_of_their_concept():
    shutil.copytree("dog", "dogs")
    shutil.copytree("cat", "cats")
    shutil.copytree("held/dog", "cats", dirs_exist_ok=True)
    cfg = read(
        "- {dataset: dog, instance_prompt: a TOK dog,"
        " class_data_dir: dogs, class_prompt: a dog, num_class_images: 2}\n"
        "- {dataset: cat, instance_prompt: a SKS cat,"
        " class_data_dir: cats, class_prompt: a cat, num_class_images: 4}\n",
        PRIOR,
    )
    classes = join_sets(cfg, lambda options: class_images(options, Accelerator()))
    stream = TrainingStream(cfg, training_images(cfg), classes)
    assert stream.num_samples == 6
    texts = Counter(stream.sample(position, 0, 1, "class").caption for position in range(6))
    assert texts == {"a dog": 2, "a cat": 4}
    assert {"a dog", "a cat"} < set(stream.captions())


def two_concepts(second):
    """Return a list of two concepts; the second one has these options."""
    return DOG + f"- {{{second}}}\n"


def cat_with(options):
    return two_concepts(f"dataset: cat, instance_prompt: a, {options}")


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        # the file
        ("dataset: dog", "", "concepts.yaml is not a list of concepts"),
        ("- dataset: [", "", "concepts.yaml.* can't be read .line 1"),
        (DOG + "- cat", "", 'concept 2: "cat" names no options'),
        # options
        (cat_with("repeat: 2"), "", 'concept 2: .*"repeats"'),
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
        # values of the options
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
        # class images
        (cat_with("class_data_dir: dog"), CLASS, "concept 2: .*training images in one folder"),
        (cat_with("class_prompt: b"), CLASS, "concept 2: .*prompts differ"),
        # training images
        (
            two_concepts("dataset: links, instance_prompt: a"),
            "",
            "concept 2: .* is also in concept 1",
        ),
        (
            two_concepts("dataset: broken, instance_prompt: a"),
            "",
            "concept 2: the image broken.png",
        ),
        (two_concepts("dataset: half"), "", "concept 2: .* in half has no caption"),
        (cat_with("shuffle_tags: true"), "", "concept 2: --shuffle_tags"),
    ],
)
def test_an_invalid_list_is_refused_with_the_concepts_number_before_a_model_is_loaded(
    text, flags, sentence, capsys, monkeypatch
):
    def fail(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("bilora_diffusion.image.script.load_base", fail)
    AcceleratorState._reset_state()  # it was set by other tests in this process
    Path("concepts.yaml").write_text(text)
    argv = ["--dataset", "concepts.yaml", *MINI, "--output_dir", "run", *flags.split()]
    assert train_dreambooth_bilora.main(argv) == 2
    stderr = capsys.readouterr().err
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert re.search(sentence, error), error
    if sentence.startswith("concept "):
        assert error.startswith("error: concepts.yaml, concept "), error
    assert "Traceback" not in stderr
    assert not Path("run", "run.json").exists()


def test_the_error_of_a_recipes_concept_names_the_recipe():
    Path("run.yaml").write_text("dataset:\n" + DOG + "- {dataset: cat}\n")
    with pytest.raises(UserError, match=r'^run.yaml, concept 2: "cat" has no prompt'):
        resolve(["--config", "run.yaml", *MINI])
    with pytest.raises(UserError, match=r'list of concepts "none\.yaml".* is not there'):
        resolve(["--dataset", "none.yaml", *MINI])
