"""The tab Training: curves and status of the chosen runs, updated while they train."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import bytes_for_people, duration
from bilora_diffusion.run.record import METRICS, RUN, read_metrics, read_run
from eval.subjects import differing_options

from . import parts
from .catalog import Catalog
from .parts import QUIET, Update
from .runs import (
    Progress,
    RunItem,
    choose_pair,
    find_progress,
    sort_newest_first,
    sort_runs,
)
from .training_data import (
    COLORS,
    FROM_ZERO,
    TITLES,
    WITH_LEGEND,
    Line,
    TrainingRun,
    ceiling,
    charts,
    learning_rates,
    legend,
    radius_lines,
    table,
)

# Interval between two updates of the curves
TICK_SECONDS = 3.0
# Number of runs chosen by default
FIRST_RUNS = 4
# Default window of the running mean, in steps
WINDOW = 25
# Settings that always differ between runs, so the table of settings leaves them out
FOLDER_SETTINGS = ("output_dir", "logging_dir")
# Maximum number of characters of a setting's value
SETTING_WIDTH = 60


def cards_html(runs: Sequence[TrainingRun]) -> str:
    """Return a card with the status of each run, as HTML."""
    items = ""
    for run in runs:
        status = escape(run.state.status)
        text = ""
        for line in card_lines(run):
            text += f'<div class="line">{escape(line)}</div>'
        items += (
            f'<li class="{status}" style="--line: {COLORS[run.color]}">'
            f'<span class="state">{status}</span><b>{escape(run.run.name)}</b>{text}</li>'
        )
    return f"<ul>{items}</ul>"


def runs_legend_html(runs: Sequence[TrainingRun]) -> str:
    """Return the names of the runs in their colors, as HTML."""
    names = ""
    for run in runs:
        names += f'<span style="--line: {COLORS[run.color]}">{escape(run.run.name)}</span>'
    return names


def card_lines(run: TrainingRun) -> list[str]:
    """Return the lines of a run's card: radius and learning rate, progress, and the reason."""
    state = run.state
    if not run.is_readable:
        return [state.reason]
    config = run.run.record["config"]
    settings = []
    if radius_lines([run]):
        text = f"ρ {config['rho']:g}"
        norm = config.get("rho_norm", "scaled")
        if norm != "scaled":
            text += f", {norm} norm"
        settings.append(text)
    rates = learning_rates(run)
    if len(rates) == 1:
        settings.append(f"learning rate {rates.pop():g}")
    steps = f"{state.steps} steps"
    if state.total:
        steps = f"{state.steps} of {state.total} steps"
    facts = [steps, duration(state.wall_seconds)]
    if state.left_seconds:
        facts.append(f"about {duration(state.left_seconds)} left")
    if state.peak_memory_bytes:
        facts.append(f"peak {bytes_for_people(state.peak_memory_bytes)}")
    lines = [" · ".join(settings), " · ".join(facts), state.reason]
    return [line for line in lines if line]


def differing_settings(runs: Sequence[TrainingRun]) -> dict[str, list[str]]:
    """Return the settings that differ between runs: name -> each run's value as text."""
    configs = [run.run.record["config"] for run in runs]
    texts_by_name = {}
    for name, values in differing_options(configs).items():
        if name in FOLDER_SETTINGS:
            continue
        texts = []
        for value in values:
            text = "–" if value is None else str(value)
            texts.append(textwrap.shorten(text, SETTING_WIDTH))
        texts_by_name[name] = texts
    return texts_by_name


def settings_html(runs: Sequence[TrainingRun]) -> str:
    """Return a table of the settings that differ between runs, as HTML; "" if there are none."""
    rows = ""
    for name, values in differing_settings(runs).items():
        rows += f'<tr><th scope="row">{escape(name)}</th>'
        for value in values:
            rows += f"<td>{escape(value)}</td>"
        rows += "</tr>"
    if not rows:
        return ""
    names = ""
    for run in runs:
        names += f'<th scope="col">{escape(run.run.name)}</th>'
    return (
        "<details><summary>Settings that differ</summary>"
        f'<div class="scroll"><table><tr><th></th>{names}</tr>{rows}</table></div></details>'
    )


def plot_properties(
    lines: Sequence[Line], values: Sequence[float], from_zero: bool = False
) -> dict[str, Any]:
    """Return the colors and axis limits of a plot; a plot without values is hidden.

    Args:
        lines: lines of the plot.
        values: values of all points.
        from_zero: whether the vertical axis starts at 0.
    """
    if not values:
        return {"visible": False}
    colors = {line.name: line.color for line in lines if line.points}
    top = ceiling(values)
    bottom = 0.0 if from_zero else None
    limits = None if top is None and bottom is None else [bottom, top]
    return {"visible": True, "color_map": colors, "y_lim": limits}


def legend_html(lines: Sequence[Line]) -> str:
    """Return the legend of a plot as HTML; ``style.css`` draws its dashes as in the plot."""
    entries = ""
    for name, color in legend(lines):
        sample = f'<svg width="28" height="8"><path d="M0 4h28" stroke="{color}"/></svg>'
        entries += f"<span>{sample}{escape(name)}</span>"
    return entries


def first_choice(runs: Sequence[RunItem]) -> list[RunItem]:
    """Choose the runs to show first: running ones, then the pair of `choose_pair`, then the newest.

    Args:
        runs: all runs, newest first.
    """
    running = [run for run in runs if run.status == "running"]
    candidates = [*running, *choose_pair(runs), *runs]
    paths = dict.fromkeys(run.path for run in candidates)  # an ordered set
    first_paths = list(paths)[:FIRST_RUNS]
    return sort_runs([run for run in runs if run.path in first_paths])


