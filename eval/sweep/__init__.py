"""``python -m eval.sweep``: train and compare the runs of an experiment, which is a YAML file.

``command.py`` explains these files. An experiment (``experiment.py``) becomes a plan of runs for
each of its recipes (``plan.py``), and each run is trained in a separate process (``runs.py``). With
the key ``scores``, the checkpoints of the runs are sampled and scored too (``scored.py``).
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
    """Check all experiments, then train and compare them one by one, and return the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    command = command_line(f"eval.{Sweep.name}", words)

    def work() -> int:
        args = Sweep.parser().read(words)
        # All plans are checked before the first run starts.
        codes = [sweep.work() or 0 for sweep in make_sweeps(args, command)]
        return max(codes)

    return run(work)


def make_sweeps(args: argparse.Namespace, command: str) -> list[Sweep]:
    """Return the sweeps of a command line, one for each recipe of each experiment."""
    # Imported here, so that --help does not wait for torch.
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
            f"--output_dir is one folder for {len(sweeps)} comparisons: leave it out, and each one"
            " is written next to its runs."
        )
    if args.processes is not None and not any(isinstance(s, ScoredSweep) for s in sweeps):
        raise UserError("--processes is for sampling, and no experiment has scores: leave it out.")
    return sweeps
