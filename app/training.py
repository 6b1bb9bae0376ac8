"""The tab "Training": curves and state of the chosen runs, live while one of them is going on.

Curves are Gradio's own line plots, drawn in the browser: they fit any width, follow the light or
dark theme and ask nothing from outside.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from bilora_diffusion import methods, runlog
from bilora_diffusion.errors import UserError

from . import readers
from .catalog import Catalog
from .charts import CHARTS, COLORS, PALETTE, Chart, Failed, Shown, colors_of, frame
from .training_data import Reader, duration, memory, progress, radius

TICK_SECONDS = 3.0
CHOSEN = 4
"""Runs that are shown before any is chosen."""
WINDOW = 25
EMPTY = """
<section class="empty">
  <h2>No runs yet</h2>
  <p>Training leaves a run folder, which this tab follows while the run is going on:</p>
  <ol>
    <li><code>make demo</code>, or</li>
    <li><code>accelerate launch train_dreambooth_bilora.py --dataset mini --method bilora
      --output_dir runs/bilora</code></li>
    <li>press Refresh</li>
  </ol>
</section>
"""
CARDS_CSS = """
ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
li { margin: 0; border: 1px solid var(--border-color-primary); border-left: 4px solid;
  border-radius: var(--radius-md); padding: 0.5rem 0.75rem;
  background: var(--block-background-fill); }
