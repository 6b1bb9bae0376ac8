"""The tab "Training": curves and state of the chosen runs, live while one of them is going on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import bytes_for_people, duration
from bilora_diffusion.run.folder import FIT_RECORD
from bilora_diffusion.run.record import METRICS, RUN, read_metrics, read_run, read_search
from bilora_diffusion.train.search.halving import BUDGET

from . import parts
from .catalog import Catalog
from .parts import QUIET, Update
from .runs import Progress, RunItem, ordered, progress, short
from .training_data import (
    COLORS,
    TITLES,
    WITH_LEGEND,
    Line,
    TrainingRun,
    ceiling,
    charts,
    differing_settings,
    legend,
    radii,
    table,
)

TICK_SECONDS = 3.0
CHOSEN = 4  # runs that are shown before any is chosen
WINDOW = 25


def cards(runs: Sequence[TrainingRun]) -> tuple[str, str]:
    """The state of each run, as HTML, and the legend of the plots."""
    items = names = ""
    for run in runs:
        name, status = escape(run.run.name), escape(run.state.status)
        text = "".join(f'<div class="line">{escape(line)}</div>' for line in _lines(run))
        color = f'style="--line: {COLORS[run.color]}"'
        items += (
            f'<li class="{status}" {color}><span class="state">{status}</span>'
            f"<b>{name}</b>{text}</li>"
        )
        names += f"<span {color}>{name}</span>"
    return f"<ul>{items}</ul>", names


def _lines(run: TrainingRun) -> list[str]:
    state, config = run.state, run.run.record["config"]
    if not run.is_readable:
        return [state.reason]
    steps = f"{state.steps} of {state.total} steps" if state.total else f"{state.steps} steps"
    facts = [steps, duration(state.wall_seconds)] if state.steps or not run.fit else []
    if state.left_seconds:
        facts.append(f"about {duration(state.left_seconds)} left")
    if state.peak_memory_bytes:
        facts.append(f"peak {bytes_for_people(state.peak_memory_bytes)}")
    about = []
    if radii([run]):
        norm = config.get("rho_norm", "scaled")
        about.append(f"ρ {short(config['rho'])}" + ("" if norm == "scaled" else f", {norm} norm"))
    if run.fit:
        choice, budget = run.fit["choice"], config.get("fit_budget") or BUDGET * (state.total or 0)
        title = f"{choice['title']}, {choice['steps']} steps" if choice else "still searching"
        limit = f" of at most {budget:,}" if budget and not choice else ""
        count = len(run.fit["runs"])
        about.append(f"--fit: {title} ({count} runs, {run.fit['spent']:,}{limit} steps)")
    lines = [" · ".join(about), " · ".join(facts), state.reason]
    return [line for line in lines if line]


def settings(runs: Sequence[TrainingRun]) -> str:
    """The settings that differ between the runs, as HTML; "" where none does."""
    rows = ""
    for name, values in differing_settings(runs).items():
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{escape(run.run.name)}</th>' for run in runs)
    return (
        "<details><summary>Settings that differ</summary>"
        f'<div class="scroll"><table><tr><th></th>{names}</tr>{rows}</table></div></details>'
    )


def look(lines: Sequence[Line], values: Sequence[float]) -> dict[str, Any]:
    """The properties of a plot with these lines; one without a value is hidden."""
    if not values:
        return {"visible": False}
    top, colors = ceiling(values), {line.name: line.color for line in lines if line.points}
    limits = None if top is None else [None, top]
    return {"visible": True, "color_map": colors, "y_lim": limits}


def legend_html(lines: Sequence[Line]) -> str:
    """The legend of a plot; its strokes get their dashes by the same rules as the plot's lines."""
    entries = ""
    for name, color in legend(lines):
        sample = f'<svg width="28" height="8"><path d="M0 4h28" stroke="{color}"/></svg>'
        entries += f"<span>{sample}{escape(name)}</span>"
    return entries


def _plot(name: str) -> gr.LinePlot:
    title, caption = TITLES[name]
    axes: dict[str, Any] = {"x": "step", "y": "value", "color": "run", "colors_in_legend": []}
    place: dict[str, Any] = {"elem_id": f"training-{name}", "min_width": 320, "visible": False}
    return gr.LinePlot(**axes, **place, label=title, caption=caption)


