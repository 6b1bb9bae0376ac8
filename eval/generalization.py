"""Training loss, held-out loss and their gap over training (Figure A3).

    python -m eval.generalization runs/heldout_loss/*
    python -m eval.generalization runs/lora-seed0 runs/bilora-seed0 --control LoRA \\
        --output_dir results/generalization
    python -m eval.generalization --group "LoRA=runs/a,runs/b" --group "rho 1=runs/c,runs/d"

Runs that make images have to be trained with --validation_dataset and --validation_loss_steps
(recipes/mini.yaml does both), runs on text with --validation_loss_steps and --eval_train_samples.
Runs of one method and setting that differ in the seed are repeats; differences to the control are
paired by seed.
Writes ``generalization.json``, ``generalization.md`` and ``generalization.png``.
"""

from __future__ import annotations

import sys

from .curves.output import Reading, Work
from .records import GENERALIZATION


def _work() -> Work:
    from .curves import generalization_plot, generalization_report
    from .curves.generalization_result import compare

    return Work(
        lambda found, args, command: compare(found, args.control, command),
        generalization_plot.draw,
        generalization_report.to_markdown,
    )


main = Reading(
    GENERALIZATION,
    __doc__,
    ("--control", {"help": "label of the group to compare with; default: LoRA, or the first"}),
    _work,
).main

if __name__ == "__main__":
    sys.exit(main())
