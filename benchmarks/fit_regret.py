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
from eval.provenance import command_line, of_runs
from eval.table import Entry, Metric, Result, Row

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
    for split, every, count in (("train", 133, 64), ("validation", 29, 290)):
        own = [r for i, r in enumerate(rows) if not i % every and (split == "train" or i % 133)]
        lines = [{"prompt": r["sentence"], "answer": str(r["label"])} for r in own[:count]]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text)
    base = [*COMMON, *REVIEWS, "--learning_rate", "5e-4", "--lr_scheduler", "constant"]
    base += ["--train_file", str(folder / "train.jsonl")]
    return TEXT, base, [], ["--validation_file", str(folder / "validation.jsonl")]


def run(script: str, options: Sequence[str], folder: Path) -> None:
    """Train, or go on; nothing where that was done."""
    if not is_finished(folder):
        line = [sys.executable, str(ROOT / script), *options, "--output_dir", str(folder)]
        subprocess.run([*line, "--resume_from_checkpoint", "auto"], check=True, cwd=ROOT)


def measure(name: str, seed: int, steps: int, folder: Path) -> tuple[dict[str, float], str, Any]:
    """Figures of one set and seed, the choice, and all curves on the truth by configuration."""
    script, base, none, truth = command(name, folder / name / "data")
    base += ["--seed", str(seed), "--max_train_steps", str(steps)]
    place = folder / name / f"seed-{seed}"
    run(script, [*base, *none, "--fit"], place / "fit")
    record: Any = read_search(place / "fit" / FIT_RECORD)
    choice = record["choice"]
    every = ["--validation_loss_steps", str(record["settings"]["every"])]
    run(script, [*base, *truth, *every, "--fit"], place / "truth")
    known: Any = read_search(place / "truth" / FIT_RECORD)
    pairs = ((one["title"], zip(one["steps"], one["losses"], strict=True)) for one in known["runs"])
    curves = {title: dict(curve) for title, curve in pairs}
    given, own = curves.pop("as given")[steps], curves.setdefault(choice["title"], {})
    alone = [*base, *arguments(tuple(choice["options"].items())), *truth]
    if choice["steps"] not in own:
        run(script, [*alone, *every], place / "choice")
        rows = read_metrics(place / "choice")
        own |= {row["step"]: row["heldout_loss"] for row in rows if row.get("heldout_loss")}
    last: Any = read_run(place / "fit")["config"]  # of its last run, which saw no truth
    course = ((name, str(last[name])) for name in ("lr_scheduler", "max_train_steps"))
    run(script, [*alone, *arguments(tuple(course))], place / "last")
    left, (best, *_) = read_metrics(place / "last")[-1]["heldout_loss"], lowest(curves)
    values = {"regret": left / best - 1, "constant": own[choice["steps"]] / best - 1}
    values |= {"configuration": lowest({"": own})[0] / best - 1, "gain": 1 - left / given}
    values |= {"choice": left, "best": best, "given": given}
    return values, f"{choice['title']}, {choice['steps']} steps", curves


def lowest(curves: dict[str, dict[int, float]]) -> tuple[float, str, int]:
    """The lowest loss, its configuration and its step."""
    return min((v, title, s) for title, curve in curves.items() for s, v in curve.items() if s)


def result_of(measured: dict[tuple[str, int], Any], records: Any, argv: Sequence[str]) -> Result:
    """The result of all that was measured so far."""
    rows, entries = [], []
    for (name, seed), (values, title, curves) in measured.items():
        others = [lowest(m[2]) for (n, s), m in measured.items() if n == name and s != seed]
        there = [curves.get(config, {}).get(step) for _, config, step in others]
        if losses := [loss for loss in there if loss]:
            values["other"] = mean(losses) / values["best"] - 1
        label = f"{name}-{seed}"
        entries.append(Entry(label, name, seed=seed))
        rows += [Row(label, name, seed, n, value=v, note=title) for n, v in values.items()]
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
