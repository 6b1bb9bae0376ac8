"""One table and one figure of several results of `pictures.py`, such as of four sets of images.

    python benchmarks/picture_table.py results/pictures_icons results/pictures_animals \\
        results/pictures_duotone results/pictures_gray --output_dir results/pictures

Writes ``report.md`` and ``fronts.png``. All figures come from the results; nothing is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# The repository and this folder, so that it also runs as `python -m benchmarks.picture_table`
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import step_rules
from picture_study import METRICS, draw_fronts

from bilora_diffusion.core.durable import write_text
from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.core.figures import Interval, mean_interval
from bilora_diffusion.core.values import HELDOUT_LOSS
from eval import compare, report, table
from eval.command import Parser, open_folder
from eval.table import Result

# Metrics in the table, from the one that decides to the one that is cheapest
TABLE_METRICS = ("truth", "i2t", "nearest", HELDOUT_LOSS)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results, draw the fronts and write the report."""
    parser = Parser("benchmarks.picture_table", __doc__)
    parser.add_argument("results", nargs="+", type=Path, help="folders that pictures.py wrote")
    parser.add_argument("--output_dir", type=Path, default=Path("pictures"))
    args = parser.read(argv)
    results = read_results(args.results)
    open_folder(args.output_dir, "--output_dir")
    figures = draw_fronts(results, guidance_labels(results), args.output_dir)
    command = table.command_line("benchmarks.picture_table", argv or sys.argv[1:])
    write_text(args.output_dir / table.REPORT, page(results, command, figures))
    print(f"written: {args.output_dir}/{', '.join([table.REPORT, *figures])}")


def read_results(folders: Sequence[Path]) -> dict[str, Result]:
    """Preset -> its result, in the order of the folders.

    Raises:
        UserError: a folder has the result of another command, or a preset stands twice.
    """
    results: dict[str, Result] = {}
    for folder in folders:
        result = table.read(folder)
        if result.kind != "pictures":
            raise UserError(f"{folder} is a result of {result.kind}: name results of pictures.py.")
        preset = result.settings["preset"]
        if preset in results:
            raise UserError(f"{folder} is the second result of {preset}: name one for each set.")
        results[preset] = result
    return results


def guidance_labels(results: dict[str, Result]) -> list[str]:
    """Kinds of guidance of all results, each once and in order."""
    labels: dict[str, None] = {}
    for result in results.values():
        for row in result.select("i2t"):
            labels[row.item] = None
    return list(labels)


def page(results: dict[str, Result], command: str, figures: Sequence[str]) -> str:
    """The report: a table for each metric and kind of guidance, then the rules of a step."""
    sections = []
    for metric in TABLE_METRICS:
        # The held-out loss has no guidance.
        items = [""] if metric == HELDOUT_LOSS else guidance_labels(results)
        for item in items:
            if not any(result.select(metric, item=item) for result in results.values()):
                continue  # as the ground truth where no prompt is a held-out caption
            title = METRICS[metric].title + (f", {item}" if item else "")
            sections.append(report.section(title, metric_table(results, metric, item)))
    if any(result.select(step_rules.LAST) for result in results.values()):
        sections.append(report.section("Which step?", rule_table(results)))
    introduction = (
        "A row of LoRA has means over training seeds, every other row its differences to LoRA,"
        f" paired by seed, with {report.INTERVALS} and the number of seeds in which the variant is"
        " better. `n` is the number of seeds."
    )
    return report.page(
        "# Judged by sampled images: all sets",
        introduction,
        *[f"![{Path(name).stem}]({name})" for name in figures],
        *sections,
        report.listed([f"`{command}`"]),
    )


def metric_table(results: dict[str, Result], metric: str, item: str) -> str:
    """A row for each set and variant, a column for each checkpoint."""
    steps = sorted({row.step or 0 for result in results.values() for row in result.select(metric)})
    rows = []
    for preset, result in results.items():
        truth_i2t = result.settings.get("truth_i2t")
        if metric == "i2t" and truth_i2t is not None:
            cell = report.number(truth_i2t, METRICS[metric])
            rows.append([preset, "held-out images", "", *[cell] * len(steps)])
        for group in result.groups:
            lines = [result.summary(group, metric, item, step) for step in steps]
            cells = [report.against_control(result, line, group) for line in lines]
            count = max((line.count for line in lines if line is not None), default=0)
            rows.append([preset, group, str(count), *cells])
    heads = ["set", "variant", "n", *(f"step {step}" for step in steps)]
    return report.table(heads, rows)


def rule_table(results: dict[str, Result]) -> str:
    """The regret of each rule that chooses a checkpoint, over all variants and guidances."""
    rows = []
    for rule, metric in step_rules.RULES.items():
        cells = [metric.title]
        for result in results.values():
            regret, bounds = mean_regret(result, rule)
            cells.append(f"{report.number(regret, metric)} {report.interval(bounds, metric)}")
        rows.append(cells)
    return report.table(["rule", *results], rows)


def mean_regret(result: Result, rule: str) -> tuple[float | None, Interval | None]:
    """Mean regret over variants, guidances and seeds, with its interval over seeds."""
    regrets_by_seed: dict[int | None, list[float]] = {}
    for row in result.select(rule):
        if row.value is not None:
            regrets_by_seed.setdefault(row.seed, []).append(row.value)
    if not regrets_by_seed:
        return None, None
    seed_means = [compare.mean(regrets) for regrets in regrets_by_seed.values()]
    return compare.mean(seed_means), mean_interval(seed_means)


if __name__ == "__main__":
    sys.exit(run_cli(main))
