"""Tables of docs/results.md, computed from the recorded results in ``results/``."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bilora_diffusion.core.statistics import Interval, mean_interval
from bilora_diffusion.core.values import HELDOUT_LOSS
from eval.results import compare, report, table
from eval.results.table import Metric, Result, Summary
from eval.sweep import step_rules

from .evidence import ROOT, Check, figure

CONTROL = "LoRA"
PAPER = "Bi-LoRA"
GUIDANCE, BASE_GUIDANCE = "guidance 4", "base's guidance 2"
STEPS = (100, 300, 1000)
# How the tables print a value: its factor and its number format
COSINE = Metric("cosine", scale=100, form=".1f")
LOSS = Metric("loss", scale=1000, form=".2f")
TEXT_LOSS = Metric("loss of text", form=".4f")
PERCENT = Metric("percent", scale=100, form=".2f")
# Image set -> its name in the tables. Its results are in results/pictures_SET.
SETS = {
    "icons": "23 icons",
    "animals": "12 animals",
    "duotone": "icons in two colors",
    "gray": "gray icons",
}
ONE_SEED_SETS = {"pastel": "icons in pastel", "flow": "23 icons, mini-flow"}
METHODS = {
    "LoRA, dropout 0.1": "LoRA, dropout 0.1",
    "LoRA-SAM": "LoRA-SAM, two passes",
    "LoRA-oBAR": "LoRA-oBAR",
    "LoRA-nBAR": "LoRA-nBAR",
    "Flat-LoRA": "Flat-LoRA",
    PAPER: "Bi-LoRA, `rho` 0.05",
    "Bi-LoRA, rho 1": "Bi-LoRA, `rho` 1",
}
TEXT_METHODS = {"LoRA-SAM": "LoRA-SAM, `rho` 0.01", PAPER: "Bi-LoRA"}
BENCHMARKS = {
    "sdxl-unet": "SDXL's UNet, bf16, 1 x 128 px",
    "t5-base": "T5-base, 8 x 128 tokens",
    "mini": "miniature, 4 x 64 px",
}
BENCHMARK_METHODS = {"bilora": "Bi-LoRA", "lora-sam": "LoRA-SAM", "flat-lora": "Flat-LoRA"}


@functools.cache
def read(name: str) -> Result:
    """Read the result in a folder of ``results/``."""
    return table.read(ROOT / "results" / name)


def cell(result: Result, line: Summary | None, metric: Metric, intervals: bool = True) -> str:
    """Format the control's mean, or another group's difference from the control."""
    if line is None:
        return report.NOT_AVAILABLE
    if line.group == result.control:
        return report.number(line.mean, metric)
    return _format_difference(
        line.difference, line.difference_interval if intervals else None, metric
    )


def _format_difference(value: float | None, bounds: Interval | None, metric: Metric) -> str:
    """Format a difference, with its interval if there is one."""
    text = report.number(value, metric, "+")
    if bounds is not None:
        text += f" {report.interval(bounds, metric, '+')}"
    return without_signs_of_zeros(text)


def without_signs_of_zeros(text: str) -> str:
    """Remove the sign of each number that is rounded to zero, such as "-0.0"."""
    return re.sub(r"[+-](0\.0+)\b", r"\1", text)


def difference(check: Check, metric: Metric) -> str:
    """Compute a check's figure and format it with its interval."""
    value = figure(check)
    return _format_difference(value.mean, Interval(value.low, value.high), metric)


def mean(line: Summary | None, metric: Metric) -> str:
    """Format a group's mean, also for a group that is not the control."""
    return report.number(line.mean if line else None, metric)


def seeds(result: Result) -> int:
    """Return the number of training seeds of a result."""
    return len(result.members(result.control))


