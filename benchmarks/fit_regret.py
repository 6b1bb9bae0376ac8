"""Regret of ``--fit``: its choice beside the best of its space in hindsight, on unseen data.

    python -m benchmarks.fit_regret --output_dir results/fit_regret    # many hours on two cores
    python -m benchmarks.fit_regret --sets animals --seeds 0 --steps 60 --output_dir results/try

For each set and seed: one fit on folds of the set; then each configuration that it tried, and the
command as given, trained on the whole set and measured on the miniature's held-out pictures (or
reviews) all along. Regret is the loss of the choice at its step minus the lowest of all
configurations and steps, as a share of that. What is finished is not repeated, so that the same
command goes on. Writes rows.csv and report.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bilora_diffusion import mini
from bilora_diffusion.run.folder import FIT_RECORD
from bilora_diffusion.run.paths import ROOT
from bilora_diffusion.run.record import read_fit, read_metrics
from bilora_diffusion.run.runlog import is_finished
from bilora_diffusion.text import catalog
from bilora_diffusion.train.fit.space import words

IMAGE, TEXT = "train_dreambooth_bilora.py", "train_text_bilora.py"
COMMON = ["--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--report_to", "none"]
ICONS = ["--pretrained_model_name_or_path", "mini", "--learning_rate", "1e-3"]
REVIEWS = ["--model_name_or_path", "minilm", "--task_type", "classification", "--max_length", "64"]
DATASETS = {"icons": "mini", "animals": "mini-animals"}
TRUTH_BUDGET = 15
"""Runs of the whole length that the search by the truth may cost."""
COLUMNS = ("set", "seed", "choice", "steps", "loss", "given", "best", "regret")


def command(name: str, folder: Path) -> tuple[str, list[str], list[str], list[str]]:
    """Script and options of a set; what holds nothing out; and what holds the truth out."""
    images = [*COMMON, *ICONS, "--num_validation_images", "0"]
    none, part = ["--validation_dataset", "none"], ["--validation_part", "1/4"]
    if name in DATASETS:
        heldout = ["--validation_dataset", f"{DATASETS[name]}-heldout", *part]
        return IMAGE, [*images, "--dataset", DATASETS[name]], none, heldout
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


def measure(name: str, seed: int, steps: int, folder: Path) -> tuple[Any, ...]:
    """The row of one set and seed."""
    script, base, none, truth = command(name, folder / name / "data")
    base += ["--seed", str(seed), "--max_train_steps", str(steps)]
    place = folder / name / f"seed-{seed}"
    run(script, [*base, *none, "--fit"], place / "fit")
    record: Any = read_fit(place / "fit" / FIT_RECORD)
    choice = record["choice"]
    every = ["--validation_loss_steps", str(record["settings"]["every"])]
    budget = ["--fit_budget", str(TRUTH_BUDGET * steps)]
    run(script, [*base, *truth, *every, *budget, "--fit"], place / "truth")
    known: Any = read_fit(place / "truth" / FIT_RECORD)
    curves = {
        one["title"]: dict(zip(one["steps"], one["losses"], strict=True)) for one in known["runs"]
    }
    last = curves.pop("as given")[steps]
    own = curves.setdefault(choice["title"], {})
    if choice["steps"] not in own:
        alone = [*words(tuple(choice["options"].items())), *truth, *every]
        run(script, [*base, *alone], place / "choice")
        rows = read_metrics(place / "choice")
        own |= {row["step"]: row["heldout_loss"] for row in rows if row.get("heldout_loss")}
    loss = own[choice["steps"]]
    best = min(value for one in curves.values() for step, value in one.items() if step)
    return name, seed, choice["title"], choice["steps"], loss, last, best, loss / best - 1


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the table after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=["icons", "icons8", "animals", "reviews"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/fit_regret"))
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        for name in args.sets:
            rows.append(measure(name, seed, args.steps, args.runs_dir.absolute()))
            with (args.output_dir / "rows.csv").open("w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *rows])
            shown = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
            lines = [" | ".join(row) for row in (COLUMNS, ["---"] * len(COLUMNS), *shown)]
            table = "\n".join(f"| {line} |" for line in lines)
            (args.output_dir / "report.md").write_text(f"# Regret of --fit\n\n{table}\n")
            print(table, flush=True)


if __name__ == "__main__":
    main()
