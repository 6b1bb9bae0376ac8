"""Captions of a folder's images as ``.txt`` files: write the missing ones, and report on all.

The command line is `bilora_diffusion.caption`. Images are found and read, and captions named, as
training does it.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..config.machine import default_precision, device_type
from ..core.durable import write_text
from ..core.errors import Interrupted, UserError, as_user_error, strip_controls
from ..core.files import counted, is_folder, listed, quoted
from ..mini import FOLDERS
from ..run.console import quiet
from ..train.engine import PRECISIONS
from ..train.task import explain_memory_errors
from .caption_models import ImageCaptioner, load_captioner
from .captions import add_trigger
from .image_files import list_folder, stem
from .look_alikes import describe_pairs, find_look_alikes
from .opening import open_images
from .prompt_length import PromptLength
from .sets import ImageSet

# Maximum number of rows of the table.
MAX_ROWS = 200
# Maximum length of a name in the table.
NAME_WIDTH = 32


@dataclass
class CaptionFile:
    """The text file of one image."""

    name: str  # of the image
    path: Path
    text: str | None  # None without a file, "" for a blank one
    is_new: bool = False


def caption_folder(options: Namespace) -> None:
    """Run the command with the options of `caption.CaptionOptions` and ``folder``.

    Raises:
        UserError: no folder of images, no captioner, or no base model.
        Interrupted: by Ctrl-C; captions that are written stay.
    """
    quiet()
    # Before the captioner, since it is found faster.
    if options.pretrained_model_name_or_path is None:
        prompt_length = PromptLength.of_clip()
    else:
        prompt_length = PromptLength.of_base_model(options.pretrained_model_name_or_path)
    images = _open_images(options.folder, options.skip_bad_images)
    for line in images.left_out():
        print(strip_controls(line))
    files = _caption_files(options.folder, images)
    indices = []
    for index, file in enumerate(files):
        if file.text is None or options.overwrite:
            indices.append(index)
    if indices:
        _write_captions(options, images, files, indices)
    for line in _report(options, images, files, prompt_length):
        print(strip_controls(line))


def _open_images(folder: str, skip_bad_images: bool) -> ImageSet:
    """Open a folder of images whose captions are text files."""
    if not is_folder(Path(folder).expanduser()):
        raise UserError(f"{quoted(folder)} is not a folder: give the folder of your images.")
    if folder in FOLDERS:
        raise UserError(
            f'"{folder}" is the name of an embedded set: give "./{folder}" for the folder here.'
        )
    for metadata in list_folder(Path(folder).expanduser()).metadata:
        raise UserError(
            f"{quoted(folder)} has a {metadata.name}, so captions are read from its columns and not"
            " from text files: write them there, or remove it."
        )
    return open_images(folder, skip_bad_images=skip_bad_images)


def _caption_files(folder: str, images: ImageSet) -> list[CaptionFile]:
    """The text file of each image.

    Raises:
        UserError: images are not files, or two of them would have one text file.
    """
    existing_files = list_folder(Path(folder).expanduser()).texts
    files = []
    names: dict[str, str] = {}  # of images, by path without suffix
    for entry in images.entries:
        image_file = entry.encoded_image()
        if isinstance(image_file, bytes):
            raise UserError(
                f"{quoted(folder)} holds its images in tables, not in files: captions belong into a"
                " column of these."
            )
        image_stem = stem(image_file)
        if image_stem in names:
            raise UserError(
                f"{names[image_stem]} and {entry.name} would share the caption"
                f" {Path(image_stem).name}.txt: rename one of them."
            )
        names[image_stem] = entry.name
        path = existing_files.get(image_stem)
        text = None
        if path is not None:
            text = entry.caption or ""
        files.append(CaptionFile(entry.name, path or Path(f"{image_stem}.txt"), text))
    return files


def _write_captions(
    options: Namespace, images: ImageSet, files: Sequence[CaptionFile], indices: Sequence[int]
) -> None:
    """Write the captions of the images with these indices."""
    captioner = _load_captioner(options)
    with tqdm(total=len(indices), desc="captions", unit="image") as bar:
        try:
            for start in range(0, len(indices), options.batch_size):
                batch = indices[start : start + options.batch_size]
                action = f"captioning {counted(len(batch), 'image')} at a time"
                fix = f"lower --batch_size (now {options.batch_size}), or give a smaller --model"
                with explain_memory_errors(action, fix):
                    texts = captioner.captions([images.image(index) for index in batch])
                for index, text in zip(batch, texts, strict=True):
                    # Without a text there is no file: training takes a blank one for none.
                    if text:
                        file = files[index]
                        file.text = add_trigger(text, options.trigger_word)
                        write_text(file.path, f"{file.text}\n")
                        file.is_new = True
                    bar.update()
        except KeyboardInterrupt:
            advice = "give the same command again to write the others"
            if options.overwrite:
                advice = "with --overwrite the same command begins again"
            sentence = f"\n{bar.n} of {counted(len(indices), 'caption')} are written: {advice}"
            raise Interrupted(sentence) from None


def _load_captioner(options: Namespace) -> ImageCaptioner:
    """Load the captioner onto this machine's device."""
    precision = options.dtype or default_precision()
    label = f"--model {options.model}"
    fix = "check its name, its files and the connection to the hub, or give another, or a folder"
    with as_user_error(f"{label} can't be loaded", fix):
        return load_captioner(
            options.model,
            label=label,
            prompt=options.prompt,
            max_new_tokens=options.max_new_tokens,
            device=device_type(),
            dtype=PRECISIONS[precision],
        )


