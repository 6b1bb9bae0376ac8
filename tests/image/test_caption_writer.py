"""`bilora caption` with small random models: its captions, the files it writes, and its report."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from PIL import Image

from bilora_diffusion.caption import main
from bilora_diffusion.image import caption_writer
from bilora_diffusion.image.caption_models import load_captioner
from bilora_diffusion.image.captions import Captions
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.prompt_length import PromptLength
from tests.eval.clip_models import pictures, save_blip, save_dinov2
from tests.image.image_folders import photos, save
from tests.image.tiny_captioners import save_chat_model, save_florence
from tests.scripts.runs import flags, train


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("models") / "blip")


def save_pictures(folder: Path, count: int) -> Path:
    """Save random images in a new folder, as JPEG, PNG and WebP files in turn."""
    folder.mkdir()
    for number, image in enumerate(pictures(count, None)):
        suffix = ("jpg", "png", "webp")[number % 3]
        image.save(folder / f"{number:02}.{suffix}")
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.rglob("*.txt"))}


def write_captions_by(monkeypatch, caption) -> None:
    """Replace the captioner with a function that takes an image and returns its caption."""
    captioner = SimpleNamespace(captions=lambda images: [caption(image) for image in images])
    monkeypatch.setattr(caption_writer, "_load_captioner", lambda options: captioner)


@torch.inference_mode()
def test_florences_captions_of_a_batch_equal_those_of_transformers_for_each_image(tmp_path):
    folder = save_florence(tmp_path / "florence")
    images = pictures(3, None)
    model: Any = hf.Florence2ForConditionalGeneration.from_pretrained(folder)
    processor: Any = hf.AutoProcessor.from_pretrained(folder)
    expected = []
    for image in images:
        inputs = processor(images=image, text="<DETAILED_CAPTION>", return_tensors="pt")
        tokens = model.generate(**inputs, num_beams=3, max_new_tokens=12)
        expected += processor.batch_decode(tokens, skip_special_tokens=True)
    captioner = load_captioner(str(folder), max_new_tokens=12)
    assert captioner.captions(images) == expected
    assert len(set(expected)) > 1


@torch.inference_mode()
def test_a_chat_models_captions_of_a_batch_equal_those_of_transformers_for_each_image(tmp_path):
    folder = save_chat_model(tmp_path / "qwen")
    images = pictures(3, None)
    model: Any = hf.AutoModelForImageTextToText.from_pretrained(folder)
    processor: Any = hf.AutoProcessor.from_pretrained(folder)
    expected = []
    for image in images:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "a rabbit"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(answer, skip_special_tokens=True)
        expected.append(" ".join(text.split()))
    captioner = load_captioner(str(folder), prompt="a rabbit", max_new_tokens=12)
    assert captioner.captions(images) == expected
    assert len(set(expected)) > 1
    # Another prompt gets other answers.
    assert load_captioner(str(folder), max_new_tokens=12).captions(images) != expected


def test_blips_captions_begin_with_the_prompt(blip):
    captioner = load_captioner(str(blip), prompt="word3 word4")
    for caption in captioner.captions(pictures(2)):
        assert caption.startswith("word3 word4 word")


def test_missing_captions_are_written_and_others_are_kept(tmp_path, blip, capsys):
    folder = save_pictures(tmp_path / "photos", 5)
    (folder / "01.txt").write_text("a hand-made caption\n")
    (folder / "02.TXT").write_text("")  # blank, but present
    with Image.open(folder / "04.png") as image:
        image.convert("L").save(folder / "04.mask.png")
    command = [str(folder), "--model", str(blip), "--trigger_word", "word31", "--batch_size", "2"]
    assert main(command) == 0
    output = capsys.readouterr().out
    files = texts(folder)
    assert sorted(files) == ["00.txt", "01.txt", "03.txt", "04.txt"]
    assert files["01.txt"] == "a hand-made caption\n"
    assert (folder / "02.TXT").read_text() == ""
    captions = load_captioner(str(blip)).captions(
        [open_images(str(folder)).image(number) for number in (0, 3, 4)]
    )
    for name, caption in zip(("00.txt", "03.txt", "04.txt"), captions, strict=True):
        # The trigger word is put in front unless the model wrote it.
        has_word = "word31" in caption.split()
        assert files[name] == f"{caption if has_word else f'word31, {caption}'}\n"
    # The table lists each image with its number of tokens and its caption.
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()[1:6]}
    assert rows["01.png"] == ["7", "a", "hand-made", "caption"]  # CLIP's tokens, with start and end
    assert rows["02.webp"] == ["-"]
    assert "3 captions written" in output
    assert "Without a caption: 02.webp" in output
    assert output.splitlines()[-1].startswith("Read and correct the captions")
    assert "word31 comes to mean" in output

    # The second time, nothing is missing and no model is loaded.
    assert main([str(folder), "--model", "tests/absent"]) == 0
    assert "0 captions written" in capsys.readouterr().out
    assert texts(folder) == files
    # Training reads the captions that were written.
    cfg = resolve(flags(tmp_path / "run", dataset=folder, instance_prompt="TOK"))
    trained = Captions(cfg, open_images(str(folder))).all_texts()
    assert {files[name].strip() for name in ("00.txt", "01.txt", "04.txt")} < set(trained)

    assert main([*command, "--overwrite"]) == 0
    overwritten = texts(folder)
    assert overwritten["00.txt"] == files["00.txt"]
    assert overwritten["01.txt"] != files["01.txt"]
    assert (folder / "02.TXT").read_text().strip()


def test_an_interrupted_command_continues_when_it_is_run_again(tmp_path, monkeypatch, capsys):
    folder = save_pictures(tmp_path / "photos", 5)
    count = 0

    def caption(image):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return f"caption {count}"

    write_captions_by(monkeypatch, caption)
    assert main([str(folder), "--batch_size", "2"]) == 130
    assert "2 captions written for 5 images: run the same command again" in capsys.readouterr().err
    assert texts(folder) == {"00.txt": "caption 1\n", "01.txt": "caption 2\n"}
    assert main([str(folder), "--batch_size", "2"]) == 0
    written = texts(folder)
    assert written["01.txt"] == "caption 2\n"
    assert sorted(written) == ["00.txt", "01.txt", "02.txt", "03.txt", "04.txt"]
    assert not list(folder.glob(".tmp-*"))


def test_images_in_subfolders_and_rotated_images_are_captioned_as_training_reads_them(
    tmp_path, monkeypatch
):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    (tmp_path / "photos" / "first").mkdir(parents=True)
    Image.new("RGB", (12, 8)).save(tmp_path / "photos" / "first" / "a.jpg", exif=exif)
    save(tmp_path / "photos" / "second" / "a.png", size=(20, 10))
    write_captions_by(monkeypatch, lambda image: f"{image.width} by {image.height}")
    assert main([str(tmp_path / "photos")]) == 0
    captions = [entry.caption for entry in open_images(str(tmp_path / "photos")).entries]
    assert captions == ["8 by 12", "20 by 10"]


def test_long_empty_and_repeated_captions_and_look_alikes_are_reported(
    tmp_path, monkeypatch, capsys
):
    folder = save_pictures(tmp_path / "photos", 4)
    with Image.open(folder / "01.png") as image:
        image.resize((200, 150)).save(folder / "01b.jpg")
    answers = iter(["", "a red cat", "a red cat", "a dog " * 40, "a house"])
    write_captions_by(monkeypatch, lambda image: next(answers).strip())
    assert main([str(folder)]) == 0
    output = capsys.readouterr().out
    assert "Without a caption: 00.jpg" in output
    assert not (folder / "00.txt").exists()
    assert '2 images have the caption "a red cat": 01.png, 01b.jpg.' in output
    assert (
        "1 of 4 captions have more than the 77 tokens that CLIP reads (02.webp with 82)" in output
    )
    assert "01.png and 01b.jpg look alike (distance " in output

    # The miniature reads 32 tokens.
    for path in folder.glob("*.txt"):
        path.write_text("a red icon " * 12)
    (folder / "00.txt").write_text("a red icon " * 12)
    assert main([str(folder), "--pretrained_model_name_or_path", "mini"]) == 0
    output = capsys.readouterr().out
    assert "5 of 5 captions have more than the 32 tokens that mini reads" in output
    assert "All images have the caption" in output


def test_tokens_are_counted_with_the_base_models_tokenizers():
    assert PromptLength.of_clip().count("a photo of a dog") == 7  # with start and end
    for name, limit in (("mini", 32), ("mini-flow", 20)):
        length = PromptLength.of_base_model(name)
        pipeline = load_pipeline(name, dtype=torch.float32, weights=False)
        trained_length = PromptLength.of_pipeline(pipeline, family_of(pipeline))
        assert length.limit == trained_length.limit == limit
        assert length.reader == trained_length.reader == name
        assert length.count("a red icon") == 5
        assert length.warning({"a.jpg": "a red icon"}) is None
        assert "a.jpg with 42" in str(length.warning({"a.jpg": "a " * 40}))


def with_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n')


def with_shared_stem(folder: Path) -> None:
    save(folder / "a.png")


def with_broken_image(folder: Path) -> None:
    (folder / "z.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_metadata, "metadata.jsonl"),
        (with_shared_stem, "a.jpg and a.png would share the caption a.txt"),
        (with_broken_image, "z.png"),
    ],
)
def test_folders_that_can_not_be_captioned_are_refused(spoil, words, tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    before = texts(folder)
    spoil(folder)
    assert main([str(folder), "--model", "tests/absent"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert texts(folder) == before


def test_skip_bad_images_skips_a_broken_image_as_in_training(tmp_path, monkeypatch, capsys):
    folder = photos(tmp_path / "photos")
    with_broken_image(folder)
    write_captions_by(monkeypatch, lambda image: "a caption")
    assert main([str(folder), "--skip_bad_images"]) == 0
    assert "z.png" in capsys.readouterr().out
    assert sorted(texts(folder)) == ["a.txt", "c.txt"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["absent"], '"absent" is not a folder'),
        (["mini"], '"mini" is not a folder'),
        (["empty"], "holds no images"),
        (["tables"], "in tables"),
        (["photos", "--model", "tests/absent"], "--model tests/absent can't be loaded"),
        (["photos", "--model", "dino"], "of type dinov2, which writes no captions"),
        (["photos", "--model", "microsoft/Florence-2-base"], "florence-community/Florence-2-base"),
        (["photos", "--model", "florence", "--prompt", "a dog"], "not a task of Florence-2"),
        (["photos", "--model", "florence", "--max_new_tokens", "600"], "fewer than 512"),
        (["photos", "--model", "mute"], "no chat template"),
        (["photos", "--pretrained_model_name_or_path", "absent"], "absent"),
        (["photos", "--batch_size", "0"], "--batch_size"),
        (["photos", "--dtype", "int8"], "--dtype"),
        (["photos", "--modle", "x"], "--model"),
    ],
)
def test_invalid_arguments_and_unsuitable_models_are_refused_in_one_sentence(
    argv, words, folders, monkeypatch, capsys
):
    monkeypatch.chdir(folders)
    before = texts(folders)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: ")
    assert texts(folders) == before


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Create the images and models that the refused commands name."""
    root = tmp_path_factory.mktemp("folders")
    photos(root / "photos")
    (root / "empty").mkdir()
    (root / "tables").mkdir()
    features = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))]}, features=features)
    rows.to_parquet(root / "tables" / "train.parquet")
    save_dinov2(root / "dino")
    save_florence(root / "florence")
    save_chat_model(root / "mute", has_template=False)
    return root


@pytest.mark.slow
def test_twelve_images_are_captioned_and_trained_on(tmp_path, blip, capsys):
    folder = save_pictures(tmp_path / "photos", 12)
    assert main([str(folder), "--model", str(blip), "--trigger_word", "TOK"]) == 0
    assert "12 captions written" in capsys.readouterr().out
    run = train(tmp_path / "run", dataset=folder, pretrained_model_name_or_path="mini")
    record = json.loads((run / "run.json").read_text())
    captions = [entry.caption for entry in open_images(str(folder)).entries]
    assert len(captions) == 12
    for caption in captions:
        assert str(caption).startswith("TOK, word")
    assert record["status"] == "finished"
    # No prompt was given, so the run trained on the captions. Their hash is recorded.
    assert record["config"]["instance_prompt"] is None
    samples = {"count": 12, "hash": open_images(str(folder)).fingerprint()}
    assert record["content"]["training"] == samples
