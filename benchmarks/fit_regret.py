"""Regret of ``--fit``: its choice beside the best of its space in hindsight, on unseen data.

    python -m benchmarks.fit_regret --output_dir results/fit_regret    # many hours on two cores
    python -m benchmarks.fit_regret --sets animals --seeds 0 --steps 60 --output_dir results/try

For each set and seed: one fit on folds of the set; then the same search by the truth, which is the
miniature's held-out pictures (or reviews) that no fold has seen, on the whole set; both measured
at the same steps. Regret is the loss on the truth of what the fit's last run leaves, minus the
lowest of all that was measured there, as a share of that.

What is finished is not repeated, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bilora_diffusion import mini
from bilora_diffusion.core.files import ROOT
from bilora_diffusion.run.folder import FIT_RECORD
from bilora_diffusion.run.record import read_metrics, read_run, read_search
from bilora_diffusion.run.runlog import is_finished
from bilora_diffusion.text import catalog
from bilora_diffusion.train.search.space import arguments
from eval import report, table
from eval.compare import mean, summaries
from eval.table import Entry, Metric, Result, Row, command_line, of_runs

IMAGE, TEXT = "train_dreambooth_bilora.py", "train_text_bilora.py"
COMMON = ["--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--report_to", "none"]
ICONS = ["--pretrained_model_name_or_path", "mini", "--learning_rate", "1e-3"]
REVIEWS = ["--model_name_or_path", "minilm", "--task_type", "classification", "--max_length", "64"]
SAMPLE = ["--method", "bilora", "--rho", "auto", "--auxiliaries", "sample"]
DATASETS = {  # and what is fixed
    "icons": ["mini"],
    "icons-lora": ["mini", "--method", "lora"],
    "icons-sample": ["mini", *SAMPLE],
    "animals": ["mini-animals"],
}
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


def command(name: str, folder: Path) -> tuple[str, list[str], list[str], list[str]]:
    """Script and options of a set; what holds nothing out; and what holds the truth out."""
    images = [*COMMON, *ICONS, "--num_validation_images", "0"]
    none, part = ["--validation_dataset", "none"], ["--validation_part", "1/4"]
    if name in DATASETS:
        heldout = ["--validation_dataset", f"{DATASETS[name][0]}-heldout", *part]
        return IMAGE, [*images, "--dataset", *DATASETS[name]], none, heldout
    folder.mkdir(parents=True, exist_ok=True)
    if name == "icons8":
        lines = (mini.train_dir() / "metadata.jsonl").read_text().splitlines()[:8]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for file_name in (json.loads(line)["file_name"] for line in lines):
            (folder / Path(file_name).name).write_bytes((mini.train_dir() / file_name).read_bytes())
        images += ["--dataset", str(folder), "--caption_column", "prompt"]
        return IMAGE, images, none, ["--validation_dataset", "mini-heldout", *part]
    rows = catalog.packaged_rows(catalog.get("rotten_tomatoes"), "train")
    # The file is sorted by class.
    # Every 133rd row is trained on, and of every 29th the others judge.
    train_indices = range(0, len(rows), 133)
    validation_indices = [i for i in range(0, len(rows), 29) if i not in train_indices]
    _write_reviews(folder / "train.jsonl", [rows[i] for i in train_indices[:64]])
    _write_reviews(folder / "validation.jsonl", [rows[i] for i in validation_indices[:290]])
    base = [*COMMON, *REVIEWS, "--learning_rate", "5e-4", "--lr_scheduler", "constant"]
    base += ["--train_file", str(folder / "train.jsonl")]
    return TEXT, base, [], ["--validation_file", str(folder / "validation.jsonl")]


def _write_reviews(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps({"prompt": row["sentence"], "answer": str(row["label"])}) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))


def run(script: str, options: Sequence[str], folder: Path) -> None:
    """Train, or go on; nothing where that was done."""
    if not is_finished(folder):
        line = [sys.executable, str(ROOT / script), *options, "--output_dir", str(folder)]
        subprocess.run([*line, "--resume_from_checkpoint", "auto"], check=True, cwd=ROOT)


def measure(name: str, seed: int, steps: int, folder: Path) -> tuple[dict[str, float], str, Any]:
    """Figures of one set and seed, the choice, and all curves on the truth by configuration."""
    script, base, no_heldout, truth = command(name, folder / name / "data")
    base += ["--seed", str(seed), "--max_train_steps", str(steps)]
    runs = folder / name / f"seed-{seed}"
    run(script, [*base, *no_heldout, "--fit"], runs / "fit")
    record: Any = read_search(runs / "fit" / FIT_RECORD)
    choice = record["choice"]  # made without the truth
    measured = ["--validation_loss_steps", str(record["settings"]["every"])]

    # The same search, judged by the truth: configuration -> step -> loss.
    run(script, [*base, *truth, *measured, "--fit"], runs / "truth")
    true_record: Any = read_search(runs / "truth" / FIT_RECORD)
    curves: dict[str, dict[int, float]] = {}
    for entry in true_record["runs"]:
        curves[entry["title"]] = dict(zip(entry["steps"], entry["losses"], strict=True))
    command_loss = curves.pop("as given")[steps]

    # The choice's own curve, where the search on the truth stopped before its step.
    choice_curve = curves.setdefault(choice["title"], {})
    chosen = [*base, *arguments(tuple(choice["options"].items())), *truth]
    if choice["steps"] not in choice_curve:
        run(script, [*chosen, *measured], runs / "choice")
        for row in read_metrics(runs / "choice"):
            if row.get("heldout_loss"):
                choice_curve[row["step"]] = row["heldout_loss"]

    # The choice as `--fit` trains with it in the end, by its own schedule.
    fit_config: Any = read_run(runs / "fit")["config"]  # of its last run, which saw no truth
    schedule = [(key, str(fit_config[key])) for key in ("lr_scheduler", "max_train_steps")]
    run(script, [*chosen, *arguments(tuple(schedule))], runs / "last")
    choice_loss = read_metrics(runs / "last")[-1]["heldout_loss"]
    best_loss, _, _ = lowest(curves)
    choice_best, _, _ = lowest({"": choice_curve})
    values = {
        "regret": choice_loss / best_loss - 1,
        "constant": choice_curve[choice["steps"]] / best_loss - 1,
        "configuration": choice_best / best_loss - 1,
        "gain": 1 - choice_loss / command_loss,
        "choice": choice_loss,
        "best": best_loss,
        "given": command_loss,
    }
    return values, f"{choice['title']}, {choice['steps']} steps", curves


def lowest(curves: dict[str, dict[int, float]]) -> tuple[float, str, int]:
    """The lowest loss, its configuration and its step."""
    points = []
    for title, curve in curves.items():
        points += [(loss, title, step) for step, loss in curve.items() if step > 0]
    return min(points)


def result_of(measured: dict[tuple[str, int], Any], records: Any, argv: Sequence[str]) -> Result:
    """The result of all that was measured so far."""
    rows, entries = [], []
    for (name, seed), (values, title, curves) in measured.items():
        # What the best points of the set's other seeds come to here.
        losses = []
        for (other_name, other_seed), (_, _, other_curves) in measured.items():
            if other_name == name and other_seed != seed:
                _, configuration, step = lowest(other_curves)
                loss = curves.get(configuration, {}).get(step)
                if loss:
                    losses.append(loss)
        if losses:
            values["other"] = mean(losses) / values["best"] - 1
        label = f"{name}-{seed}"
        entries.append(Entry(label, name, seed=seed))
        for metric, value in values.items():
            rows.append(Row(label, name, seed, metric, value=value, note=title))
    origin, lines = of_runs(command_line("benchmarks.fit_regret", argv), records), summaries(rows)
    return Result("fit_regret", entries, METRICS, provenance=origin, rows=rows, summaries=lines)


def page(result: Result) -> str:
    """``report.md``."""
    chosen = {row.subject: row.note for row in result.select("choice")}
    regrets: Any = {row.subject: row.value for row in result.select("regret")}
    gains: Any = [row.value for row in result.select("gain")]
    rows = [[name, title, f"{regrets[name]:.2%}"] for name, title in chosen.items()]
    return report.page(
        "# Regret of --fit",
        str(__doc__).split("\n\n")[2],
        report.comparison(result, [report.Column(name) for name in METRICS]),
        f"Its choice is below the command as given in {sum(g > 0 for g in gains)} of {len(gains)}.",
        report.table(["set and seed", "choice", "regret"], rows),
        report.closing(result),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the result after each set and seed."""
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
    measured, records, runs = {}, [], args.runs_dir.absolute()
    for seed, name in itertools.product(args.seeds, args.sets):
        if args.finished and not is_finished(runs / name / f"seed-{seed}" / "truth"):
            continue
        measured[name, seed] = measure(name, seed, args.steps, runs)
        records += [read_run(runs / name / f"seed-{seed}" / part) for part in ("fit", "truth")]
        result = result_of(measured, records, argv)
        table.write(result, args.output_dir, page(result))


if __name__ == "__main__":
    main()
