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

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import is_file
from bilora_diffusion.image.image_files import DECODE_ERRORS
from bilora_diffusion.run.console import scoring_command

from .catalog import Catalog
from .runs import CONTROL, OURS, RunItem, pair

# Properties of events that fill the page in the background.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Bounds of the longer side with which a picture is shown, in pixels.
MIN_SIDE, MAX_SIDE = 256, 768
# The same of a slider; its upper bound is `MAX_SIDE` too.
SLIDER_SMALLEST = 384
# Formats of pictures; for others Pillow starts programs, such as an interpreter of PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Largest picture: a small file may hold any number of equal pixels, which must fit into memory.
MAX_PIXELS = 2**26
# Widget -> its new value or properties.
Update = dict[Any, Any]


def html(elem_id: str | None = None, **options: Any) -> gr.HTML:
    """A widget for HTML without Gradio's own style."""
    return gr.HTML(elem_id=elem_id, apply_default_css=False, **options)


def notice(text: str) -> Any:
    """An update of HTML that is hidden while it is empty."""
    return gr.update(value=text, visible=bool(text))


def warn(text: str) -> None:
    """Show a notice over the page."""
    gr.Warning(escape(text))  # Gradio takes it for HTML


# pictures


def read(path: Path, mode: str = "RGB") -> Image.Image | None:
    """Read a picture; None if it is not there, can't be read, or has more than `MAX_PIXELS`."""
    try:
        if not is_file(path):  # a pipe would keep its reader waiting
            return None
        with Image.open(path, formats=FORMATS) as picture:
            if math.prod(picture.size) > MAX_PIXELS:
                return None
            return picture.convert(mode)
    except DECODE_ERRORS:
        return None


