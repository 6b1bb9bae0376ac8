"""Parts of all tabs: pictures and cards as HTML, the notice of an empty tab, quiet events.

Pictures go into the page as data, so that no route has to serve files.
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

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import is_file
from bilora_diffusion.image.image_files import DECODE_ERRORS

from .catalog import Catalog
from .runs import CONTROL, OURS, RunItem, pair

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Properties of events that fill the page without anyone waiting for them."""
SMALLEST, LARGEST, SLIDER_SMALLEST = 256, 768, 384  # sides in pixels with which a picture is shown
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of pictures; for others Pillow starts programs, such as an interpreter of PostScript."""
MOST_PIXELS = 2**26
"""A small file may hold any number of equal ones, and all must fit into memory."""
Update = dict[Any, Any]
"""Widget -> what an event makes of it."""


def html(elem_id: str | None = None, **options: Any) -> gr.HTML:
    """A place for HTML with none of Gradio's own style."""
    return gr.HTML(elem_id=elem_id, apply_default_css=False, **options)


def notice(text: str) -> Any:
    """HTML that takes no place while it is empty."""
    return gr.update(value=text, visible=bool(text))


def warn(text: str) -> None:
    """A notice over the page, which Gradio would take for HTML."""
    gr.Warning(escape(text))


# pictures


def read(path: Path, mode: str = "RGB") -> Image.Image | None:
    """A picture; None when it is not there, can't be read, or has more than ``MOST_PIXELS``."""
    try:
        if not is_file(path):  # a pipe would keep everyone waiting
            return None
        with Image.open(path, formats=FORMATS) as picture:
            return picture.convert(mode) if math.prod(picture.size) <= MOST_PIXELS else None
    except DECODE_ERRORS:
        return None


def fitted(picture: Image.Image, smallest: int = SMALLEST) -> Image.Image:
    """The picture with its longer side between ``smallest`` and ``LARGEST``, by Lanczos."""
    side = max(picture.size)
    new = min(max(side, smallest), LARGEST)
    width, height = (max(1, round(n * new / side)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def data_uri(picture: Image.Image) -> str:
    """The picture, fitted, as a ``data:`` address."""
    buffer = io.BytesIO()
    fitted(picture).save(buffer, "WEBP", quality=92, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def address(path: Path) -> str | None:
    """A picture's file as a ``data:`` address; None when it is not there or can't be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _address(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _address(path: Path, changed: int, size: int) -> str | None:
    picture = read(path)
    return data_uri(picture) if picture else None


def address_below(catalog: Catalog, path: str) -> str | None:
    """:func:`address` of a picture below the root; None where the path leads out of it."""
    with contextlib.suppress(UserError):
        return address(catalog.resolve(path))


def image(address: str | None, label: str, missing: str = "") -> str:
    """A picture that a click or the Enter key enlarges, as HTML.

    Args:
        address: None for a place that says what is ``missing``.
    """
    if address is None:
        return f'<div class="absent">{escape(missing)}</div>'
    label = escape(label)
    return f'<img src="{address}" alt="{label}" class="zoom" tabindex="0" role="button">'


def card(
    title: str, address: str | None, role: str = "", missing: str = "", facts: str = ""
) -> str:
    """A picture under its name, as HTML.

    Args:
        role: "A" or "B" for one of a pair.
        facts: HTML that stands below.
    """
    mark = f'<span class="role">{role}</span>' if role else ""
    return (
        f'<figure class="card"><div class="name">{mark}{escape(title)}</div>'
        f"{image(address, title, missing)}{facts}</figure>"
    )


def slider(labels: Sequence[str], pictures: Sequence[Image.Image | None]) -> str:
    """Two pictures in one place, of which a handle shows one to its left and the other to its
    right, as HTML, brought to the size of the first; "" without both.

    The handle is the browser's own range input, so that mouse, finger and arrow keys move it.
    """
    both = [picture for picture in pictures if picture is not None]
    if len(both) < 2:
        return ""
    first = fitted(both[0], SLIDER_SMALLEST)
    second = both[1].resize(first.size, Image.Resampling.LANCZOS)
    under, over = data_uri(first), data_uri(second)
    left, right = (escape(label) for label in labels)
    return (
        f'<figure class="pair"><div><img src="{under}" alt="{left}">'
        f'<img class="over" src="{over}" alt="{right}">'
        f'<input type="range" min="0" max="100" value="50" aria-label="{left} | {right}"></div>'
        f"<figcaption><span>A {left}</span><span>B {right}</span></figcaption></figure>"
    )


# commands to copy, with the paths of what is there

TRAIN = (
    "python train_dreambooth_bilora.py --method {method}"
    " --instance_data_dir PICTURES --instance_prompt 'a photo of TOK'"
    " --validation_prompt 'a photo of TOK on a beach' --output_dir {root}/{method}"
)
BOTH = "\n".join(TRAIN.replace("{method}", method) for method in (CONTROL, OURS))
COMMANDS = {
    "demo": (
        "Train LoRA and Bi-LoRA on the miniature (make demo does it into demo):",
        "python -m bilora_diffusion.demo --output_dir {root}",
    ),
    "train": ("Or train both on pictures of your own:", BOTH),
    "images": ("Let both make images while they train:", BOTH),
}
"""Advice where nothing is yet, and its command, to be filled with the root."""
EVALUATIONS = {
    "vote": "A vote needs images of two runs from the same prompts and seeds:",
    "clip_scores": (
        "Draw images with each run and score them (a try: add --max_prompts 6 --seeds 0):"
    ),
    "landscape": "How flat the minima are that runs end in:",
    "dynamics": "How the adapters moved, of runs with --log_dynamics:",
    "generalization": "Training and held-out loss over time, of runs that measured it:",
    "text_scores": "Scores of text runs by what they recorded:",
}
"""The same of commands of ``eval``, which are given runs."""


def empty(catalog: Catalog, title: str, *names: str) -> str:
    """A notice that nothing is there yet, with some of these commands."""
    rows = ""
    for name in names:
        if name in EVALUATIONS:
            runs = [catalog.place(run.path) for run in measurable(catalog, name)]
            place = shlex.join(runs or [catalog.place("lora"), catalog.place("bilora")])
            purpose, tool = EVALUATIONS[name], "clip_scores" if name == "vote" else name
            options = " --benchmarks heldout" if name == "text_scores" else ""
            command = f"python -m eval.{tool} {place}{options}"
        else:
            purpose, command = COMMANDS[name]
            place = "demo" if catalog.place() == "." else catalog.place()
            command = command.format(root=shlex.quote(place))
        rows += (
            f'<li>{escape(purpose)}<div class="command"><code>{escape(command)}</code>'
            '<button type="button" data-copy>Copy</button></div></li>'
        )
    return (
        f'<section class="empty"><h2>{escape(title)}</h2><ol>{rows}</ol>'
        "<p>What they leave appears here by itself.</p></section>"
    )


def measurable(catalog: Catalog, name: str) -> Sequence[RunItem]:
    """The two runs that a command is shown with: of text for text_scores, else of images."""
    runs = catalog.scan.runs
    if name == "dynamics":
        runs = [run for run in runs if run.record["config"].get("log_dynamics")]
    elif name != "generalization":
        runs = [run for run in runs if run.is_text == (name == "text_scores")]
    return pair(runs)
