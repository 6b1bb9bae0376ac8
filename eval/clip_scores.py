"""Score adapters by CLIP: images from a prompt set, I2T, T2T and more, compared prompt by prompt.

    make demo && python -m eval.clip_scores                # the demo's two runs and the base model
    python -m eval.clip_scores runs/lora runs/bilora base --max_prompts 6 --seeds 0  # a minute
    python -m eval.clip_scores LoRA=runs/a Bi-LoRA=runs/b --seeds 0..3 --output_dir results/scores
    python -m eval.clip_scores some/lora-on-the-hub base --prompts my_prompts.txt \\
        --base_model stabilityai/stable-diffusion-xl-base-1.0
    accelerate launch -m eval.clip_scores runs/lora runs/bilora          # images on several GPUs

An adapter is a run folder, a LoRA file, a hub id, or `base` for none; LABEL=ADAPTER names it. All
get the same prompts and the same initial noise. Images are kept as PNG files with their parameters,
so an interrupted run continues by the same command and nothing is generated twice. The general
prompts measure drift from the base model. Writes scores.json, scores.csv, report.md, PNG plots and
a grid of images.

Scorer and captioner default to the embedded ones for the miniature, and otherwise to
{scorer} and {captioner}; the paper names neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import UserError

from .command import Parser, open_device, open_folder, run
from .provenance import command_line
from .records import SCORES
from .scores.names import CAPTIONERS, DEMO, GENERAL_CAPTIONER, GENERAL_SCORER, PRECISIONS, SCORERS

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from accelerate import PartialState

    from .scores.captioners import Captioner
    from .scores.plan import Plan
    from .scores.schema import ScoresResult
    from .scores.scorers import Scorer
    from .scores.store import Job, Store

DEFAULT_SEEDS = "0,1"
IMAGES = "images"


def main(argv: Sequence[str] | None = None) -> int:
    """Score and compare.

    Returns:
        The exit code: 0; 2 after a sentence that says what to mend; 130 when it was interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        args = _parser().read(words)
        if argv is None:
            _start_missing_processes(words)
        score(args, command_line("eval.clip_scores", words))

    return run(work)


def _parser() -> Parser:
    described = (__doc__ or "").format(scorer=GENERAL_SCORER, captioner=GENERAL_CAPTIONER)
    parser = Parser("eval.clip_scores", described)
    add = parser.add_argument
    add("runs", nargs="*", metavar="ADAPTER", help="default: the demo's two runs and base")
    add("--prompts", default="3d_icon", help="shipped set, text file, or CSV file")
    add("--prompt_column", help="of the CSV file")
    add("--general_prompts", default="general", help='for drift; "none" leaves drift out')
    add("--max_prompts", type=int, help="take only the first of each set")
    add("--seeds", default=DEFAULT_SEEDS, help=f"such as 0,1 or 0..3; default: {DEFAULT_SEEDS}")
    add("--base_model", help="hub id, folder or mini; default: what the runs were trained on")
    add("--scorer", help=SCORERS)
    add("--scorer_revision", help="branch, tag or commit of a hub id after hf:")
    add("--captioner", help=CAPTIONERS)
    add("--captioner_revision", help="branch, tag or commit of a hub id after blip:")
    add("--skip_captions", action="store_true", help="no captions and no T2T")
    add("--control", metavar="LABEL", help="compare with this; default: the first but base")
    parser.add_output("scores", DEMO)
    add("--num_inference_steps", type=int, default=25)
    add("--guidance_scale", type=float, help="default: 4 for the miniature, else 5")
    add("--resolution", type=int, help="pixels a side; default: the pipeline's own")
    add("--adapter_scale", type=float, default=1.0)
    add("--batch_size", type=int, default=16, help="images between two visits to the disk")
    add("--lanes", type=int, default=4, help="images in one call of the denoiser, for memory")
    add("--train_data", metavar="SET", help='for memorization; default: the run\'s own; "none"')
    add("--grid_prompts", type=int, default=6, help="rows of the grid of images")
    add("--processes", type=int, help="on one device; default: all cores for the miniature, else 1")
    add("--device", help="cpu, cuda, cuda:1, mps; default: accelerate's choice")
    add("--dtype", choices=PRECISIONS.values(), help="of the denoiser; default: the device's best")
    return parser


