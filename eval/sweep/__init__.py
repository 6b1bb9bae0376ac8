"""``python -m eval.sweep``: an experiment is a file, and this command trains and compares its runs.

``command.py`` explains the files. An experiment (``experiment.py``) becomes a plan of runs
(``plan.py``), which are trained in processes (``runs.py``). With ``scores`` their checkpoints are
sampled and scored too (``scored.py``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bilora_diffusion.core.errors import UserError

from ..command import run
from ..results.table import command_line
from .command import Sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Check all experiments, then train and compare one after another; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    command = command_line(f"eval.{Sweep.name}", words)

    def work() -> int:
        args = Sweep.parser().read(words)
        # All plans are checked before the first run starts.
        codes = [sweep.work() or 0 for sweep in make_sweeps(args, command)]
        return max(codes)

    return run(work)


def make_sweeps(args: argparse.Namespace, command: str) -> list[Sweep]:
    """The comparisons of a command line, one for each recipe of each experiment."""
    # Here, so that --help does not wait for torch.
    from .plan import load
    from .scored import ScoredSweep

    keys = {"seeds": args.seeds, "metric": args.metric}
    scores_keys = {name: getattr(args, name) for name in ("steps", "guidances", "max_prompts")}
    sweeps: list[Sweep] = []
    for path in args.experiments:
        for plan in load(path, args.set, keys, scores_keys, args.variants):
            kind = Sweep if plan.experiment.scores is None else ScoredSweep
            sweeps.append(kind(args, command, plan))
    if args.output_dir is not None and len(sweeps) > 1:
        raise UserError(
            f"--output_dir is one folder for {len(sweeps)} comparisons: leave it out, then each is"
            " written beside its runs."
        )
    if args.processes is not None and not any(isinstance(s, ScoredSweep) for s in sweeps):
        raise UserError("--processes is for samples, and no experiment has scores: leave it out.")
    return sweeps