def fitted(picture: Image.Image, smallest: int = MIN_SIDE) -> Image.Image:
    """Resize a picture by Lanczos, to a longer side between `smallest` and `MAX_SIDE`."""
    side = max(picture.size)
    new_side = min(max(side, smallest), MAX_SIDE)
    width = max(1, round(picture.width * new_side / side))
    height = max(1, round(picture.height * new_side / side))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def data_uri(picture: Image.Image) -> str:
    """The fitted picture as a ``data:`` address."""
    buffer = io.BytesIO()
    fitted(picture).save(buffer, "WEBP", quality=92, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def address(path: Path) -> str | None:
    """A picture's file as a ``data:`` address; None if it is not there or can't be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _cached_address(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _cached_address(path: Path, changed_at: int, size: int) -> str | None:
    """`address`; time and size are part of the cache's key, so that a changed file is read."""
    picture = read(path)
    if picture is None:
        return None
    return data_uri(picture)


def address_below(catalog: Catalog, path: str) -> str | None:
    """`address` of a picture below the root; None if the path leads out of it."""
    with contextlib.suppress(UserError):
        return address(catalog.resolve(path))


def image(address: str | None, label: str, missing: str = "") -> str:
    """A picture as HTML, which a click or the Enter key enlarges.

    Args:
        address: address of the picture; None for the text `missing` in its place.
        label: alternative text.
        missing: text in place of a picture that is not there.
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
        title: name of the picture.
        address: as `image` takes it.
        role: "A" or "B" for one of a pair.
        missing: as `image` takes it.
        facts: HTML below the picture.
    """
    mark = f'<span class="role">{role}</span>' if role else ""
    return (
        f'<figure class="card"><div class="name">{mark}{escape(title)}</div>'
        f"{image(address, title, missing)}{facts}</figure>"
    )


def slider(labels: Sequence[str], pictures: Sequence[Image.Image | None]) -> str:
    """Two pictures on top of each other with a handle between left and right, as HTML.

    Left of the handle the first picture is seen, right of it the second one. The handle is the
    browser's own range input, so that mouse, finger and arrow keys move it.

    Args:
        labels: names of both.
        pictures: both; the second one is brought to the size of the first.

    Returns:
        The HTML; "" if a picture is missing.
    """
    readable = [picture for picture in pictures if picture is not None]
    if len(readable) < 2:
        return ""
    left = fitted(readable[0], SLIDER_SMALLEST)
    right = readable[1].resize(left.size, Image.Resampling.LANCZOS)
    left_label = escape(labels[0])
    right_label = escape(labels[1])
    return (
        f'<figure class="pair"><div><img src="{data_uri(left)}" alt="{left_label}">'
        f'<img class="over" src="{data_uri(right)}" alt="{right_label}">'
        '<input type="range" min="0" max="100" value="50"'
        f' aria-label="{left_label} | {right_label}"></div>'
        f"<figcaption><span>A {left_label}</span><span>B {right_label}</span></figcaption></figure>"
    )


# commands to copy, with the paths of the runs that are there

TRAIN = (
    "python train_dreambooth_bilora.py --method {method}"
    " --instance_data_dir PICTURES --instance_prompt 'a photo of TOK'"
    " --validation_prompt 'a photo of TOK on a beach' --output_dir {root}/{method}"
)
BOTH = "\n".join(TRAIN.replace("{method}", method) for method in (CONTROL, OURS))
# Purpose and command of each way to fill an empty viewer; the command takes the root.
COMMANDS = {
    "demo": (
        "Train LoRA and Bi-LoRA on the miniature (make demo does it into demo):",
        "python -m bilora_diffusion.demo --output_dir {root}",
    ),
    "train": ("Or train both on pictures of your own:", BOTH),
    "images": ("Let both make images while they train:", BOTH),
}
# Purposes of commands of ``eval``, which take runs.
EVALUATIONS = {
    "vote": "A vote needs images of two runs from the same prompts and seeds:",
    "clip_scores": (
        "Sample images with each run and score them (for a quick try add --max_prompts 6 --seeds"
        " 0):"
    ),
    "landscape": "Measure how flat the minima are that runs end in:",
    "dynamics": "Show how the adapters moved in runs with --log_dynamics:",
    "generalization": "Compare training and held-out loss over time, of runs that measured both:",
    "text_scores": "Score text runs by what they recorded:",
}


def empty(catalog: Catalog, title: str, *names: str) -> str:
    """A notice that nothing is there yet, with commands to copy, as HTML.

    Args:
        catalog: folders of the viewer.
        title: heading.
        names: keys of `COMMANDS` and `EVALUATIONS`.
    """
    rows = ""
    for name in names:
        if name in EVALUATIONS:
            purpose = EVALUATIONS[name]
            runs = measurable(catalog, name)
            places = [catalog.place(run.path) for run in runs]
            if not places:
                places = [catalog.place("lora"), catalog.place("bilora")]
            tool = "clip_scores" if name == "vote" else name
            command = f"python -m eval.{tool} {shlex.join(places)}"
            if name == "text_scores":
                command += " --benchmarks heldout"
            heldout = heldout_of_miniature(runs)
            if tool == "clip_scores" and heldout is not None:
                command = scoring_command(places, heldout)
        else:
            purpose, command = COMMANDS[name]
            root = catalog.place()
            if root == ".":
                root = "demo"
            command = command.format(root=shlex.quote(root))
        rows += (
            f'<li>{escape(purpose)}<div class="command"><code>{escape(command)}</code>'
            '<button type="button" data-copy>Copy</button></div></li>'
        )
    return (
        f'<section class="empty"><h2>{escape(title)}</h2><ol>{rows}</ol>'
        "<p>What they leave appears here by itself.</p></section>"
    )


def heldout_of_miniature(runs: Sequence[RunItem]) -> str | None:
    """Name of the held-out icons that all runs of a miniature share, as in the demo, or None."""
    heldout_sets = [name for name in mini.FOLDERS if name.endswith(mini.HELDOUT_SUFFIX)]
    names = set()
    for run in runs:
        config = run.record["config"]
        is_miniature = str(config.get("pretrained_model_name_or_path")) in mini.PIPELINES
        names.add(str(config.get("validation_dataset")) if is_miniature else None)
    name = names.pop() if len(names) == 1 else None
    return name if name in heldout_sets else None


def measurable(catalog: Catalog, name: str) -> Sequence[RunItem]:
    """The two runs that a command of ``eval`` is shown with.

    text_scores takes runs of text, generalization all runs, the others runs of images; dynamics
    needs runs that recorded them.
    """
    runs = catalog.scan.runs
    if name == "dynamics":
        runs = [run for run in runs if run.record["config"].get("log_dynamics")]
    elif name != "generalization":
        runs = [run for run in runs if run.is_text == (name == "text_scores")]
    return pair(runs)