def samples() -> Iterable[str]:
    """Generate the table of sample scores of LoRA and Bi-LoRA at `STEPS`."""
    rows = []
    for name, title in {**SETS, **ONE_SEED_SETS}.items():
        result = read(f"pictures_{name}")
        for group, variant in {CONTROL: CONTROL, PAPER: "Bi-LoRA"}.items():
            first_cell = f"{title}, {seeds(result)}" if group == CONTROL else ""
            lines = [result.summary(group, "truth", GUIDANCE, step) for step in STEPS]
            rows.append((first_cell, variant, *[cell(result, line, COSINE) for line in lines]))
    yield report.table(("data, seeds", "run", *step_heads(STEPS)), rows)


def rules() -> Iterable[str]:
    """Generate the table of regrets of the rules that choose a step."""
    titles = {
        step_rules.BY_LOSS: "lowest held-out loss",
        step_rules.LAST: "last step",
        step_rules.BY_CAPTIONS: f"best step by {step_rules.CAPTIONS} sampled captions",
    }
    sets = {**SETS, **ONE_SEED_SETS}
    rows = []
    for rule, title in titles.items():
        cells = []
        for name in sets:
            regret, bounds = mean_regret(read(f"pictures_{name}"), rule)
            text = report.number(regret, COSINE)
            if bounds is not None:
                text += f" {report.interval(bounds, COSINE)}"
            cells.append(without_signs_of_zeros(text))
        rows.append((title, *cells))
    yield report.table(("rule", *sets.values()), rows)


def mean_regret(result: Result, rule: str) -> tuple[float | None, Interval | None]:
    """Compute the mean regret over variants, guidances and seeds, with its interval over seeds."""
    regrets_by_seed: dict[int | None, list[float]] = {}
    for row in result.select(rule):
        if row.value is not None:
            regrets_by_seed.setdefault(row.seed, []).append(row.value)
    if not regrets_by_seed:
        return None, None
    seed_means = [compare.mean(regrets) for regrets in regrets_by_seed.values()]
    return compare.mean(seed_means), mean_interval(seed_means)


def methods() -> Iterable[str]:
    """Generate the table of the methods' held-out losses: the lowest, and that of the last step."""
    result = read("methods")
    rows = []
    for group, title in {CONTROL: CONTROL, **METHODS}.items():
        lines = [result.summary(group, f"{kind} {HELDOUT_LOSS}") for kind in ("best", "final")]
        rows.append((title, *[cell(result, line, LOSS) for line in lines]))
    yield report.table(("method", "lowest", "end"), rows)


def radii() -> Iterable[str]:
    """Generate the table of changes in the lowest held-out loss by the auxiliary's settings."""
    rows = []
    changes = {
        "`rho` 0.01, against 0.1": ("radius_small", "rho=0.01", "rho=0.1"),
        "`rho` 0.05, against 0.1": ("radius_small", "rho=0.05", "rho=0.1"),
        "rank 2 of the auxiliary, against 16, `rho` 1": (
            "auxiliary_rank",
            "rho=1, auxiliary_rank=2",
            "rho=1, auxiliary_rank=16",
        ),
        "rank 8 of the auxiliary, against 16, `rho` 1": (
            "auxiliary_rank",
            "rho=1, auxiliary_rank=8",
            "rho=1, auxiliary_rank=16",
        ),
        "learning rate of the auxiliary a fifth of the primary's, against equal rates, `rho` 1": (
            "auxiliary_rate",
            "rho=1, auxiliary_learning_rate=2e-4",
            "rho=1, auxiliary_learning_rate=1e-3",
        ),
        "learning rate of the auxiliary ten times the primary's, against equal rates, `rho` 1": (
            "auxiliary_rate",
            "rho=1, auxiliary_learning_rate=1e-2",
            "rho=1, auxiliary_learning_rate=1e-3",
        ),
    }
    for title, (name, group, control) in changes.items():
        check = _lowest(name, f"method=bilora, {group}", f"method=bilora, {control}")
        rows.append((title, difference(check, LOSS)))
    for rank in (4, 8, 16):
        check = _lowest("ranks", f"rank {rank} + 8", f"rank {rank}")
        title = f"primary of rank {rank}, with an auxiliary of rank 8 against none, `rho` 1"
        rows.append((title, difference(check, LOSS)))
    yield report.table(("change", "lowest held-out loss"), rows)


