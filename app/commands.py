"""Commands to copy, with the paths of what is there: what an empty tab says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape

from .catalog import Catalog
from .runs import RunItem, pair


def block(text: str) -> str:
    """A command with a button that copies it."""
    return (
        f'<div class="command"><code>{escape(text)}</code>'
        '<button type="button" data-copy>Copy</button></div>'
    )


def empty(title: str, *steps: tuple[str, str]) -> str:
    """A notice that nothing is there yet: what to do, and the command that does it."""
    rows = "".join(f"<li>{escape(what)}{block(command)}</li>" for what, command in steps)
    return (
        f'<section class="empty"><h2>{escape(title)}</h2><ol>{rows}</ol>'
        "<p>What they leave appears here by itself.</p></section>"
    )


def demo(catalog: Catalog) -> tuple[str, str]:
    """Training both on the miniature, into the root."""
    place = catalog.place()
    folder = "demo" if place == "." else place
    command = f"python -m examples.demo --output_dir {shlex.quote(folder)}"
    return "Train LoRA and Bi-LoRA on the miniature (make demo does it into demo):", command


def train(catalog: Catalog, *flags: str) -> tuple[str, str]:
    """Training on pictures of one's own."""
    words = ["accelerate", "launch", "train_dreambooth_bilora.py", "--method", "bilora"]
    words += ["--instance_data_dir", "PICTURES", "--instance_prompt", "a photo of TOK"]
    words += ["--output_dir", catalog.place("bilora"), *flags]
    return "Or train on pictures of your own:", shlex.join(words)


def measure(catalog: Catalog, module: str, what: str, *flags: str) -> tuple[str, str]:
    """A command of ``eval`` on the runs that are there.

    Args:
        module: of ``eval``.
        what: it does.
    """
    runs = [catalog.place(run.path) for run in measurable(catalog, module)]
    names = runs or [catalog.place("lora"), catalog.place("bilora")]
    return what, shlex.join(["python", "-m", f"eval.{module}", *names, *flags])


def measurable(catalog: Catalog, module: str) -> Sequence[RunItem]:
    """The two runs that a command is shown with: of text for text_scores, else of images."""
    runs = catalog.runs()
    if module in ("clip_scores", "landscape", "text_scores"):
        runs = [run for run in runs if run.is_text == (module == "text_scores")]
    if module == "dynamics":
        runs = [run for run in runs if run.record["config"].get("log_dynamics")]
    return pair(runs)
