"""Training loss, held-out loss and their gap over training (Figure A3).

    python -m eval.generalization runs/heldout_loss/*
    python -m eval.generalization runs/lora-seed0 runs/bilora-seed0 --control LoRA \\
        --output_dir results/generalization
    python -m eval.generalization --group "LoRA=runs/a,runs/b" --group "rho 1=runs/c,runs/d"

The runs have to be trained with --validation_dataset and --validation_loss_steps (recipes/mini.yaml
does both). Runs of one method and setting that differ in the seed are repeats; differences to the
control are paired by seed.
Writes ``generalization.json``, ``generalization.md`` and ``generalization.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import run_cli

from .curves import generalization_plot, generalization_report, groups, output
from .curves.generalization_result import GeneralizationResult, compare
from .provenance import command_line
from .sweep import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Read, compare and draw.

    Returns:
        The exit code: 0, or 2 after a sentence that says what to mend.
    """
    words = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        args = parser().read(words)
        found = groups.gather(args.runs, args.group)
        folder = output.open_folder(args.output_dir)
        write(compare(found, args.control, command_line("eval.generalization", words)), folder)

    return run_cli(work)


def parser() -> Parser:
    """The command line."""
    described = (__doc__ or "").split("\n\n")
    found = Parser(
        prog="python -m eval.generalization",
        description=described[0],
        epilog="\n\n".join(described[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups.add_arguments(found)
    found.add_argument(
        "--control", help="label of the group to compare with; default: LoRA, or the first"
    )
    found.add_argument("--output_dir", type=Path, default=Path("results/generalization"))
    return found


def write(result: GeneralizationResult, folder: Path) -> None:
    """Write all files and print the report."""
    drawn = replace(result, figures=generalization_plot.draw(result, folder))
    report = generalization_report.to_markdown(drawn)
    write_text(folder / "generalization.json", drawn.to_json())
    write_text(folder / "generalization.md", report)
    names = ", ".join(["generalization.json", "generalization.md", *drawn.figures])
    print(f"{report}\nwritten: {folder}/{names}")


if __name__ == "__main__":
    sys.exit(main())
