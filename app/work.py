"""Drawing that a browser asks for: one piece of work at a time, shown as it goes on, and ended by
whoever asked for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from bilora_diffusion.errors import TrainingError, UserError

from . import parts
from .catalog import Catalog
from .drawing import Pipelines
from .parts import QUIET


class Stopped(Exception):
    """Work was stopped by whoever asked for it."""


class Work:
    """The pipeline that all parts of the page draw with, and each browser's current work.

    Args:
        device: such as "cuda:1"; None for the best.
    """

    def __init__(self, catalog: Catalog, page: gr.Blocks, device: str | None) -> None:
        self.catalog, self.models = catalog, Pipelines(device)
        self.numbers, self.current = itertools.count(1), dict[str | None, int]()
        page.unload(self.stop)

    def events(
        self,
        name: str,
        draw: Callable[..., Iterator[Any]],
        prompt: gr.Textbox,
        asked: Sequence[Any],
        outputs: Sequence[Any],
    ) -> None:
        """Two buttons, and what they and the prompt's Enter key do.

        Args:
            name: begins the buttons' ids.
            draw: called with the work's number and what is ``asked``.
            outputs: of ``draw``; progress is shown on the first.
        """
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id=f"{name}-go")
            cancel = gr.Button("Cancel", elem_id=f"{name}-cancel")
        number = gr.Number(0, visible=False)
        # No `cancels` of Gradio's here: it leaves the next event in error now and then.
        started = gr.on([go.click, prompt.submit], self.begin, [], number, queue=False, **QUIET)
        started.then(
            draw,
            [number, *asked],
            [*outputs],
            show_progress="minimal",
            show_progress_on=outputs[0],
            trigger_mode="multiple",
            concurrency_id="drawing",
            concurrency_limit=1,
            api_visibility="private",
        )
        cancel.click(self.stop, [], [], queue=False, **QUIET)

    def begin(self, request: gr.Request) -> int:
        """A number for new work, which ends this browser's earlier work."""
        self.current[request.session_hash] = number = next(self.numbers)
        return number

    def stop(self, request: gr.Request) -> None:
        """End what this browser asked for, before its next step."""
        self.current.pop(request.session_hash, None)

    def check(self, number: int, request: gr.Request) -> None:
        """Raise ``Stopped`` unless this is still the browser's current work."""
        if self.current.get(request.session_hash) != number:
            raise Stopped

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Context whose errors the page shows in one sentence."""
        try:
            yield
        except (UserError, TrainingError) as error:
            text = escape(parts.plain(error, self.catalog))
            raise gr.Error(text, print_exception=False) from error


def message(text: str) -> str:
    """What became of the work, as HTML."""
    return f'<p class="quiet">{escape(text)}</p>'