def together() -> Iterable[str]:
    """Generate the table of lowest held-out losses of PiSSA and others, and Bi-LoRA's changes."""
    rows = []
    for form in ("PiSSA", "LoRA-GA", "DoRA", "NF4"):
        lora_line = read("together").summary(form, f"best {HELDOUT_LOSS}")
        check = _lowest("together", f"{form}, Bi-LoRA", form)
        value = mean(lora_line, LOSS)
        rows.append((form, value, difference(check, LOSS)))
    yield report.table(("form", "LoRA", "with Bi-LoRA"), rows)


def _lowest(name: str, group: str, control: str) -> Check:
    """Return the check of a group's lowest held-out loss minus its control's."""
    return Check("", f"results/{name}", group, f"best {HELDOUT_LOSS}", control=control)


def texts() -> Iterable[str]:
    """Generate the table of scores and losses of text models."""
    reviews = read("text_rotten_tomatoes/text_scores")
    sums = read("text_gsm_symbolic/sweep")
    columns = (
        (reviews, "heldout:rotten_tomatoes:accuracy", PERCENT, "reviews: accuracy, %"),
        (reviews, "heldout:rotten_tomatoes:loss", TEXT_LOSS, "reviews: loss"),
        (sums, f"final {HELDOUT_LOSS}", TEXT_LOSS, "sums: loss per token"),
    )
    rows = []
    for group, title in {CONTROL: CONTROL, **TEXT_METHODS}.items():
        cells = []
        for result, metric, form, _ in columns:
            cells.append(cell(result, result.summary(group, metric), form))
        rows.append((title, *cells))
    yield report.table(("method", *[column[-1] for column in columns]), rows)


def step_cost() -> Iterable[str]:
    """Generate the table of a step's time, as a ratio to LoRA's, and peak memory."""
    rows = []
    variants = {name: _benchmark(f"step_cost/{name}")["variants"] for name in BENCHMARKS}
    cells = []
    for name in BENCHMARKS:
        plain = variants[name]["lora"]
        cells.append(f"{plain['median_seconds']:.3g} s, {_gigabytes(plain)}")
    rows.append((CONTROL, *cells))
    for method, title in BENCHMARK_METHODS.items():
        cells = []
        for name in BENCHMARKS:
            variant = variants[name][method]
            low, high = variant["ratio_interval_95"]
            ratio = f"{variant['ratio_to_lora']:.3f} [{low:.3f}, {high:.3f}]"
            cells.append(f"{ratio}, {_gigabytes(variant)}")
        rows.append((title, *cells))
    yield report.table(("method", *BENCHMARKS.values()), rows)


def _gigabytes(variant: Mapping[str, Any]) -> str:
    return f"{variant['peak_memory_bytes'] / 2**30:.2f} GiB"


def against_diffusers() -> Iterable[str]:
    """Generate the table of time, memory and loss as ratios to those of diffusers' script."""
    models = {"random_sdxl": "SDXL, random weights, 256 px, bf16", "mini": "miniature"}
    rows = []
    for name, title in models.items():
        content = _benchmark(f"against_diffusers/{name}")
        for variant, values in content["variants"].items():
            if variant.startswith("diffusers"):
                continue
            cells = []
            for metric in ("seconds", "step", "memory", "heldout_loss"):
                measured = values.get(metric)
                if measured is None:
                    cells.append("")
                    continue
                low, high = measured["ratio_95"]
                cells.append(f"{measured['ratio']:.2f} [{low:.2f}, {high:.2f}]")
            rows.append((f"{title}, {content['rounds']} rounds", variant, *cells))
    heads = ("whole command", "a step", "memory", "held-out loss")
    yield report.table(("model", "run", *heads), rows)


def _benchmark(name: str) -> dict[str, Any]:
    """Read the JSON file of a benchmark in ``results/``."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def step_heads(steps: Sequence[int]) -> list[str]:
    return [f"step {step:,}" for step in steps]