b { overflow-wrap: anywhere; }
.line { margin-top: 0.15rem; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.state { float: right; margin-left: 0.5rem; color: var(--body-text-color); }
.failed .state, .stale .state { color: #dc2626; font-weight: 600; }
.running .state { color: #0d9488; font-weight: 600; }
"""


def cards(runs: Sequence[Shown | Failed]) -> str:
    """The state of each run, as HTML; also the legend of the plots."""
    items = []
    for run in runs:
        name = html.escape(run.name)
        if isinstance(run, Failed):
            status, text = "failed", _line(html.escape(run.reason))
        else:
            status, text = run.state.status, "".join(_line(line) for line in _lines(run))
        items.append(
            f'<li class="{html.escape(status)}" style="border-left-color: {COLORS[run.color]}">'
            f'<span class="state">{html.escape(status)}</span><b>{name}</b>{text}</li>'
        )
    return f"<ul>{''.join(items)}</ul>"


def _lines(run: Shown) -> list[str]:
    state, config = run.state, run.record["config"]
    steps = f"{state.steps} of {state.total} steps" if state.total else f"{state.steps} steps"
    facts = [steps, duration(state.wall_seconds)]
    if state.left_seconds:
        facts.append(f"about {duration(state.left_seconds)} left")
    if state.peak_memory_bytes:
        facts.append(f"peak {memory(state.peak_memory_bytes)}")
    about = [_title(run.record["method"])]
    if radius(run.record, state.steps):
        unscaled = ", unscaled norm" if config.get("rho_norm") == "unscaled" else ""
        about.append(f"ρ {config['rho']:g}{unscaled}")
    about.append(f"seed {run.record.get('seed')}")
    lines = [" · ".join(about), " · ".join(facts), state.reason]
    return [html.escape(line) for line in lines if line]


def _line(text: str) -> str:
    return f'<div class="line">{text}</div>'


def _title(method: str) -> str:
    try:
        return methods.get(method).title
    except UserError:  # of a version that knows more methods
        return method


def build(catalog: Catalog) -> None:
    """Build the tab inside the current ``gr.Tab``."""
    page = _Page(catalog)
    page.connect()


class _Page:
    """The widgets, and what happens when they are used."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog, self.reader = catalog, Reader()
        self.notice = gr.HTML(visible=False, elem_id="training-notice")
        with gr.Column(visible=False) as self.body:
            with gr.Row():
                self.runs = gr.Dropdown(
                    [],
                    label="Runs",
                    multiselect=True,
                    max_choices=len(COLORS),
                    elem_id="training-runs",
                    scale=3,
                )
                self.window = gr.Slider(
                    *(1, 200, WINDOW),
                    step=1,
                    label="Running mean over steps",
                    elem_id="training-window",
                    min_width=200,
                )
            self.cards = gr.HTML(elem_id="training-cards", css_template=CARDS_CSS)
            self.boxes: list[gr.Column] = []
            self.plots: list[gr.LinePlot] = []
            for pair in (CHARTS[:2], CHARTS[2:]):
                with gr.Row():
                    for chart in pair:
                        with gr.Column(visible=False, min_width=300) as box:
                            gr.HTML(f"<h4>{chart.title}</h4><p>{chart.caption}</p>")
                            self.plots.append(_plot(chart))
                        self.boxes.append(box)
        self.drawn = gr.State(None)
        self.timer = gr.Timer(TICK_SECONDS)

    def connect(self) -> None:
        """Attach what happens to the widgets."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        chosen = [self.runs, self.window]
        shown = [self.cards, self.drawn, *self.boxes, *self.plots]
        gr.on(None, self._load, [], [self.notice, self.body, self.runs], **quiet)
        gr.on([self.runs.change, self.window.release], self._draw, chosen, shown, **quiet)
        self.timer.tick(self._tick, [*chosen, self.drawn], shown, **quiet)

    def _load(self) -> dict[Any, Any]:
        runs = sorted(
            self.catalog.runs(), key=lambda run: str(run.record.get("started_at")), reverse=True
        )
        if not runs:
            return {self.notice: gr.update(value=EMPTY, visible=True)}
        going = [run.path for run in runs if run.status == "running"]
        first = [*going, *(run.path for run in runs if run.path not in going)][:CHOSEN]
        choices = [(run.name, run.path) for run in runs]
        return {
            self.body: gr.update(visible=True),
            self.runs: gr.update(choices=choices, value=first),
        }

    def _draw(self, paths: Sequence[str] | None, window: int) -> dict[Any, Any]:
        runs = self._read(paths or [])
        good = [run for run in runs if isinstance(run, Shown)]
        update: dict[Any, Any] = {self.cards: cards(runs), self.drawn: self._seen(runs, window)}
        for chart, box, plot in zip(CHARTS, self.boxes, self.plots, strict=True):
            table = frame(chart.curves(good, int(window)))
            update[box] = gr.update(visible=table is not None)
            if table is not None:
                update[plot] = gr.update(value=table)
        return update

    def _tick(self, paths: Sequence[str] | None, window: int, drawn: Any) -> dict[Any, Any]:
        if self._seen(self._read(paths or []), window) == drawn:
            return {self.cards: gr.skip()}
        return self._draw(paths, window)

    def _read(self, paths: Sequence[str]) -> list[Shown | Failed]:
        names = {run.path: run.name for run in self.catalog.runs()}
        colors = colors_of(paths, list(names))
        return [self._one(path, names.get(path, path), color) for path, color in colors.items()]

    def _one(self, path: str, name: str, color: str) -> Shown | Failed:
        try:
            folder = self.catalog.resolve(path)
            files = [
                self.catalog.resolve(f"{path}/{file}") for file in (runlog.RUN, runlog.METRICS)
            ]
            record = readers.run(folder / runlog.RUN)
            rows = self.reader.read(folder)
            written = max(file.stat().st_mtime for file in files if file.exists())
            return Shown(name, color, record, rows, progress(record, rows, written))
        except (UserError, OSError) as error:
            reason = " ".join(str(error).split()).replace(str(self.catalog.root), self.catalog.name)
            return Failed(name, color, reason)

    def _seen(self, runs: Sequence[Shown | Failed], window: int) -> tuple[Any, ...]:
        """Changes whenever there is something new to show."""
        keys = [
            (run.name, run.reason)
            if isinstance(run, Failed)
            else (run.name, len(run.rows), run.state.status, run.state.wall_seconds)
            for run in runs
        ]
        return (window, *keys)


def _plot(chart: Chart) -> gr.LinePlot:
    # Gradio 6.31 cuts off the axis below a label or caption of the plot's own, and without a height
    # its plot resizes itself for ever.
    return gr.LinePlot(
        x="step",
        y="value",
        color="line",
        color_map=PALETTE,
        tooltip=["run"],
        x_title="step",
        y_title=chart.symbol,
        colors_in_legend=[],  # the cards are the legend: Gradio's own does not wrap on a phone
        y_axis_format="~g",
        height=280,
        elem_id=f"training-{chart.name}",
    )