def _plot(name: str) -> gr.LinePlot:
    """Create the widget of a plot, which is initially hidden."""
    title, caption = TITLES[name]
    return gr.LinePlot(
        x="step",
        y="value",
        color="run",
        colors_in_legend=[],  # the page has its own legend
        label=title,
        caption=caption,
        elem_id=f"training-{name}",
        min_width=320,
        visible=False,
    )


class Tab:
    """The tab Training: its widgets and their events.

    Args:
        catalog: folders of the viewer.
        changed: event after which the list of runs is filled.
    """

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
            # Status, settings and colors of the runs
            self.cards = parts.html("training-cards")
            self.settings = parts.html("training-settings")
            self.legend = parts.html("training-legend")
            # All plots; plots without values are hidden.
            self.plots: dict[str, gr.LinePlot] = {}
            self.legends: dict[str, gr.HTML] = {}
            with gr.Row(elem_id="training-plots"):
                for name in TITLES:
                    with gr.Column(min_width=320):
                        self.plots[name] = _plot(name)
                        if name in WITH_LEGEND:
                            self.legends[name] = parts.html(
                                f"training-{name}-legend", visible=False
                            )
        self.last_state = gr.State(None)
        self.properties = gr.State([])  # return values of `plot_properties`
        inputs = [self.runs, window]
        outputs = [self.cards, self.legend, self.settings, self.last_state, self.properties]
        outputs += [*self.plots.values(), *self.legends.values()]
        changed(self._fill, [self.runs], [self.notice, self.body, self.runs], **QUIET)
        gr.on([self.runs.change, window.release], self._draw, inputs, outputs, **QUIET)
        # Properties and values are set by different events: a plot that gets both in one update
        # would show the old values in the new colors.
        plots = list(self.plots.values())
        self.properties.change(
            lambda properties: [gr.update(**plot) for plot in properties],
            self.properties,
            plots,
            **QUIET,
        )
        gr.Timer(TICK_SECONDS).tick(self._draw, [*inputs, self.last_state], outputs, **QUIET)

    def _fill(self, chosen: Sequence[str] | None) -> Update:
        """Fill the list of runs, and add running ones to the user's choice."""
        runs = sort_newest_first(self.catalog.scan.runs)
        if not runs:
            text = parts.empty_notice(self.catalog, "No runs yet", "demo", "train")
            return {self.notice: parts.notice(text)}
        paths = {run.path for run in runs}
        selection = [path for path in chosen or [] if path in paths]
        if selection:
            # Add runs that have started since the choice.
            for run in runs:
                has_room = len(selection) < len(COLORS)
                if has_room and run.status == "running" and run.path not in selection:
                    selection.append(run.path)
        else:
            selection = [run.path for run in first_choice(runs)]
        properties: dict[str, Any] = {"choices": [(run.name, run.path) for run in runs]}
        # An unchanged selection is not sent, because the user may be changing it at this moment.
        if selection != chosen:
            properties["value"] = selection
        return {
            self.notice: parts.notice(""),
            self.body: gr.update(visible=True),
            self.runs: gr.update(**properties),
        }

    def _draw(self, paths: Sequence[str] | None, window: int, last_state: Any = None) -> Update:
        """Update the cards and plots if the window or the state of the runs has changed."""
        runs = []
        for color, path in enumerate((paths or [])[: len(COLORS)]):
            runs.append(self._read(path, color))
        states: list[Any] = [window]
        for run in runs:
            states.append((run.run.name, len(run.rows), run.state))
        if states == last_state:
            return {self.cards: gr.skip()}
        properties: list[dict[str, Any]] = []
        update: Update = {
            self.cards: cards_html(runs),
            self.legend: runs_legend_html(runs),
            self.settings: settings_html(runs),
            self.last_state: states,
            self.properties: properties,
        }
        readable_runs = [run for run in runs if run.is_readable]
        lines_of_plots = charts(readable_runs, int(window))
        for name in self.plots:
            lines = lines_of_plots[name]
            frame = table(lines)
            from_zero = name in FROM_ZERO
            properties.append(plot_properties(lines, frame["value"].tolist(), from_zero))
            update[self.plots[name]] = gr.skip() if frame.empty else frame
            if name in self.legends:
                update[self.legends[name]] = parts.notice(legend_html(lines))
        return update

    def _read(self, path: str, color: int) -> TrainingRun:
        """Read the current state of a run, or the reason why it is unreadable."""
        run = RunItem(path, path, {"config": {}}, None)  # for a deleted folder
        for item in self.catalog.scan.runs:
            if item.path == path:
                run = item
        try:
            folder = self.catalog.resolve(path)
            record_file = self.catalog.resolve(f"{path}/{RUN}")
            metrics_file = self.catalog.resolve(f"{path}/{METRICS}")
            record = read_run(folder)
            rows = []
            log_error = ""
            last_written = record_file.stat().st_mtime
            if metrics_file.exists():
                last_written = max(last_written, metrics_file.stat().st_mtime)
                try:
                    rows = self.catalog.read_cached(metrics_file, partial(read_metrics, folder))
                except (UserError, OSError) as error:
                    log_error = f"log unreadable: {self.catalog.without_root(error)}"
            state = find_progress(record, rows, last_written)
            if log_error:
                # The run itself may be undamaged, so the status from its record is kept.
                state = replace(state, reason=log_error)
                return TrainingRun(replace(run, record=record), color, [], state, is_readable=False)
            return TrainingRun(replace(run, record=record), color, rows, state)
        except Exception as error:  # any exception, because the other runs must be shown
            reason = self.catalog.without_root(error)
            state = Progress("unreadable", reason, 0, None, 0.0, None, 0)
            return TrainingRun(run, color, [], state, is_readable=False)
