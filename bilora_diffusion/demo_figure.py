"""The figure of the demo: rows of icons, and the curves of both runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image

from .core.figures import new_figure
from .core.values import ADAPTER_GUIDANCE, BASE_GUIDANCE
from .methods import get

METHODS = ("lora", "bilora")
TITLES = {name: get(name).title for name in METHODS}
COLORS = {"lora": "#111111", "bilora": "#d95f02"}
GRAY = "#666666"
# Number of held-out icons in the figure; the subjects of the paper's Table 4 come first.
ICON_COUNT = 6
BASE = "base model"
# Values by step.
Curve = dict[int, float]


@dataclass(frozen=True)
class Variant:
    """A way of sampling: one row of the figure and one curve."""

    name: str  # of the method, or of the base model
    note: str  # on the guidance
    color: str
    guidance: float  # scale of classifier-free guidance
    guidance_from: str  # the model of the unconditional prediction; see `generate`


# Ordinary guidance takes much of a new style out again: training moves the unconditional prediction
# too, so the difference that guidance multiplies points away from the style.
UNTRAINED = Variant(BASE, "ordinary guidance 4", GRAY, 4.0, ADAPTER_GUIDANCE)
# Variants of each method's run.
TRAINED = {
    "lora": (
        Variant(TITLES["lora"], "ordinary guidance 4", COLORS["lora"], 4.0, ADAPTER_GUIDANCE),
        Variant(TITLES["lora"], "guidance 2 from base", COLORS["lora"], 2.0, BASE_GUIDANCE),
    ),
    "bilora": (
        Variant(TITLES["bilora"], "guidance 2 from base", COLORS["bilora"], 2.0, BASE_GUIDANCE),
    ),
}


@dataclass
class Samples:
    """Samples of held-out captions from the base model and from both runs."""

    labels: list[str]  # subjects of the icons in the figure
    truth: list[Image]  # these held-out icons
    # Samples of their captions after the last step.
    images: dict[Variant, list[Image]] = field(default_factory=dict)
    # Differences from the truth, by step for the trained variants.
    base_difference: float = 0.0
    differences: dict[Variant, Curve] = field(default_factory=dict)


class EndLabel(NamedTuple):
    """The label at the end of a curve."""

    step: int
    value: float
    text: str
    color: str


def draw(samples: Samples, losses: dict[str, Curve], steps: int, picture: Path) -> None:
    """One PNG: rows of icons left, curves of the held-out loss and of the samples right."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with new_figure(picture, dpi=110, figsize=(13, 6.1)) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[8.4, 4.6])
        _draw_icons(left, samples, steps)
        upper, lower = right.subplots(2, 1)
        right.subplots_adjust(left=0.12, right=0.66, bottom=0.085, top=0.92, hspace=0.5)
        _draw_losses(upper, losses)
        _draw_differences(lower, samples)
        for axis in (upper, lower):
            axis.set_xlabel("training steps")
            axis.set_xlim(left=0)
            axis.spines[["top", "right"]].set_visible(False)


def _draw_icons(figure: Any, samples: Samples, steps: int) -> None:
    """Rows of icons; the truth comes last, below what was learned."""
    titles = [(BASE, "before training", GRAY)]
    rows = [samples.images[UNTRAINED]]
    for variant, images in samples.images.items():
        if variant != UNTRAINED:
            titles.append((variant.name, variant.note, variant.color))
            rows.append(images)
    titles.append(("truth", "not in the training set", GRAY))
    rows.append(samples.truth)
    axes = figure.subplots(len(rows), len(samples.labels), squeeze=False)
    figure.subplots_adjust(left=0.225, right=0.99, bottom=0.01, top=0.9, wspace=0.05, hspace=0.05)
    figure.suptitle(f"Samples of held-out captions after {steps} training steps", x=0.6075, y=0.985)
    for axis, label in zip(axes[0], samples.labels, strict=True):
        axis.set_title(label, fontsize=11)
    # The title of a row stands left of its first icon.
    for row_of_axes, (name, note, color), images in zip(axes, titles, rows, strict=True):
        for height, text, size in ((0.6, name, 13), (0.38, note, 9.5)):
            row_of_axes[0].text(
                -0.08,
                height,
                text,
                transform=row_of_axes[0].transAxes,
                ha="right",
                va="center",
                fontsize=size,
                color=color,
            )
        for axis, image in zip(row_of_axes, images, strict=True):
            axis.imshow(image, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])


def _draw_losses(axis: Any, losses: dict[str, Curve]) -> None:
    """The held-out losses of both methods without step 0, whose loss would flatten the rest."""
    labels: list[EndLabel] = []
    for number, (method, curve) in enumerate(losses.items()):
        trained = trained_part(curve)
        # The wider line is below the narrower one, since the curves may lie on one another.
        axis.plot(trained.keys(), trained.values(), color=COLORS[method], lw=4 - 2 * number)
        best_step = min(trained, key=trained.__getitem__)
        axis.plot(best_step, trained[best_step], "o", color=COLORS[method], ms=9 - 3 * number)
        last_step = max(trained)
        text = f"{TITLES[method]}: {trained[last_step]:.1f}"
        labels.append(EndLabel(last_step, trained[last_step], text, COLORS[method]))
    axis.set_title("loss on unseen icons x 1000 (dot: lowest)", fontsize=11, loc="left")
    axis.margins(y=0.15)  # the labels stay below the title
    _label_ends(axis, labels)


def trained_part(curve: Curve) -> Curve:
    """Losses times 1000, without that of the base model."""
    return {step: 1000 * loss for step, loss in curve.items() if step > 0}


def _draw_differences(axis: Any, samples: Samples) -> None:
    """Differences of each variant's samples from the truth; all curves start at the base model."""
    labels: list[EndLabel] = []
    for number, (variant, curve) in enumerate(samples.differences.items()):
        style = "--" if variant.guidance_from == ADAPTER_GUIDANCE else "-"
        # The base model is step 0 of each variant.
        points = {0: samples.base_difference, **curve}
        width = max(4 - number, 2)
        axis.plot(points.keys(), points.values(), style, color=variant.color, lw=width)
        last_step = max(curve)
        text = f"{variant.name}: {curve[last_step]:.1f}\n{variant.note}"
        labels.append(EndLabel(last_step, curve[last_step], text, variant.color))
    axis.plot(0, samples.base_difference, "o", color=GRAY, ms=7, clip_on=False, zorder=3)
    title = f"color difference between samples\nand truth, % (dot: {BASE})"
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_ylim(bottom=0)
    _label_ends(axis, labels)


def _label_ends(axis: Any, labels: Sequence[EndLabel]) -> None:
    """Label curves right of their ends; labels that would overlap are pushed apart."""
    low, high = axis.get_ylim()
    lines = max(label.text.count("\n") + 1 for label in labels)
    spacing = 0.1 * lines * (high - low)  # height of a label in units of the axis
    labels = sorted(labels, key=lambda label: label.value)
    heights = [label.value for label in labels]
    for lower in 20 * list(range(len(labels) - 1)):  # a few labels are apart after some rounds
        overlap = max(spacing - (heights[lower + 1] - heights[lower]), 0)
        heights[lower] -= overlap / 2
        heights[lower + 1] += overlap / 2
    excess = max(heights[-1] + spacing / 4 - high, 0)  # all labels stay below the axis' title
    for label, height in zip(labels, heights, strict=True):
        style = {"color": label.color, "fontsize": 9.5, "va": "center", "annotation_clip": False}
        end = (label.step, height - excess)
        axis.annotate(label.text, end, xytext=(9, 0), textcoords="offset points", **style)
    axis.set_ylim(low, high)
