"""Regret of ``--fit``: its choice compared with the best of its space in hindsight, on unseen data.

    python -m benchmarks.fit_regret --output_dir results/fit_regret    # many hours on two cores
    python -m benchmarks.fit_regret --sets animals --seeds 0 --steps 60 --output_dir results/try

For each set and seed: one fit on folds of the set; then the same search by the truth, which is the
miniature's held-out pictures (or reviews) that no fold has seen, on the whole set; both measured
at the same steps. Regret is (loss of the fit's final weights - lowest loss) / lowest loss, both
on the truth.

Finished runs are not repeated, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bilora_diffusion import mini
from bilora_diffusion.core.files import ROOT
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.run.folder import FIT_RECORD
from bilora_diffusion.run.record import read_metrics, read_run, read_search
from bilora_diffusion.run.runlog import is_finished
from bilora_diffusion.text import catalog
from bilora_diffusion.train.search.space import arguments
from eval import report, table
from eval.compare import mean, summaries
from eval.table import Entry, Metric, Result, Row, command_line, provenance_of_runs

IMAGE, TEXT = "train_dreambooth_bilora.py", "train_text_bilora.py"
# Options of all runs
COMMON = ["--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--report_to", "none"]
ICONS = ["--pretrained_model_name_or_path", "mini", "--learning_rate", "1e-3"]
REVIEWS = ["--model_name_or_path", "minilm", "--task_type", "classification", "--max_length", "64"]
SAMPLE = ["--method", "bilora", "--rho", "auto", "--auxiliaries", "sample"]
# Set of images -> its dataset, and the options that the search does not choose
DATASETS = {
    "icons": ["mini"],
    "icons-lora": ["mini", "--method", "lora"],
    "icons-sample": ["mini", *SAMPLE],
    "animals": ["mini-animals"],
}
# Shares are shown in percent, losses times 1000.
SHARE: Any = {"scale": 100, "form": ".2f"}
LOSS: Any = {"scale": 1000, "form": ".2f"}
METRICS = {
    "regret": Metric("regret, %", **SHARE),
    "constant": Metric("of its choice at its step, at the constant rate, %", **SHARE),
    "configuration": Metric("of its configuration at the best step, %", **SHARE),
    "other": Metric("of what is best with another seed, %", **SHARE),
    "gain": Metric("below the command as given, %", **SHARE),
    "choice": Metric("held-out loss x 1000 of its choice", **LOSS),
    "best": Metric("lowest in hindsight", **LOSS),
    "given": Metric("as given, at its end", **LOSS),
}
# Configuration -> step -> loss on the truth
Curves = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Task:
    """Command lines on a set: the script, its options, and those that choose the held-out data."""

    script: str
    options: list[str]
    # Nothing is held out, so that the folds are of the whole set
    without_heldout: list[str]
    # The truth is held out
    with_truth: list[str]


@dataclass(frozen=True)
class Measurement:
    """A fit on one set and seed."""

    # By the names of `METRICS`
    values: dict[str, float]
    # Configuration and steps that the fit chose
    choice: str
    curves: Curves


def make_task(name: str, folder: Path) -> Task:
    """The command lines on a set; data that is not shipped is written into the folder."""
    images = COMMON + ICONS
    images += ["--num_validation_images", "0"]
    nothing = ["--validation_dataset", "none"]
    # A quarter of the held-out pictures: all take too long.
    truth = ["--validation_part", "1/4", "--validation_dataset"]
    if name in DATASETS:
        images += ["--dataset"]
        images += DATASETS[name]
        truth.append(f"{DATASETS[name][0]}-heldout")
        return Task(IMAGE, images, nothing, truth)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "icons8":
        lines = (mini.train_dir() / "metadata.jsonl").read_text().splitlines()[:8]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for line in lines:
            icon = mini.train_dir() / json.loads(line)["file_name"]
            (folder / icon.name).write_bytes(icon.read_bytes())
        images += ["--dataset", str(folder), "--caption_column", "prompt"]
        truth.append("mini-heldout")
        return Task(IMAGE, images, nothing, truth)
    rows = catalog.packaged_rows(catalog.get("rotten_tomatoes"), "train")
    # The file is sorted by class, so rows are taken evenly: every 133rd is trained on, and every
    # 29th that is not among these is the truth.
    train_indices = range(0, len(rows), 133)
    truth_indices = [i for i in range(0, len(rows), 29) if i not in train_indices]
    _write_reviews(folder / "train.jsonl", [rows[i] for i in train_indices[:64]])
    _write_reviews(folder / "validation.jsonl", [rows[i] for i in truth_indices[:290]])
    reviews = COMMON + REVIEWS
    reviews += ["--learning_rate", "5e-4", "--lr_scheduler", "constant"]
    reviews += ["--train_file", str(folder / "train.jsonl")]
    return Task(TEXT, reviews, [], ["--validation_file", str(folder / "validation.jsonl")])


def _write_reviews(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        lines.append(json.dumps({"prompt": row["sentence"], "answer": str(row["label"])}) + "\n")
    file.write_text("".join(lines))


def run(script: str, folder: Path, *options: Sequence[str]) -> None:
    """Train a run with lists of options, or go on with it; a finished run is not repeated."""
    if is_finished(folder):
        return
    words = [sys.executable, str(ROOT / script)]
    for option_list in options:
        words += option_list
    words += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    subprocess.run(words, check=True, cwd=ROOT)


def measure(name: str, seed: int, steps: int, folder: Path) -> Measurement:
    """Fit on one set and seed, and search by the truth."""
    task = make_task(name, folder / name / "data")
    options = [*task.options, "--seed", str(seed), "--max_train_steps", str(steps)]
    runs = folder / name / f"seed-{seed}"
    run(task.script, runs / "fit", options, task.without_heldout, ["--fit"])
    record: Any = read_search(runs / "fit" / FIT_RECORD)
    choice = record["choice"]  # made without the truth
    loss_steps = ["--validation_loss_steps", str(record["settings"]["every"])]

    # The same search, judged by the truth.
    run(task.script, runs / "truth", options, task.with_truth, loss_steps, ["--fit"])
    true_record: Any = read_search(runs / "truth" / FIT_RECORD)
    curves: Curves = {}
    for entry in true_record["runs"]:
        curves[entry["title"]] = dict(zip(entry["steps"], entry["losses"], strict=True))
    command_loss = curves.pop("as given")[steps]

    # The choice is trained to its step if the search by the truth stopped it before.
    choice_curve = curves.setdefault(choice["title"], {})
    choice_options = arguments(tuple(choice["options"].items()))
    if choice["steps"] not in choice_curve:
        run(task.script, runs / "choice", options, choice_options, task.with_truth, loss_steps)
        for row in read_metrics(runs / "choice"):
            # null stands for a loss that is not finite
            if row.get(HELDOUT_LOSS) is not None:
                choice_curve[row["step"]] = row[HELDOUT_LOSS]

    # The choice as the last run of `--fit` trains it, with the schedule of that run. The loss of
    # that run itself is not of the truth.
    fit_config: Any = read_run(runs / "fit")["config"]
    schedule = [(key, str(fit_config[key])) for key in ("lr_scheduler", "max_train_steps")]
    last_options = arguments(tuple(schedule))
    run(task.script, runs / "last", options, choice_options, task.with_truth, last_options)
    choice_loss = read_metrics(runs / "last")[-1][HELDOUT_LOSS]
    best_loss, _, _ = lowest(curves)
    choice_best, _, _ = lowest({"": choice_curve})
    # Shares of the lowest loss; the gain is a share of the command's own loss.
    values = {
        "regret": choice_loss / best_loss - 1,
        "constant": choice_curve[choice["steps"]] / best_loss - 1,
        "configuration": choice_best / best_loss - 1,
        "gain": 1 - choice_loss / command_loss,
        "choice": choice_loss,
        "best": best_loss,
        "given": command_loss,
    }
    return Measurement(values, f"{choice['title']}, {choice['steps']} steps", curves)


def lowest(curves: Curves) -> tuple[float, str, int]:
    """The lowest loss after the start, its configuration and its step."""
    points = []
    for title, curve in curves.items():
        for step, loss in curve.items():
            if step > 0:
                points.append((loss, title, step))
    return min(points)


def loss_of_other_seeds(
    measured: dict[tuple[str, int], Measurement], key: tuple[str, int]
) -> float | None:
    """Mean loss with this seed of the configurations and steps that are best with the others.

    None if there is no other seed, or its best point was not measured with this one.
    """
    name, seed = key
    losses = []
    for (measured_name, measured_seed), measurement in measured.items():
        if measured_name == name and measured_seed != seed:
            _, configuration, step = lowest(measurement.curves)
            loss = measured[key].curves.get(configuration, {}).get(step)
            if loss is not None:
                losses.append(loss)
    if not losses:
        return None
    return mean(losses)


def result_of(
    measured: dict[tuple[str, int], Measurement], records: Any, argv: Sequence[str]
) -> Result:
    """The result of the sets and seeds that were measured so far."""
    rows = []
    entries = []
    for (name, seed), measurement in measured.items():
        values = dict(measurement.values)
        other_loss = loss_of_other_seeds(measured, (name, seed))
        if other_loss is not None:
            values["other"] = other_loss / values["best"] - 1
        label = f"{name}-{seed}"
        entries.append(Entry(label, name, seed=seed))
        for metric, value in values.items():
            rows.append(Row(label, name, seed, metric, value=value, note=measurement.choice))
    return Result(
        "fit_regret",
        entries,
        METRICS,
        provenance=provenance_of_runs(command_line("benchmarks.fit_regret", argv), records),
        rows=rows,
        summaries=summaries(rows),
    )


def page(result: Result) -> str:
    """The text of ``report.md``."""
    choices = {row.subject: row.note for row in result.select("choice")}
    rows = []
    for row in result.select("regret"):
        rows.append([row.subject, choices[row.subject], f"{row.value:.2%}"])
    gains: Any = [row.value for row in result.select("gain")]
    count = sum(gain > 0 for gain in gains)
    return report.page(
        "# Regret of --fit",
        str(__doc__).split("\n\n")[2],  # the paragraph on the method
        report.comparison(result, [report.Column(name) for name in METRICS]),
        f"Its choice is below the command as given in {count} of {len(gains)}.",
        report.table(["set and seed", "choice", "regret"], rows),
        report.closing(result),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the missing sets and seeds, and write the result after each."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=["icons", "icons8", "animals", "reviews"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/fit_regret"))
    parser.add_argument("--finished", action="store_true", help="leave out what is not finished")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    measured = {}
    records = []
    runs = args.runs_dir.absolute()
    for seed, name in itertools.product(args.seeds, args.sets):
        folder = runs / name / f"seed-{seed}"
        if args.finished and not is_finished(folder / "truth"):
            continue
        measured[name, seed] = measure(name, seed, args.steps, runs)
        records += [read_run(folder / "fit"), read_run(folder / "truth")]
        result = result_of(measured, records, argv)
        table.write(result, args.output_dir, page(result))


if __name__ == "__main__":
    main()
