"""Train a grid of arms and seeds, and compare the arms with a control, paired by seed.

    python -m eval.sweep recipes/mini.yaml --over method=lora,bilora seed=0..4
    python -m eval.sweep recipes/mini.yaml --over method=lora,bilora seed=0..4 rho=0.01,0.05,0.1 \\
        --control method=lora --output_dir results/rho
    python -m eval.sweep recipes/mini.yaml --arms arms.yaml --over seed=0..4
    python -m eval.sweep recipes/mini.yaml --over method=lora,bilora seed=0,1 \\
        --set max_train_steps=2 num_validation_images=0 --runs_dir runs/try   # minutes on a CPU

``arms.yaml`` maps labels to options, for comparisons that are no product:

    lora: {method: lora}
    lora + EMA: {method: lora, use_ema: true}

Every cell is checked by the training script's own parser before the first one runs. A finished cell
is not repeated and an interrupted one goes on, so the same command can be given again at any time.
Writes ``sweep.json``, ``.csv``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import UserError

from . import axes, cells
from .command import Parser, open_folder, run
from .grid import HELDOUT, Grid, Planner, open_script
from .provenance import command_line
from .records import SWEEP

if TYPE_CHECKING:  # imported where it is used, so that --help does not wait for torch
    from .sweep_result import SweepResult


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep.

    Returns:
        The exit code: 0; 1 when a cell failed; 2 after a sentence that says what to mend; 130 when
        it was interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    command = command_line("eval.sweep", words)
    return run(lambda: int(not sweep(_parser().read(words), command)))


def _parser() -> Parser:
    parser = Parser("eval.sweep", __doc__)
    parser.add_argument("recipe", type=Path, help="YAML file of options that all cells share")
    parser.add_argument(
        "--over",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="axes: name=v1,v2 or name=a..b (whole numbers, b included); seed is the axis of pairs",
    )
    parser.add_argument("--arms", type=Path, help="YAML file: label to mapping of options")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of all cells"
    )
    parser.add_argument(
        "--control", help="the arm to compare with, by label or by option; default: the first"
    )
    parser.add_argument("--metric", default=HELDOUT, help="key in metrics.jsonl")
    parser.add_argument(
        "--higher_is_better", action="store_true", help="of the metric, such as accuracy"
    )
    parser.add_argument("--output_dir", type=Path, help="default: sweep, in --runs_dir")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/sweep"))
    parser.add_argument(
        "--launch",
        default="",
        metavar="ARGUMENTS",
        help='for accelerate launch, such as --launch="--num_processes 2 --multi_gpu"',
    )
    parser.add_argument(
        "--script", default="train_dreambooth_bilora.py", help="the training script"
    )
    parser.add_argument("--dry_run", action="store_true", help="check and list the cells only")
    return parser


def sweep(args: argparse.Namespace, command: str) -> bool:
    """Plan, run, compare and write.

    Args:
        args: see ``--help``.
        command: for the provenance.

    Returns:
        Whether every cell is finished.

    Raises:
        UserError: bad input; nothing was run.
        KeyboardInterrupt: Ctrl-C; the running cell has been ended.
    """
    if not args.recipe.is_file():
        raise UserError(f'there is no recipe "{args.recipe}": correct the first argument.')
    script, launch = open_script(args.script), shlex.split(args.launch)
    planner = Planner(args.recipe, script, axes.settings(args.set, "--set"), launch, args.metric)
    arms = axes.load_arms(args.arms) if args.arms else {}
    grid = planner.grid(axes.axes(args.over), arms)
    control = grid.control(args.control).label
    runner = cells.Runner(script.path, args.recipe, args.runs_dir, launch)
    print(_plan(grid, control))
    if args.dry_run:
        for cell in grid.cells:
            print(f"\n{cell.name} ({cells.state(args.runs_dir / cell.name)})")
            print(cells.shown(runner.command(cell)))
        return True
    open_folder(args.runs_dir, "--runs_dir")
    output = open_folder(args.output_dir or args.runs_dir / "sweep")  # before the first cell
    outcomes = runner.run_all(grid.cells)
    from . import sweep_result

    result = sweep_result.compare(
        grid,
        outcomes,
        args.runs_dir,
        control=control,
        metric=args.metric,
        higher_is_better=args.higher_is_better,
        recipe=args.recipe,
        command=command,
    )
    write(result, output)
    return _report_failures(outcomes, args.runs_dir)


def write(result: SweepResult, folder: Path) -> None:
    """Write the four files and print the table."""
    from . import sweep_plot, sweep_table

    table = sweep_table.to_markdown(result)
    SWEEP.write(result, folder)
    write_text(folder / "sweep.csv", sweep_table.to_csv(result))
    write_text(folder / "sweep.md", table)
    sweep_plot.plot(result, folder / "sweep.png")
    print(f"\n{table}\nwritten: {folder}/sweep.json, .csv, .md, .png")


def _plan(grid: Grid, control: str) -> str:
    lines = [f"{len(grid.arms)} arms x {len(grid.seeds)} seeds = {len(grid.cells)} cells"]
    for arm in grid.arms:
        note = " (control)" if arm.label == control else ""
        also = f" (the same run: {', '.join(arm.also)})" if arm.also else ""
        lines.append(f"  {arm.label}{note}{also}")
    return "\n".join(lines)


def _report_failures(outcomes: Sequence[cells.Outcome], runs_dir: Path) -> bool:
    failed = [outcome for outcome in outcomes if outcome.status != "finished"]
    if failed:
        said = "; ".join(f"{o.cell} (exit code {o.exit_code}: {o.error})" for o in failed)
        print(
            f"error: {len(failed)} of {len(outcomes)} cells failed: {said}. Their logs are"
            f" {runs_dir}/<cell>.log, and the same command tries them again.",
            file=sys.stderr,
        )
    return not failed


if __name__ == "__main__":
    sys.exit(main())
