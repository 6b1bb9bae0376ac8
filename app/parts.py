"""Parts that several tabs use: pictures and cards as HTML, notices, and background events.

Pictures are embedded in the page's HTML, so that the server does not have to serve files.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import shlex
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import is_file
from bilora_diffusion.image.image_files import DECODE_ERRORS
from bilora_diffusion.run.console import scoring_command

from .catalog import Catalog
from .runs import CONTROL, OURS, RunItem, choose_pair

# Properties of events that fill the page in the background
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Minimum and maximum of the longer side of a picture on the page, in pixels
MIN_SIDE, MAX_SIDE = 256, 768
# Minimum of the longer side of a slider's pictures, in pixels
MIN_SLIDER_SIDE = 384
# Maximum of the longer side of a result's figure, in pixels
MAX_FIGURE_SIDE = 1600
# Accepted formats of pictures. For some others, Pillow runs external programs such as Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Maximum number of pixels of a picture. A small file can decompress to an image that does not fit
# into memory.
MAX_PIXELS = 2**26
# Widget -> its new value or properties
Update = dict[Any, Any]


def html(elem_id: str | None = None, **options: Any) -> gr.HTML:
    """Create a widget for HTML without Gradio's style."""
    return gr.HTML(elem_id=elem_id, apply_default_css=False, **options)


def notice(text: str) -> Any:
    """Return an update that shows an HTML widget with this text, or hides it if the text is ""."""
    return gr.update(value=text, visible=bool(text))


def warn(text: str) -> None:
    """Show a warning as a pop-up message on the page."""
    gr.Warning(escape(text))  # Gradio interprets the text as HTML


# pictures


def read_picture(path: Path) -> Image.Image | None:
    """Read a picture; None if it is missing, unreadable, or larger than `MAX_PIXELS`."""
    try:
        if not is_file(path):  # a pipe would block the reader
            return None
        with Image.open(path, formats=FORMATS) as picture:
            if math.prod(picture.size) > MAX_PIXELS:
                return None
            return picture.convert("RGB")
    except DECODE_ERRORS:
        return None


