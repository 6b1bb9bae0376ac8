"""Write the missing captions of a folder's images to ``.txt`` files, and report on all captions.

The command line is in `bilora_diffusion.caption`. Images and captions are found as in training.
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
# Maximum number of characters of a name in the table.
NAME_WIDTH = 32


@dataclass
class CaptionFile:
    """The text file of one image."""

    name: str  # name of the image
    path: Path
    text: str | None  # None if there is no file, "" if the file is blank
    is_new: bool = False  # whether this command wrote the file


def caption_folder(options: Namespace) -> None:
    """Write the missing captions of a folder, and print the report.

    Args:
        options: those of `caption.CaptionOptions`, and ``folder``.

    Raises:
        UserError: the folder, the captioner or the base model can't be used.
        TrainingError: the device's memory is too small for a batch.
        Interrupted: Ctrl-C was pressed; captions that are already written are kept.
    """
    quiet()
    # The tokenizer is loaded before the captioner, since it loads faster and can fail too.
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
            f'"{folder}" is the name of an embedded set: give "./{folder}" for the local folder.'
        )
    for metadata in list_folder(Path(folder).expanduser()).metadata:
        raise UserError(
            f"{quoted(folder)} has a {metadata.name}, so captions are read from its columns, not"
            " from text files: write the captions there, or remove the file."
        )
    return open_images(folder, skip_bad_images=skip_bad_images)


def _caption_files(folder: str, images: ImageSet) -> list[CaptionFile]:
    """Return the text file of each image.

    Raises:
        UserError: the images are not files, or two of them would share a text file.
    """
    existing_files = list_folder(Path(folder).expanduser()).texts
    files = []
    names: dict[str, str] = {}  # image names, by path without suffix
    for entry in images.entries:
        image_file = entry.encoded_image()
        if isinstance(image_file, bytes):
            raise UserError(
                f"{quoted(folder)} holds its images in tables, not in files: write the captions to"
                " a column of the tables."
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
    """Generate and write the captions of the images with these indices."""
    captioner = _load_captioner(options)
    with tqdm(total=len(indices), desc="captions", unit="image") as bar:
        try:
            for start in range(0, len(indices), options.batch_size):
                batch = indices[start : start + options.batch_size]
                action = f"captioning {counted(len(batch), 'image')} at a time"
                fix = "give a smaller --model"
                if options.batch_size > 1:
                    fix = f"lower --batch_size (now {options.batch_size}), or {fix}"
                with explain_memory_errors(action, fix):
                    texts = captioner.captions([images.image(index) for index in batch])
                for index, text in zip(batch, texts, strict=True):
                    # An empty caption gets no file, since training ignores blank files.
                    if text:
                        file = files[index]
                        file.text = add_trigger(text, options.trigger_word)
                        write_text(file.path, f"{file.text}\n")
                        file.is_new = True
                    bar.update()
        except KeyboardInterrupt:
            advice = "run the same command again to write the others"
            if options.overwrite:
                advice = "with --overwrite, the same command starts over"
            count_new = counted(sum(file.is_new for file in files), "caption")
            sentence = f"\n{count_new} written for {counted(len(indices), 'image')}: {advice}"
            raise Interrupted(sentence) from None


def _load_captioner(options: Namespace) -> ImageCaptioner:
    """Load the captioner onto this machine's device."""
    precision = options.dtype or default_precision()
    label = f"--model {options.model}"
    fix = "check its name, its files and the connection to the hub, or give another model"
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
    """Yield the lines of the report: the table of captions, their faults, and what to do next."""
    yield from _table(files, prompt_length)
    yield ""
    count_new = sum(file.is_new for file in files)
    count_left = sum(file.text is not None and not file.is_new for file in files)
    folder = options.folder
    yield f"{counted(count_new, 'caption')} written to {folder}; {count_left} left unchanged."
    captions = {file.name: file.text for file in files if file.text}
    long_captions = prompt_length.warning(captions)
    if long_captions is not None:
        yield long_captions
    if options.pretrained_model_name_or_path is None:
        yield (
            "Tokens are counted with SDXL's CLIP tokenizer: give --pretrained_model_name_or_path to"
            " count with that of another base model."
        )
    missing = [file.name for file in files if not file.text]
    if missing:
        yield (
            f"Without a caption: {listed(missing)}. Write captions by hand, or delete blank .txt"
            " files and give another --model."
        )
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
        f"Read and correct the captions in {folder} before training: {subject} comes to mean"
        " everything that they leave out, while a prompt can change everything that they name."
    )


def _table(files: Sequence[CaptionFile], prompt_length: PromptLength) -> Iterator[str]:
    """Yield rows of image, tokens and the start of the caption, as wide as the terminal."""
    width = min(NAME_WIDTH, max(len(file.name) for file in files))
    caption_width = max(20, shutil.get_terminal_size().columns - width - 10)
    yield f"{'image':<{width}}  tokens  caption"
    for file in files[:MAX_ROWS]:
        name = file.name
        if len(name) > width:
            name = f"...{name[3 - width :]}"
        if not file.text:
            yield f"{name:<{width}}  {'':>6}  -"
            continue
        start = file.text
        if len(start) > caption_width:
            start = f"{start[: caption_width - 3]}..."
        yield f"{name:<{width}}  {prompt_length.count(file.text):>6}  {start}"
    if len(files) > MAX_ROWS:
        yield f"and {len(files) - MAX_ROWS} more"
