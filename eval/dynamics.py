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

import sys

from .curves.output import Reading, Work
from .records import DYNAMICS


def _work() -> Work:
    from .curves import dynamics_plots, dynamics_report
    from .curves.courses import ALL
    from .curves.dynamics_result import measure

    return Work(
        lambda found, args, command: measure(found, args.layer or ALL, command),
        dynamics_plots.draw,
        dynamics_report.to_markdown,
    )


main = Reading(
    DYNAMICS,
    __doc__,
    ("--layer", {"metavar": "NAME", "help": "one layer's name, or all; default: all"}),
    _work,
).main

if __name__ == "__main__":
    sys.exit(main())