class Tab:
    """The widgets, and what happens when they are used."""

    def __init__(self, catalog: Catalog, changed: Any) -> None:
        self.catalog = catalog
        self.notice = parts.html("training-notice", visible=False)
        with gr.Column(visible=False) as self.body:
            with gr.Row():
                self.runs = gr.Dropdown(
                    [],
                    label="Runs",
                    elem_id="training-runs",
                    multiselect=True,
                    max_choices=len(COLORS),
                    scale=3,
                    min_width=320,
                )
                window = gr.Slider(
                    1,
                    200,
                    WINDOW,
                    step=1,
                    elem_id="training-window",
                    label="Running mean over steps",
                    min_width=200,
                )
            self.cards = parts.html("training-cards")
            self.settings = parts.html("training-settings")
            self.legend = parts.html("training-legend")
            self.plots: dict[str, gr.LinePlot] = {}
            self.legends: dict[str, gr.HTML] = {}
            with gr.Row(elem_id="training-plots"):
                for name in TITLES:
                    with gr.Column(min_width=320):
                        self.plots[name] = _plot(name)
                        if name in WITH_LEGEND:
                            place = f"training-{name}-legend"
                            self.legends[name] = parts.html(place, visible=False)
        self.last_state, self.looks = gr.State(None), gr.State([])
        chosen, outputs = [self.runs, window], [self.cards, self.legend]
        outputs += [self.settings, self.last_state, self.looks]
        outputs += [*self.plots.values(), *self.legends.values()]
        changed(self._load, [self.runs], [self.notice, self.body, self.runs], **QUIET)
        gr.on([self.runs.change, window.release], self._draw, chosen, outputs, **QUIET)
        # After the values: a plot that gets both at once keeps the old values in the new colours.
        plots = [*self.plots.values()]
        self.looks.change(
            lambda looks: [gr.update(**look) for look in looks], self.looks, plots, **QUIET
        )
        gr.Timer(TICK_SECONDS).tick(self._draw, [*chosen, self.last_state], outputs, **QUIET)

    def _load(self, chosen: Sequence[str] | None) -> Update:
        runs = sorted(
            self.catalog.scan.runs, key=lambda run: str(run.record.get("started_at")), reverse=True
        )
        if not runs:
            text = parts.empty(self.catalog, "No runs yet", "demo", "train")
            return {self.notice: parts.notice(text)}
        paths = {run.path for run in runs}
        selection = [path for path in chosen or [] if path in paths]
        if selection:  # runs that are going on join those that are still there
            running = [run.path for run in runs if run.status == "running"]
            new = [path for path in running if path not in selection]
            selection += new[: len(COLORS) - len(selection)]
        else:
            latest = sorted(runs, key=lambda run: run.status != "running")[:CHOSEN]
            selection = [run.path for run in ordered(latest)]
        # What is the same is not sent: someone may be choosing just now.
        value: dict[str, Any] = {} if selection == chosen else {"value": selection}
        return {
            self.notice: parts.notice(""),
            self.body: gr.update(visible=True),
            self.runs: gr.update(choices=[(run.name, run.path) for run in runs], **value),
        }

    def _draw(self, paths: Sequence[str] | None, window: int, last_state: Any = None) -> Update:
        """The chosen runs as they are now; nothing where all is as in the last state."""
        runs = []
        for color, path in enumerate((paths or [])[: len(COLORS)]):
            runs.append(self._read(path, color))
        fits = [(run.fit.get("spent"), len(run.fit.get("runs", ()))) for run in runs]
        state = window, fits, [(run.run.name, len(run.rows), run.state) for run in runs]
        if state == last_state:
            return {self.cards: gr.skip()}
        looks: list[dict[str, Any]] = []
        update: Update = dict(zip((self.cards, self.legend), cards(runs), strict=True))
        update |= {self.settings: settings(runs), self.last_state: state, self.looks: looks}
        for name, lines in charts([run for run in runs if run.is_readable], int(window)).items():
            frame = table(lines)
            looks.append(look(lines, frame["value"].tolist()))
            update[self.plots[name]] = gr.skip() if frame.empty else frame
            if name in self.legends:
                update[self.legends[name]] = parts.notice(legend_html(lines))
        return update

    def _read(self, path: str, color: int) -> TrainingRun:
        missing_run = RunItem(path, path, {"config": {}}, None)
        run = next((run for run in self.catalog.scan.runs if run.path == path), missing_run)
        try:
            folder = self.catalog.resolve(path)
            record_file = self.catalog.resolve(f"{path}/{RUN}")
            metrics_file = self.catalog.resolve(f"{path}/{METRICS}")
            record, rows = read_run(folder), []
            last_written = record_file.stat().st_mtime
            if metrics_file.exists():
                rows = self.catalog.cached(metrics_file, partial(read_metrics, folder))
                last_written = max(last_written, metrics_file.stat().st_mtime)
            state = progress(record, rows, last_written)
            try:
                fit = read_search(self.catalog.resolve(f"{path}/{FIT_RECORD}")) or {}
            except UserError as error:
                # The run itself is whole: only the curves of its search are missing.
                fit, state = {}, replace(state, reason=state.reason or self.catalog.plain(error))
            return TrainingRun(replace(run, record=record), color, rows, state, fit)
        except Exception as error:  # whatever is in one folder, the other runs stay
            reason = self.catalog.plain(error)
            state = Progress("failed", reason, 0, None, 0.0, None, 0)
            return TrainingRun(run, color, [], state, is_readable=False)