def resize_to_fit(picture: Image.Image, min_side: int, max_side: int) -> Image.Image:
    """Resize a picture with a Lanczos filter, so that its longer side is between two bounds."""
    side = max(picture.size)
    new_side = min(max(side, min_side), max_side)
    width = max(1, round(picture.width * new_side / side))
    height = max(1, round(picture.height * new_side / side))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def data_uri(picture: Image.Image, min_side: int = MIN_SIDE, max_side: int = MAX_SIDE) -> str:
    """Encode a picture as a ``data:`` URI, resized as by `resize_to_fit`."""
    buffer = io.BytesIO()
    resize_to_fit(picture, min_side, max_side).save(buffer, "WEBP", quality=92, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def file_uri(path: Path, max_side: int = MAX_SIDE) -> str | None:
    """Encode a picture file as a ``data:`` URI; None if it is missing or unreadable."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _cached_file_uri(path, max_side, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _cached_file_uri(path: Path, max_side: int, changed_at: int, size: int) -> str | None:
    """Cache `file_uri`; the key includes time and size, so a changed file is read again."""
    picture = read_picture(path)
    if picture is None:
        return None
    return data_uri(picture, min_side=MIN_SIDE, max_side=max_side)


def file_uri_below_root(catalog: Catalog, path: str, max_side: int = MAX_SIDE) -> str | None:
    """Return `file_uri` of a path relative to the root; None if the path leads out of the root."""
    with contextlib.suppress(UserError):
        return file_uri(catalog.resolve(path), max_side)


def image_html(uri: str | None, label: str, missing: str = "") -> str:
    """Return a picture as HTML; a click, the Enter key or the space bar enlarges it.

    Args:
        uri: URI of the picture; None if there is no picture.
        label: alternative text.
        missing: text shown in place of a missing picture.
    """
    if uri is None:
        return f'<div class="absent">{escape(missing)}</div>'
    label = escape(label)
    return f'<img src="{uri}" alt="{label}" class="zoom" tabindex="0" role="button">'


def card_html(
    title: str, uri: str | None, role: str = "", missing: str = "", facts: str = ""
) -> str:
    """Return a picture below its name, as HTML.

    Args:
        title: name of the picture.
        uri: URI of the picture; None if there is no picture.
        role: "A" or "B" for one picture of a pair.
        missing: text shown in place of a missing picture.
        facts: HTML below the picture.
    """
    mark = f'<span class="role">{role}</span>' if role else ""
    return (
        f'<figure class="card"><div class="name">{mark}{escape(title)}</div>'
        f"{image_html(uri, title, missing)}{facts}</figure>"
    )


def slider_html(labels: Sequence[str], pictures: Sequence[Image.Image | None]) -> str:
    """Return two overlaid pictures with a movable dividing line, as HTML.

    The first picture is visible to the left of the line, and the second one to the right. The line
    is a range input of the browser, so mouse, touch and arrow keys move it.

    Args:
        labels: names of both pictures.
        pictures: both pictures; the second one is resized to the first one's size.

    Returns:
        The HTML; "" if a picture is missing.
    """
    readable_pictures = [picture for picture in pictures if picture is not None]
    if len(readable_pictures) < 2:
        return ""
    left = resize_to_fit(readable_pictures[0], MIN_SLIDER_SIDE, MAX_SIDE)
    right = readable_pictures[1].resize(left.size, Image.Resampling.LANCZOS)
    left_label = escape(labels[0])
    right_label = escape(labels[1])
    return (
        f'<figure class="pair"><div><img src="{data_uri(left)}" alt="{left_label}">'
        f'<img class="over" src="{data_uri(right)}" alt="{right_label}">'
        '<input type="range" min="0" max="100" value="50"'
        f' aria-label="{left_label} | {right_label}"></div>'
        f"<figcaption><span>A {left_label}</span><span>B {right_label}</span></figcaption></figure>"
    )


# commands to copy

TRAIN = (
    "python train_dreambooth_bilora.py --method {method}"
    " --instance_data_dir PICTURES --instance_prompt 'a photo of TOK'"
    " --validation_prompt 'a photo of TOK on a beach' --output_dir {root}/{method}"
)
TRAIN_BOTH = "\n".join(TRAIN.replace("{method}", method) for method in (CONTROL, OURS))
# Key -> (explanation, command with {root}), for a viewer without runs
COMMANDS = {
    "demo": (
        "Train LoRA and Bi-LoRA on the demo's small model (“make demo” does this in demo):",
        "python -m bilora_diffusion.demo --output_dir {root}",
    ),
    "train": ("Or train both on your own pictures:", TRAIN_BOTH),
    "images": ("Train both with validation images:", TRAIN_BOTH),
}
# Command of ``eval`` -> explanation; the paths of runs are added to these commands.
EVALUATIONS = {
    "clip_scores": (
        "Sample images with each run and score them (for a quick try, add --max_prompts 6 --seeds"
        " 0):"
    ),
    "landscape": "Measure how flat the loss is around the weights of runs:",
    "dynamics": "Plot how the adapters changed in runs with --log_dynamics:",
    "generalization": "Plot the training and held-out loss of runs that measured both:",
    "text_scores": "Compare text runs by the metrics in their logs:",
}


def empty_notice(catalog: Catalog, title: str, *names: str) -> str:
    """Return a notice that a tab has nothing to show yet, with commands to copy, as HTML.

    Args:
        catalog: folders of the viewer.
        title: heading.
        names: keys of `COMMANDS` and `EVALUATIONS`.
    """
    rows = ""
    for name in names:
        if name in EVALUATIONS:
            purpose = EVALUATIONS[name]
            command = evaluation_command(catalog, name)
        else:
            purpose, command = COMMANDS[name]
            root = catalog.command_path()
            if root == ".":
                root = "demo"
            command = command.format(root=shlex.quote(root))
        rows += (
            f'<li>{escape(purpose)}<div class="command"><code>{escape(command)}</code>'
            '<button type="button" data-copy>Copy</button></div></li>'
        )
    return (
        f'<section class="empty"><h2>{escape(title)}</h2><ol>{rows}</ol>'
        "<p>The output of these commands appears here automatically.</p></section>"
    )


def evaluation_command(catalog: Catalog, name: str) -> str:
    """Return a command of ``eval`` with the paths of up to two example runs.

    Without such runs, the paths are those of the folders lora and bilora below the root.
    """
    runs = example_runs(catalog, name)
    paths = [catalog.command_path(run.path) for run in runs]
    if not paths:
        paths = [catalog.command_path("lora"), catalog.command_path("bilora")]
    heldout_set = heldout_set_of_miniature(runs)
    if name == "clip_scores" and heldout_set is not None:
        return scoring_command(paths, heldout_set)
    command = f"python -m eval.{name} {shlex.join(paths)}"
    if name == "text_scores":
        command += " --benchmarks heldout"
    return command


def heldout_set_of_miniature(runs: Sequence[RunItem]) -> str | None:
    """Return the held-out set of a miniature that all runs use; None if there is no such set."""
    heldout_sets = [name for name in mini.FOLDERS if name.endswith(mini.HELDOUT_SUFFIX)]
    names = set()
    for run in runs:
        config = run.record["config"]
        is_miniature = str(config.get("pretrained_model_name_or_path")) in mini.PIPELINES
        names.add(str(config.get("validation_dataset")) if is_miniature else None)
    name = names.pop() if len(names) == 1 else None
    return name if name in heldout_sets else None


def example_runs(catalog: Catalog, name: str) -> Sequence[RunItem]:
    """Choose up to two example runs for a command of ``eval``.

    "text_scores" takes text runs, "dynamics" runs with --log_dynamics, and "generalization" all
    runs; the other commands take image runs.
    """
    runs = catalog.scan.runs
    if name == "dynamics":
        runs = [run for run in runs if run.record["config"].get("log_dynamics")]
    elif name != "generalization":
        runs = [run for run in runs if run.is_text == (name == "text_scores")]
    return choose_pair(runs)
