"""Score adapters by CLIP: images from a prompt set, I2T, T2T and more, compared prompt by prompt.

    make demo && python -m eval.clip_scores                # the demo's two runs and the base model
    python -m eval.clip_scores runs/lora runs/bilora base --max_prompts 6 --seeds 0  # a minute
    python -m eval.clip_scores LoRA=runs/a Bi-LoRA=runs/b --seeds 0..3 --output_dir results/scores
    python -m eval.clip_scores some/lora.safetensors base --prompts my_prompts.txt \\
        --base_model stabilityai/stable-diffusion-xl-base-1.0
    python -m eval.clip_scores runs/dog --steps all                 # every checkpoint, over steps
    accelerate launch -m eval.clip_scores runs/lora runs/bilora          # images on several GPUs

An adapter is a run folder, a LoRA file, or `base` for none; LABEL=ADAPTER names it. All
get the same prompts and the same initial noise. Images are kept as PNG files with their parameters,
so an interrupted run continues by the same command and nothing is generated twice. The general
prompts measure drift from the base model. Beside the result's files it draws a grid of images.

Scorer and captioner default to the embedded ones for the miniature, and otherwise to
{scorer} and {captioner}; the paper names neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_diffusion.core.errors import UserError, translated
from bilora_diffusion.core.fields import option
from bilora_diffusion.core.values import (
    GUIDANCES,
    SAMPLER_STEPS,
    SIDES,
    STRENGTHS,
    WORKERS,
)
from bilora_diffusion.run.record import RUN

from .. import checkpoints, compare, report
from ..checkpoints import HELDOUT_LOSS, LOSS, OverSteps
from ..command import COUNTS, Parser, open_device, open_folder, require_free
from ..provenance import of_this_process, without_paths
from ..report import Column
from ..subjects import BASE, Subject, single
from ..table import Result, Row
from . import reporting
from .names import CAPTIONERS, DEMO, GENERAL_CAPTIONER, GENERAL_SCORER, METRICS, PRECISIONS, SCORERS

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from .captioners import Captioner
    from .images import Job
    from .models import Scorer

DESCRIBED = (__doc__ or "").format(scorer=GENERAL_SCORER, captioner=GENERAL_CAPTIONER)
IMAGES = "images"
DEMO_METHODS = ("lora", "bilora")


USUAL = "(default: as is usual for the model)"


@dataclass(frozen=True)
class ScoringOptions:
    """Prompts, scores and comparison."""

    section = "prompts and models"
    prompts: str = option(
        "3d_icon", 'A set that is shipped, a text file, or a CSV file with the column "prompt".'
    )
    general_prompts: str = option("general", "Prompts for drift; none leaves drift out.")
    max_prompts: int | None = option(None, "Take only the first of each set.", range=COUNTS)
    seeds: str = option("0,1", "Seeds such as 0,1 or 0..3.")
    base_model: str | None = option(None, "Hub id, folder or mini (default: that of the runs).")
    scorer: str | None = option(None, f"{SCORERS}.")
    captioner: str | None = option(None, f"{CAPTIONERS}.")
    skip_captions: bool = option(False, "No captions and no T2T.")
    control: str | None = option(None, "Compare with this label (default: the first but base).")
    train_data: str | None = option(None, "Set for memorization, or none (default: the run's own).")
    steps: str | None = option(None, checkpoints.HELP)


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling of images."""

    section = "images"
    num_inference_steps: int | None = option(None, f"Steps {USUAL}.", range=SAMPLER_STEPS)
    guidance_scale: float | None = option(
        None, f"Classifier-free guidance {USUAL}; 4 for the miniature.", range=GUIDANCES
    )
    resolution: int | None = option(None, f"Pixels a side {USUAL}.", range=SIDES)
    adapter_scale: float = option(1.0, "Factor of each adapter's change.", range=STRENGTHS)
    batch_size: int = option(16, "Images between two visits to the disk.", range=COUNTS)
    processes: int | None = option(
        None, "On one device (default: all cores for the miniature, else 1).", range=WORKERS
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, mps (default: accelerate's choice).")
    dtype: str | None = option(
        None, "Of the denoiser (default: the device's best).", choices=tuple(PRECISIONS.values())
    )


class ClipScores(OverSteps):
    """The command. A row's item is the prompt's text, and its seed that of the initial noise.

    A row "image" without a value names an image's file; the note of "t2t" is the caption, that of
    "nearest" the training picture. Settings of the result: ``prompts`` (text, instance, reference:
    file name of its held-out picture, general: in no score but "drift", truncated: longer than the
    scorer takes), ``prompt_set``, ``seeds``, ``sampling``, ``scorer`` and ``captioner`` (name,
    kind, model, revision, note; None without captions).
    """

    name, title, over = "clip_scores", "CLIP scores", "item"
    metrics, described, options = METRICS, DESCRIBED, (ScoringOptions, SamplingOptions)

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        help = "default: the demo's two runs and base"
        parser.add_argument("runs", nargs="*", metavar="ADAPTER", help=help)
        parser.add_output("scores", DEMO)

    def subjects(self) -> list[Subject]:
        if self.args.steps is not None:
            return checkpoints.of_runs(single(self.args.runs, weights=False), self.args.steps)
        if self.args.runs:
            return single(self.args.runs)
        runs = [str(DEMO / method) for method in DEMO_METHODS]
        for run in runs:
            if not Path(run, RUN).is_file():
                raise UserError(
                    f"no adapter was named and there is no demo run {run}: run `make demo` first,"
                    " or name run folders or LoRA files."
                )
        self.notes.append(
            f"No adapter was named, so these are the demo's two runs ({' and '.join(runs)}), with"
            " the base model for context, scored by the embedded scorer."
        )
        return single([*runs, BASE])

    def prepare(self, subjects: Sequence[Subject]) -> None:
        from . import measure, settings

        args = self.args
        if texts := [run.folder for run in subjects if run.is_text]:
            raise UserError(f"{texts[0]} is a run on text: use python -m eval.text_scores.")
        self.seeds = settings.read_seeds(args.seeds)
        base = settings.base_model(subjects, args.base_model)
        self.names = settings.models(args, base)
        given = args.control or checkpoints.last_group(subjects)
        self.control = compare.control(subjects, given, prefer=None)
        self.prompts = settings.prompts(args)
        self.sampling = settings.sampling(args, base)
        self.training = measure.training_sets(subjects, args.train_data)
        # Subjects with equal weights share their images.
        self.drawers = {subject.digest: subject for subject in reversed(subjects)}

    def jobs(self, subject: Subject) -> list[Job]:
        """The images of a subject."""
        from .images import jobs

        return jobs(self.drawers[subject.digest], self.prompts, self.seeds)

    def work(self) -> None:
        """Generate in all processes, and score in the first."""
        from accelerate import PartialState

        from bilora_diffusion.config.machine import device_type
        from bilora_diffusion.train.launching import refuse_separate_processes

        from .images import Store, jobs
        from .measure import ImageJudge, truth_pictures

        refuse_separate_processes()
        args, subjects = self.args, self.subjects()
        self.prepare(subjects)
        # else one CPU process is seen
        state = PartialState(cpu="cpu" in (args.device, device_type()))
        device = str(state.device if args.device is None else open_device(args.device))
        models = load_models(*self.names, device=device) if state.is_main_process else None
        open_folder(self.folder)
        require_free(self.folder, self.name)
        store = Store(self.folder / IMAGES, self.sampling, device)
        general = [prompt for prompt in self.prompts if prompt.general]
        originals = jobs(self.drawers.get("") or single([BASE])[0], general, self.seeds)
        needed = [*(job for subject in subjects for job in self.jobs(subject)), *originals]
        if state.is_main_process:
            self._announce(subjects, len({job.file for job in needed}), len(store.missing(needed)))
        made = self._generate(store, needed, (state.process_index, state.num_processes))
        state.wait_for_everyone()
        if models is None:
            return
        self.truths = truth_pictures(self.prompts, self.sampling.base_model)
        self.judge = ImageJudge(store, *models, self.truths, self.training, originals)
        self._describe(*models)
        rows = [row for subject in subjects for row in self.rows(subject)]
        self.origin = of_this_process(self.command, device)
        self.write(self.complete(subjects, rows))
        print(f"images made: {made}, in {self.folder / IMAGES}")

    def _announce(self, subjects: Sequence[Subject], images: int, missing: int) -> None:
        scored = sum(not prompt.general for prompt in self.prompts)
        labels = ", ".join(subject.label for subject in subjects)
        plan = (
            f"{labels}: {scored} prompts and {len(self.prompts) - scored} general ones x"
            f" {len(self.seeds)} seeds; {missing} of {images} images are to be made."
        )
        print(*self.notes, plan, sep="\n")

    def _generate(self, store: Any, jobs: Sequence[Job], process: tuple[int, int]) -> int:
        """Make what is missing, or this process' share of it."""
        from .images import generate_in_processes

        batch = self.args.batch_size
        if process[1] == 1:
            return generate_in_processes(store, jobs, batch, self.args.processes)
        return store.generate(jobs, batch=batch, process=process)

    def _describe(self, scorer: Scorer, captioner: Captioner | None) -> None:
        """Fill in the settings."""
        prompts = [asdict(prompt) for prompt in self.prompts]
        for prompt in prompts:
            known = prompt["text"] in self.truths and not prompt["general"]
            prompt["reference"] = prompt["reference"].name if known else None
            prompt["truncated"] = scorer.is_cut(prompt["text"])
        self.settings = {
            "prompts": prompts,
            "prompt_set": Path(self.args.prompts).name,
            "seeds": self.seeds,
            "sampling": asdict(self.sampling)
            | {"base_model": without_paths(self.sampling.base_model)},
            "scorer": asdict(scorer.entry),
            "captioner": asdict(captioner.entry) if captioner else None,
        }

    def rows(self, subject: Subject) -> Iterable[Row]:
        yield from self.judge.rows(subject, self.jobs(subject))
        if self.args.steps is not None:
            yield from checkpoints.heldout_loss(subject)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        shown = METRICS if self.args.steps is None else METRICS | {HELDOUT_LOSS: LOSS}
        scores = [row for row in rows if row.metric in shown]
        summarize = partial(compare.summaries, over=self.over)
        lines = summarize(scores, control=self.control)
        more = {"metrics": shown, "provenance": self.origin}
        return self.over_steps(self.result(subjects, rows, lines, self.control, **more), summarize)

    def figures(self, result: Result, folder: Path) -> list[str]:
        drawn = reporting.grid(result, folder, self.truths)
        return [*([reporting.GRID] if drawn else []), *super().figures(result, folder)]

    def introduction(self, result: Result) -> str:
        return reporting.introduction(result)

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        measured = {line.metric for line in result.summaries}
        names = [name for name in result.metrics if name in measured]
        return {"Scores": [Column(name, difference=True) for name in names]}

    def further(self, result: Result) -> list[str]:
        sentences = [*reporting.made(result), *report.sources(result)]
        return [
            reporting.legend(result),
            self.best_steps(result),
            report.section("In the shape of the paper's Table 4", reporting.scores(result)),
            report.closing(replace(result, notes=[]), ("torch", "diffusers"), sentences),
        ]


def load_models(
    scorer: str, captioner: str | None, device: str = "cpu"
) -> tuple[Scorer, Captioner | None]:
    """Scorer and captioner by their names; no captioner for None."""
    from . import captioners, models

    fix = "check its name, its files, the connection to the hub, and that open_clip_torch is there"
    with translated(f'"{scorer}" can\'t be loaded', fix):
        first = models.load(scorer, device)
    if captioner is None:
        return first, None
    with translated(f'"{captioner}" can\'t be loaded', fix):
        return first, captioners.load(captioner, first, device)


main = ClipScores.main