def score(args: argparse.Namespace, command: str) -> None:
    """Plan, generate, measure, compare and write.

    Args:
        args: see ``--help``.
        command: for the provenance.

    Raises:
        UserError: bad input; nothing was generated.
    """
    from accelerate import PartialState

    from bilora_diffusion.config.resolve import device_type

    from .scores import plan as plans
    from .scores.assemble import assemble
    from .scores.measure import measure
    from .scores.store import Store

    plan = plans.make(args)
    state = PartialState(cpu="cpu" in (args.device, device_type()))  # else one CPU process is seen
    device = str(state.device if args.device is None else open_device(args.device))
    models = None
    if state.is_main_process:
        revisions = args.scorer_revision, args.captioner_revision
        models = load_models(plan.scorer, plan.captioner, revisions=revisions, device=device)
    open_folder(args.output_dir)
    store = Store(args.output_dir / IMAGES, plan.sampling)
    wanted = list(dict.fromkeys([*plan.jobs().values(), *plan.references().values()]))
    if state.is_main_process:
        print(_said(plan, len(wanted), len(store.missing(wanted))))
    made = _generate(store, wanted, device, state, args)
    state.wait_for_everyone()
    if models is not None:
        measured = measure(plan, store, *models, folder=IMAGES)
        scorer, captioner = models[0].entry, models[1].entry if models[1] else None
        result = assemble(
            plan, measured, scorer, captioner, images=IMAGES, command=command, device=device
        )
        write(result, plan, args.output_dir, args.grid_prompts)
        print(f"images made: {made}, in {args.output_dir / IMAGES}")


def load_models(
    scorer: str,
    captioner: str | None,
    *,
    revisions: tuple[str | None, str | None] = (None, None),
    device: str = "cpu",
) -> tuple[Scorer, Captioner | None]:
    """Scorer and captioner by their names; no captioner for None.

    Args:
        revisions: of the two; branch, tag or commit of a hub id.

    Raises:
        UserError: one is unknown, can't be loaded or would score wrongly.
    """
    from .scores import captioners, models, scorers

    name = scorer
    try:
        first = scorers.load(scorer, revision=revisions[0], device=device)
        if captioner is None:
            return first, None
        name = captioner
        second = captioners.load(captioner, first, revision=revisions[1], device=device)
        return first, second
    except UserError:
        raise
    except models.FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f'"{name}" can\'t be loaded ({reason}): check its name, its files and the connection to'
            " the hub, and that open_clip_torch is installed."
        ) from error


def _generate(
    store: Store, jobs: list[Job], device: str, state: PartialState, args: argparse.Namespace
) -> int:
    """Make what is missing, or this process' share of it; the pipeline is loaded only for that."""
    from .scores import workers

    batch = args.batch_size
    if state.num_processes == 1:
        return workers.generate(store, jobs, device=device, batch=batch, count=args.processes)
    if not store.missing(jobs):
        return 0
    process = (state.process_index, state.num_processes)
    return store.generate(jobs, pipeline=workers.load(store, device), batch=batch, process=process)


def write(result: ScoresResult, plan: Plan, folder: Path, rows: int) -> None:
    """Write all files, ``scores.json`` last, and print the table and where they are."""
    from .scores import grid, plots, report
    from .scores.measure import truth_pictures

    figures = [*grid.draw(result, folder, truth_pictures(plan), rows), *plots.draw(result, folder)]
    result = replace(result, figures=figures)
    write_text(folder / "scores.csv", report.to_csv(result))
    write_text(folder / "report.md", report.to_markdown(result))
    SCORES.write(result, folder)
    print("\n".join(["", *result.notes, report.table(result), "", *report.verdicts(result)]))
    print(f"\nwritten: {folder}/report.md, scores.json, scores.csv, {', '.join(figures)}")


def _said(plan: Plan, images: int, missing: int) -> str:
    scored = sum(not prompt.general for prompt in plan.prompts)
    labels = ", ".join(adapter.label for adapter in plan.adapters)
    return "\n".join(
        [
            *plan.notes,
            f"{labels}: {scored} prompts and {len(plan.prompts) - scored} general ones x"
            f" {len(plan.seeds)} seeds; {missing} of {images} images are to be made.",
        ]
    )


def _start_missing_processes(words: Sequence[str]) -> None:
    # The helper starts again what sys.argv says, and a module has to be named as one.
    from bilora_diffusion.train.launching import start_missing_processes

    told, sys.argv = sys.argv, ["-m", "eval.clip_scores", *words]
    try:
        start_missing_processes()
    finally:
        sys.argv = told


if __name__ == "__main__":
    sys.exit(main())
