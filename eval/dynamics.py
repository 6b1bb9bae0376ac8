"""How the adapters move while they are trained: Figures 2, A2 and A4 from recorded runs.

    python -m eval.dynamics runs/lora-sam runs/bilora
    python -m eval.dynamics runs/bilora-seed0 runs/bilora-seed1 runs/bilora-10x-seed0 \\
        --output_dir results/dynamics
    python -m eval.dynamics --group "eta_2 = eta_1=runs/a,runs/b" --group "10 eta_1=runs/c,runs/d"
    python -m eval.dynamics runs/lora-sam --layer unet.mid_block.attentions.0.proj_in

The runs have to be trained with --log_dynamics. Runs of one method and setting that differ in the
seed are repeats; the others are told apart by what differs in their settings.
Writes ``dynamics.json``, ``dynamics.md`` and the figures as PNG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import run_cli

from .curves import dynamics_plots, dynamics_report, groups, output
from .curves.courses import ALL
from .curves.dynamics_result import DynamicsResult, measure
from .provenance import command_line
from .sweep import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Read, sum up and draw.

    Returns:
        The exit code: 0, or 2 after a sentence that says what to mend.
    """
    words = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        args = parser().read(words)
        found = groups.gather(args.runs, args.group)
        folder = output.open_folder(args.output_dir)
        write(measure(found, args.layer, command_line("eval.dynamics", words)), folder)

    return run_cli(work)


def parser() -> Parser:
    """The command line."""
    described = (__doc__ or "").split("\n\n")
    found = Parser(
        prog="python -m eval.dynamics",
        description=described[0],
        epilog="\n\n".join(described[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups.add_arguments(found)
    found.add_argument("--layer", default=ALL, metavar="NAME", help="one layer's name, or all")
    found.add_argument("--output_dir", type=Path, default=Path("results/dynamics"))
    return found


def write(result: DynamicsResult, folder: Path) -> None:
    """Write all files and print the report."""
    drawn = replace(result, figures=dynamics_plots.draw(result, folder))
    report = dynamics_report.to_markdown(drawn)
    write_text(folder / "dynamics.json", drawn.to_json())
    write_text(folder / "dynamics.md", report)
    names = ", ".join(["dynamics.json", "dynamics.md", *drawn.figures])
    print(f"{report}\nwritten: {folder}/{names}")


if __name__ == "__main__":
    sys.exit(main())