def _report(
    options: Namespace, images: ImageSet, files: Sequence[CaptionFile], prompt_length: PromptLength
) -> Iterator[str]:
    """The table of captions, what is wrong with them, and what to do next."""
    yield from _table(files, prompt_length)
    yield ""
    count_new = sum(file.is_new for file in files)
    count_left = sum(file.text is not None and not file.is_new for file in files)
    folder = options.folder
    yield f"{counted(count_new, 'caption')} written into {folder}; {count_left} left as before."
    captions = {file.name: file.text for file in files if file.text}
    long_captions = prompt_length.warning(captions)
    if long_captions is not None:
        yield long_captions
    if options.pretrained_model_name_or_path is None:
        yield (
            "Tokens are those of CLIP, with which SDXL reads prompts:"
            " --pretrained_model_name_or_path counts those of another base model."
        )
    missing = [file.name for file in files if not file.text]
    if missing:
        yield f"Without a caption: {listed(missing)}: write it by hand, or give another --model."
    images_of_caption: dict[str, list[str]] = defaultdict(list)
    for name, text in captions.items():
        images_of_caption[text].append(name)
    for text, names in images_of_caption.items():
        if len(names) > 1:
            number = "All" if len(names) == len(files) else f"{len(names)}"
            yield f"{number} images have the caption {quoted(text)}: {listed(names)}."
    for phrase in describe_pairs(find_look_alikes(images.looks()), images.names()):
        yield f"{phrase}: leave one out."
    subject = options.trigger_word or "your prompt"
    yield (
        f"Read and correct the captions in {folder} before training: {subject} stands for what they"
        " leave out, and what they name can be changed in a prompt."
    )


def _table(files: Sequence[CaptionFile], prompt_length: PromptLength) -> Iterator[str]:
    """Rows of image, tokens and the start of the caption, as wide as the terminal."""
    width = min(NAME_WIDTH, max(len(file.name) for file in files))
    room = max(20, shutil.get_terminal_size().columns - width - 10)
    yield f"{'image':<{width}}  tokens  caption"
    for file in files[:MAX_ROWS]:
        name = file.name
        if len(name) > width:
            name = f"...{name[3 - width :]}"
        if not file.text:
            yield f"{name:<{width}}  {'':>6}  -"
            continue
        start = file.text
        if len(start) > room:
            start = f"{start[: room - 3]}..."
        yield f"{name:<{width}}  {prompt_length.count(file.text):>6}  {start}"
    if len(files) > MAX_ROWS:
        yield f"and {len(files) - MAX_ROWS} more"
