"""The tab "Training": curves and state of the chosen runs, live while one of them is going on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from bilora_diffusion.run.durations import duration
from bilora_diffusion.run.folder import FOLDS_CURVES
from bilora_diffusion.run.record import METRICS, RUN, read_folds, read_run

from . import parts
from .catalog import Catalog
from .charts import COLORS, Failed, Shown, colors_of, draw
from .parts import QUIET, Update
from .runs import RunItem, ordered, short
from .training_data import Reader, memory, progress, radius, series

TICK_SECONDS = 3.0
CHOSEN = 4
"""Runs that are shown before any is chosen."""
WINDOW = 25


def cards(runs: Sequence[Shown | Failed]) -> str:
    """The state of each run, as HTML; also the legend of the plots."""
    items = ""
    for run in runs:
        failed = isinstance(run, Failed)
        status = escape("failed" if failed else run.state.status)
        lines = [run.reason] if failed else _lines(run)
        text = "".join(f'<div class="line">{escape(line)}</div>' for line in lines)
        items += (
            f'<li class="{status} of-{run.color}"><span class="state">{status}</span>'
            f"<b>{escape(run.name)}</b>{text}</li>"
        )
    return f"<ul>{items}</ul>"


def _lines(run: Shown) -> list[str]:
    state, config = run.state, run.run.record["config"]
    steps = f"{state.steps} of {state.total} steps" if state.total else f"{state.steps} steps"
    facts = [steps, duration(state.wall_seconds)]
    if state.left_seconds:
        facts.append(f"about {duration(state.left_seconds)} left")
    if state.peak_memory_bytes:
        facts.append(f"peak {memory(state.peak_memory_bytes)}")
    about = [run.run.path]
    if series(run.rows, "rho") or radius(run.run.record, state.steps):
        norm = config.get("rho_norm", "scaled")
        about.append(f"ρ {short(config['rho'])}" + ("" if norm == "scaled" else f", {norm} norm"))
    if run.folds.get("chosen_steps"):
        about.append(f"{run.folds['chosen_steps']} steps chosen by {len(run.folds['folds'])} folds")
    lines = [" · ".join(about), " · ".join(facts), state.reason]
    return [line for line in lines if line]


class Tab:
    """The widgets, and what happens when they are used."""

    def __init__(self, catalog: Catalog, signs: Sequence[Any]) -> None:
        self.catalog, self.reader = catalog, Reader()
        self.notice = parts.html("training-notice", visible=False)
        with gr.Column(visible=False) as self.body:
            with gr.Row():
                many: dict[str, Any] = {"multiselect": True, "max_choices": COLORS, "scale": 3}
                self.runs = gr.Dropdown([], label="Runs", elem_id="training-runs", **many)
                mean: dict[str, Any] = {"label": "Running mean over steps", "min_width": 200}
                self.window = gr.Slider(1, 200, WINDOW, step=1, elem_id="training-window", **mean)
            self.cards = parts.html("training-cards")
            self.plots = parts.html("training-plots")
        self.drawn = gr.State(None)
        timer = gr.Timer(TICK_SECONDS)
        chosen, shown = [self.runs, self.window], [self.cards, self.drawn, self.plots]
        gr.on(signs, self._load, [self.runs], [self.notice, self.body, self.runs], **QUIET)
        gr.on([self.runs.change, self.window.release], self._draw, chosen, shown, **QUIET)
        timer.tick(self._tick, [*chosen, self.drawn], shown, **QUIET)

    def _load(self, chosen: Sequence[str] | None) -> Update:
        runs = sorted(
            self.catalog.now.runs, key=lambda run: str(run.record.get("started_at")), reverse=True
        )
        if not runs:
            what = parts.demo(self.catalog), parts.train(self.catalog)
            return {self.notice: parts.shown(parts.empty("No runs yet", *what))}
        there = {run.path for run in runs}
        going = [run.path for run in runs if run.status == "running"]
        latest = sorted(runs, key=lambda run: run.status != "running")[:CHOSEN]
        first = [run.path for run in ordered(latest)]
        kept = [path for path in chosen or [] if path in there]
        new = [path for path in going if path not in kept][: COLORS - len(kept)]
        choices = [(run.name, run.path) for run in runs]
        return {
            self.notice: parts.shown(""),
            self.body: gr.update(visible=True),
            self.runs: gr.update(choices=choices, value=[*kept, *new] if kept else first),
        }

    def _draw(self, paths: Sequence[str] | None, window: int) -> Update:
        runs = self._read(paths or [])
        good = [run for run in runs if isinstance(run, Shown)]
        return {
            self.cards: cards(runs),
            self.drawn: self._seen(runs, window),
            self.plots: draw(good, int(window)),
        }

    def _tick(self, paths: Sequence[str] | None, window: int, drawn: Any) -> Update:
        if self._seen(self._read(paths or []), window) == drawn:
            return {self.cards: gr.skip()}
        return self._draw(paths, window)

    def _read(self, paths: Sequence[str]) -> list[Shown | Failed]:
        runs = {run.path: run for run in self.catalog.now.runs}
        colors = colors_of(paths, list(runs))
        return [
            self._one(runs[path], color) if path in runs else Failed(path, color, "it has gone")
            for path, color in colors.items()
        ]

    def _one(self, run: RunItem, color: int) -> Shown | Failed:
        path = run.path
        try:
            folder = self.catalog.resolve(path)
            files = [self.catalog.resolve(f"{path}/{name}") for name in (RUN, METRICS)]
            record, rows = read_run(folder), self.reader.read(folder)
            written = max(file.stat().st_mtime for file in files if file.exists())
            state = progress(record, rows, written)
            folds = read_folds(self.catalog.resolve(f"{path}/{FOLDS_CURVES}")) or {}
            return Shown(replace(run, record=record), color, rows, state, folds)
        except Exception as error:  # whatever is in one folder, the other runs stay
            return Failed(run.name, color, parts.plain(error, self.catalog))

    def _seen(self, runs: Sequence[Shown | Failed], window: int) -> tuple[Any, ...]:
        """Changes whenever there is something new to show."""
        keys = [r if isinstance(r, Failed) else (r.name, len(r.rows), r.state) for r in runs]
        return window, *keys
