"""How flat the minima are that runs end in (the paper's Fig. 3): loss around them, sharpness.

    python -m eval.landscape runs/lora runs/bilora
    python -m eval.landscape runs/sweep/method-*/ --eigenvalue --output_dir results/landscape
    python -m eval.landscape base --group "rho 0.05=runs/a,runs/b" --group "rho 1=runs/c,runs/d"
    python -m eval.landscape runs/lora --directions 1 --points 5 --grid 0 --max_images 2 --levels 1

Loss along filter-normalized random directions and on a plane of two, the largest loss within a ball
(SAM sharpness) and, with --eigenvalue, the largest eigenvalue of the Hessian; all of them in the
space of the LoRA factors and in that of the model's own weights. Runs of one method are repetitions
of one another. What was measured is kept, so an interrupted command goes on where it stopped, and
two commands with different runs and the same --output_dir may run at the same time.

Writes landscape.json, .md, .png and landscape_grid.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from bilora_diffusion.choices import NOISE_LEVELS
from bilora_diffusion.durable import write_text

from .command import Parser, run
from .groups import add_arguments
from .provenance import command_line, of_runs
from .records import LANDSCAPE

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from .flatness.plan import Plan
    from .flatness.result import RunResult


def main(argv: Sequence[str] | None = None) -> int:
    """Look at the runs.

    Returns:
        The exit code: 0; 2 after a sentence that says what to mend; 130 when it was interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    command = command_line("eval.landscape", words)
    return run(lambda: landscape(_parser().read(words), command))


def _parser() -> Parser:
    parser = Parser("eval.landscape", __doc__)
    add_arguments(parser, 'run folders, or "base" for the model before')
    add = parser.add_argument
    add("--control", help="the group to compare with; default: the first")
    add("--space", default="lora,full", help="lora, full, or both with a comma")
    add("--full_weights", default="all", help="all weights of the trained models, or adapted ones")
    add("--directions", type=int, default=3, help="random directions of each profile")
    add("--radius", type=float, default=1.0, help="of profiles and plane in the LoRA space")
    add("--full_radius", type=float, default=0.3, help="the same in the full space")
    add("--points", type=int, default=21, help="of each profile, odd")
    add("--grid", type=int, default=11, help="points of the plane's axes, odd; 0 for none")
    add(
        "--grid_runs",
        type=int,
        default=1,
        help="runs of each group whose planes are averaged; 0 for all",
    )
    add("--rho", type=float, default=0.05, help="radius of the SAM sharpness")
    add("--ascent_steps", type=int, default=10, help="steps of its gradient ascent")
    add("--restarts", type=int, default=0, help="further ascents from random points")
    add("--eigenvalue", action="store_true", help="also the top eigenvalue of the Hessian")
    add("--split", default="train", help="images of the loss: train or heldout")
    add("--max_images", type=int, default=8, help="the first so many of them; 0 for all")
    add("--levels", type=int, default=4, help=f"noise levels of the loss, 1 to {NOISE_LEVELS}")
    add("--seed", type=int, default=0, help="of directions and starts")
    add("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_output("landscape")
    return parser


def landscape(args: argparse.Namespace, command: str) -> None:
    """Plan, measure, sum up and write.

    Args:
        args: see ``--help``.
        command: for the provenance.

    Raises:
        UserError: bad input; nothing was measured.
        KeyboardInterrupt: Ctrl-C; what was measured is kept.
    """
    from bilora_diffusion.run.console import quiet

    from .flatness import plan, plot, report
    from .flatness.groups import summarize
    from .flatness.result import LandscapeResult

    quiet()
    planned = plan.make(args)
    entries = measure_all(planned, args.output_dir)
    records = [subject.record for subject in planned.found if subject.record]
    made = of_runs(command, records)
    result = LandscapeResult(
        runs=[entry.label for entry in entries],
        settings=planned.settings,
        control=planned.control,
        groups=summarize(entries, planned.control),
        entries=entries,
        figures=[],
        provenance=asdict(made),
    )
    result = replace(result, figures=plot.draw(result, args.output_dir))
    text = report.to_markdown(result, made)
    write_text(args.output_dir / "landscape.md", text)
    LANDSCAPE.write(result, args.output_dir)
    files = ", ".join(["landscape.json", "landscape.md", *result.figures])
    print(f"{text}\nwritten to {args.output_dir}: {files}")


def measure_all(planned: Plan, folder: Path) -> list[RunResult]:
    """Measure every run, one model in memory at a time; what is in ``folder`` already is kept."""
    from .flatness import measure, models
    from .flatness.store import Store

    costs = [
        sum(
            part.cost
            for space in planned.settings.spaces
            if space != "lora" or subject.has_factors
            for part in measure.parts(space, planned.settings, subject.label in planned.with_grid)
        )
        for subject in planned.found
    ]
    entries = []
    with tqdm(total=sum(costs), unit="loss", smoothing=0.05) as bar:
        for subject, images in zip(planned.found, planned.images, strict=True):
            bar.set_description(subject.label)
            entries.append(
                measure.run(
                    subject,
                    planned.settings,
                    Store(folder, planned.about(subject, images)),
                    # Bound now: the loop goes on.
                    lambda subject=subject, images=images: models.load(
                        subject,
                        images,
                        planned.sample,
                        planned.settings.spaces,
                        planned.settings.full_weights,
                    ),
                    with_grid=subject.label in planned.with_grid,
                    advance=bar.update,
                )
            )
    return entries


if __name__ == "__main__":
    sys.exit(main())
