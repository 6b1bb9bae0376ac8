"""The study of `pictures.py`: its variants, kinds of guidance and presets, and its tables and
figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import step_rules
from PIL.Image import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.mini.colors import SQUARE
from eval import plot, report
from eval.clip_scores.measure import truth_pictures
from eval.clip_scores.prompts import read
from eval.clip_scores.reporting import METRICS as CLIP_METRICS
from eval.plot import Curve, Panel
from eval.table import Metric, Result, Summary

CONTROL = "LoRA"
RADIUS_AUTO = "Bi-LoRA, rho auto"
PER_SAMPLE = "Bi-LoRA, per sample"
SAMPLES = {"method": "bilora", "rho": "auto", "auxiliaries": "sample"}
VARIANTS: dict[str, dict[str, bool | str]] = {
    CONTROL: {"method": "lora"},
    "Bi-LoRA": {"method": "bilora"},
    RADIUS_AUTO: {"method": "bilora", "rho": "auto"},
    PER_SAMPLE: {**SAMPLES},
    "LoRA-SAM": {"method": "lora-sam"},
    "LoRA, EMA": {"method": "lora", "use_ema": True},
    # Does one of these keep the subjects that an auxiliary for each sample loses early? The doubled
    # rate is that of the miniature.
    "per sample, a quarter of the rise": {**SAMPLES, "loss_rise": "0.1"},
    "per sample, at low noise": {**SAMPLES, "auxiliary_snr_gamma": "50"},
    "per sample, doubled rate": {**SAMPLES, "learning_rate": "2.0e-3"},
    "LoRA, doubled rate": {"method": "lora", "learning_rate": "2.0e-3"},
    # How often, and how strongly, the unconditional prediction is held.
    "LoRA, held": {"method": "lora", "hold_unconditional": "4"},
    "LoRA, held weakly": {"method": "lora", "hold_unconditional": "1"},
    "LoRA, held strongly": {"method": "lora", "hold_unconditional": "16"},
    "LoRA, held often": {
        "method": "lora",
        "hold_unconditional": "1",
        "hold_unconditional_every": "4",
    },
    "Bi-LoRA, held": {"method": "bilora", "hold_unconditional": "4"},
    # Trained towards what guidance of a scale would predict.
    "LoRA, guided target 1.5": {"method": "lora", "guided_target": "1.5"},
    "LoRA, guided target 2": {"method": "lora", "guided_target": "2.0"},
    "LoRA, guided target 3": {"method": "lora", "guided_target": "3.0"},
    "Bi-LoRA, guided target 2": {"method": "bilora", "guided_target": "2.0"},
}


@dataclass(frozen=True)
class Guidance:
    """A kind of guidance."""

    # Model of the unconditional prediction, "adapter" or "base"
    source: str
    scale: float

    @property
    def label(self) -> str:
        """Name in figures and tables."""
        owner = "base's " if self.source == "base" else ""
        return f"{owner}guidance {self.scale:g}"


@dataclass(frozen=True)
class Preset:
    """Settings of the runs and of the sampling."""

    # YAML file of the training script
    recipe: str
    # ``--prompts`` of eval.clip_scores
    prompts: str
    # Checkpoints that are sampled; the last one is the end of training
    steps: tuple[int, ...]
    # Kinds of guidance
    guidances: tuple[Guidance, ...]
    # Labels of `VARIANTS`
    variants: tuple[str, ...]
    # Further options of all runs
    options: dict[str, bool | str] = field(default_factory=dict)
    # Seeds of training
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    # Images of each prompt
    sampling_seeds: tuple[int, ...] = (0,)
    # Number of prompts of the set that are sampled, the first ones; None for all
    max_prompts: int | None = None
    # Further flags of eval.clip_scores
    scoring: tuple[str, ...] = ()
    # Weights of the models that sample and score, where these are large
    sampling_gigabytes: float = 0.0


def mini_preset(dataset: str, model: str | None = None) -> Preset:
    """A miniature on one of the embedded sets, with 32 held-out captions.

    It is trained beyond the step with the lowest held-out loss.

    Args:
        model: name of the miniature; None for the set's own.
    """
    # The loss of a quarter of the held-out pictures: all take longer than the training.
    options: dict[str, bool | str] = {
        "dataset": dataset,
        "validation_part": "1/4",
        "validation_loss_steps": "100",
        "num_validation_images": "0",
    }
    if model is not None:
        options["pretrained_model_name_or_path"] = model
    return Preset(
        recipe="recipes/mini.yaml",
        prompts=f"{dataset}-heldout",
        steps=(100, 300, 500, 1000),
        guidances=(Guidance("adapter", 4.0), Guidance("base", 2.0)),
        variants=(CONTROL, "Bi-LoRA", RADIUS_AUTO, PER_SAMPLE),
        options=options,
        max_prompts=32,
        # With 15 sampler steps in place of 25, the score "truth" is 0.4 lower for all variants.
        scoring=("--general_prompts", "none", "--skip_captions", "--num_inference_steps", "15"),
    )


# Two seeds of 200 prompts; the held-out loss is not measured, since all pictures are trained on.
GPU_SAMPLING: dict[str, Any] = {
    "prompts": "3d_icon",
    "variants": (CONTROL, "Bi-LoRA", RADIUS_AUTO),
    "seeds": (0, 1, 2),
    "sampling_seeds": (0, 1),
    "scoring": ("--general_prompts", "none", "--image_model", "dinov2:facebook/dinov2-base"),
}
PRESETS = {
    "mini-icons": mini_preset("mini"),
    "mini-animals": mini_preset("mini-animals"),
    "mini-duotone": mini_preset("mini-duotone"),
    "mini-gray": mini_preset("mini-gray"),
    "mini-pastel": mini_preset("mini-pastel"),
    "mini-flow": mini_preset("mini", model="mini-flow"),
    "sdxl-3d_icon": Preset(
        recipe="recipes/sdxl_3d_icon.yaml",
        steps=(500, 1000, 2000),
        guidances=(Guidance("adapter", 5.0), Guidance("base", 3.0)),
        options={"num_validation_images": "0", "mixed_precision": "bf16"},
        **GPU_SAMPLING,
    ),
    "flux2_klein": Preset(
        recipe="recipes/flux2_klein.yaml",
        steps=(500, 1000, 2000),
        guidances=(Guidance("adapter", 4.0), Guidance("base", 2.5)),
        options={"dataset": "linoyts/3d_icon", "num_validation_images": "0"},
        # In bf16: the transformer 18, its text encoder 16, CLIP, BLIP and DINOv2 in fp32 4
        sampling_gigabytes=38.0,
        **GPU_SAMPLING,
    ),
}


def read_guidances(text: str | None) -> tuple[Guidance, ...]:
    """The kinds of guidance of ``adapter:4,base:2``; none for None."""
    guidances = []
    for word in (text or "").split(","):
        kind = word.strip()
        if not kind:
            continue
        source, _, scale = kind.partition(":")
        sentence = f'--guidances has "{kind}": write adapter:4 or base:2.'
        if source not in ("adapter", "base"):
            raise UserError(sentence)
        try:
            guidances.append(Guidance(source, float(scale)))
        except ValueError:
            raise UserError(sentence) from None
    return tuple(guidances)


FRONTS = "fronts.png"
CURVES = "curves.png"
SAMPLED = ("truth", "i2t", "t2t", "nearest", "dino_truth", "dino_nearest")
SAMPLED_METRICS = {name: CLIP_METRICS[name] for name in SAMPLED}
METRICS = {
    **SAMPLED_METRICS,
    "colors": Metric(
        "color difference, %",
        f"of mean colors over {SQUARE} x {SQUARE} pixels, to the held-out picture",
        scale=100,
        form=".2f",
    ),
    HELDOUT_LOSS: Metric("held-out loss", "x 1000", scale=1000, form=".2f"),
    **step_rules.RULES,
}


def preset_truths(preset: Preset, result: Result) -> dict[str, Image]:
    """The held-out picture of each prompt of a scored result that has one."""
    scored = {prompt["text"] for prompt in result.settings["prompts"]}
    prompts = [prompt for prompt in read(preset.prompts) if prompt.text in scored]
    return truth_pictures(prompts, result.settings["sampling"]["base_model"])


def curve_panels(result: Result, guidances: Sequence[Guidance]) -> list[list[Panel]]:
    """Metrics over training: a row for each metric, a column for each kind of guidance."""
    rows = []
    for metric in ("truth", "i2t", "nearest"):
        panels = []
        for guidance in guidances:
            item = guidance.label
            if result.select(metric, item=item):
                curves = [Curve(group, metric, item, label=group) for group in result.groups]
                panels.append(Panel(f"{METRICS[metric].title}, {item}", "cosine", curves))
        if panels:
            rows.append(panels)
    return rows


def truths_by_step(result: Result, run: str) -> dict[int, list[float]]:
    """Ground truth of each caption at each checkpoint of a run, the captions in one order.

    Args:
        result: scored checkpoints.
        run: the run's name.
    """
    truths: dict[int, dict[str, float]] = {}
    for entry in result.subjects:
        if entry.about["run"] != run:
            continue
        for row in result.select("truth", entry.group):
            if row.value is not None:
                truths.setdefault(entry.about["step"], {})[row.item] = row.value
    if not truths:
        return {}
    # Captions with a value at each checkpoint
    captions = sorted(set.intersection(*map(set, truths.values())))
    ordered = {}
    for step, values in truths.items():
        ordered[step] = [values[caption] for caption in captions]
    return ordered


def rule_section(result: Result) -> list[str]:
    """The regret of each rule that chooses a step, by variant and kind of guidance."""
    items = list(dict.fromkeys(row.item for row in result.select(step_rules.LAST)))
    if not items:
        return []
    heads = ["guidance", "variant"]
    heads += [metric.title for metric in step_rules.RULES.values()]
    rows = []
    for item in items:
        for group in result.groups:
            cells = [item, group]
            for rule, metric in step_rules.RULES.items():
                cells.append(report.mean(result.summary(group, rule, item), metric))
            rows.append(cells)
    return [report.section("Which step?", report.table(heads, rows))]


def step_sections(result: Result) -> list[str]:
    """A section for each metric and kind of guidance, with its table over checkpoints."""
    sections = []
    for name, metric in METRICS.items():
        if name in step_rules.RULES:
            continue
        for item in dict.fromkeys(row.item for row in result.select(name)):
            title = f"{metric.title}, {item}" if item else metric.title
            sections.append(report.section(title, step_table(result, name, item)))
    return sections


def step_table(result: Result, metric: str, item: str) -> str:
    """A table with a row for each variant and a column for each checkpoint.

    A cell is the mean over seeds, with the difference to the control's in brackets.
    """
    steps = sorted({row.step or 0 for row in result.select(metric, item=item)})
    heads = ["variant"]
    heads += [f"step {step}" for step in steps]
    rows = []
    for group in result.groups:
        cells = [group]
        for step in steps:
            line = result.summary(group, metric, item, step)
            cell = report.mean(line, METRICS[metric], intervals=False)
            if group != result.control:
                cell += f" ({report.difference(line, METRICS[metric])})"
            cells.append(cell)
        rows.append(cells)
    return report.table(heads, rows)


def draw_fronts(results: Mapping[str, Result], labels: Sequence[str], folder: Path) -> list[str]:
    """Draw the fronts: a row for each kind of guidance, a column for each result.

    Args:
        results: by preset.
        labels: of the kinds of guidance.

    Returns:
        The picture's name; [] if a kind of guidance lacks a value, which leaves empty axes.
    """
    for result in results.values():
        if not all(result.select("i2t", item=label) for label in labels):
            return []
    with plot.canvas(folder / FRONTS, len(labels), len(results)) as (_, axes):
        for axes_row, label in zip(axes, labels, strict=True):
            for axis, (preset, result) in zip(axes_row, results.items(), strict=True):
                # One legend, since the variants have the same colors everywhere
                legend = axis is axes[0][0]
                draw_front(axis, result, label, f"{preset}, {label}", legend)
    return [FRONTS]


def draw_front(axis: Any, result: Result, label: str, title: str, legend: bool) -> None:
    """Draw likeness to the trained style over agreement with the prompt.

    Each variant is a line through its checkpoints, with a bar of one standard error of the seeds in
    both directions. Likeness is the cosine with the held-out picture, or without one with the
    nearest training picture.

    Args:
        axis: of matplotlib.
        label: name of the kind of guidance.
        title: title of the axes.
        legend: show the variants' names.
    """
    likeness = "truth" if result.select("truth") else "nearest"
    styles = plot.group_styles(result.groups, CONTROL)
    for group in result.groups:
        horizontal = result.curve(group, "i2t", label)
        vertical = result.curve(group, likeness, label)
        x, x_error = _shown_values(horizontal)
        y, y_error = _shown_values(vertical)
        style = {"color": styles[group]["color"], "marker": ".", "lw": 1, "elinewidth": 0.6}
        axis.errorbar(x, y, y_error, x_error, label=group, **style)
        if group == result.control:
            for i, point in enumerate(vertical):
                axis.annotate(f"{point.step}", (x[i], y[i]), fontsize=6, color="gray")
    plot.finish(axis, title, METRICS[likeness].title, legend, xlabel="CLIP I2T")


def _shown_values(curve: Sequence[Summary]) -> tuple[list[float], list[float]]:
    """Means and standard errors of a curve of cosines, times 100."""
    means = [100 * (point.mean or 0.0) for point in curve]
    errors = [100 * (point.error or 0.0) for point in curve]
    return means, errors
