"""Score adapters by CLIP: generate images from a prompt set, and compare I2T, T2T and more.

    make demo && python -m eval.clip_scores --prompts mini-duotone-heldout \\
        --guidance_from base --guidance_scale 2            # the demo's two runs and the base model
    python -m eval.clip_scores runs/lora runs/bilora base --max_prompts 6 --seeds 0  # a minute
    python -m eval.clip_scores LoRA=runs/a Bi-LoRA=runs/b --seeds 0..3 --output_dir results/scores
    python -m eval.clip_scores runs/dog base                # prompts from the run's training
    python -m eval.clip_scores some/lora.safetensors base --prompts my_prompts.txt \\
        --base_model stabilityai/stable-diffusion-xl-base-1.0
    python -m eval.clip_scores runs/dog --steps all                 # checkpoints of the run
    python -m eval.clip_scores runs/lora runs/bilora --base_precision int4      # merged and rounded
    accelerate launch -m eval.clip_scores runs/lora runs/bilora          # images on several GPUs

An adapter is a run folder, a LoRA file, or `base` for the base model alone; LABEL=ADAPTER gives it
a label. All adapters get the same prompts and the same initial noise. Each image is a PNG file that
also stores its parameters: after an interruption, the same command resumes and generates only the
missing images. A second prompt set, the general prompts, measures how far an adapter drifts
from the base model. The output folder also gets
a grid of images.

Without --prompts, the prompts come from the training of the first run. They are the first of
the following that exists: the shipped prompts, if the run was trained on shipped images; up to 64
captions of its held-out images, which are then the ground truth; its instance prompt or trigger
word in 20 contexts; its validation prompts; up to 20 captions of its training images.

With --steps, the report begins with one sentence on each run's best step. The command prints these
sentences at its end.

With --image_model, DINOv2 also compares the images with held-out and training pictures, whichever
scorer is used.

By default, the miniature is scored with the scorer and captioner that come with this project, and
other models with {scorer} and {captioner}; the paper names neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_diffusion.config.lora_sources import SAMPLING_OPTION
from bilora_diffusion.core.durable import write_bytes
from bilora_diffusion.core.errors import UserError, as_user_error, strip_controls
from bilora_diffusion.core.files import counted
from bilora_diffusion.core.values import ADAPTER_GUIDANCE, guidance_title
from bilora_diffusion.run.record import RUN

from .. import checkpoints
from ..checkpoints import HELDOUT_LOSS, LOSS, OverSteps
from ..command import Parser, open_device
from ..results import compare, report
from ..results.report import Column
from ..results.table import Result, Row, provenance_of_this_process
from ..subjects import BASE, Subject, settings_note, single
from . import reporting, settings
from .best_step import best_steps
from .reporting import METRICS
from .settings import DEMO, GENERAL_CAPTIONER, GENERAL_SCORER, SamplingOptions, ScoringOptions

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from PIL.Image import Image

    from .captioners import Captioner
    from .images import Job, Store
    from .models import ImageEmbedder, Scorer

DESCRIBED = (__doc__ or "").format(scorer=GENERAL_SCORER, captioner=GENERAL_CAPTIONER)
IMAGES = "images"
# Folder with copies of the held-out pictures, and maximum side of a copy in pixels
TRUTHS = "truth"
TRUTH_SIDE = 768
DEMO_METHODS = ("lora", "bilora")


class ClipScores(OverSteps):
    """The command.

    In each row of the result, ``item`` is the prompt's text and ``seed`` the seed of the initial
    noise. A row with the metric "image" has no value; its note is the path of the image's file. The
    note of a "t2t" row is the caption. The note of a "nearest" or "dino_nearest" row is the name of
    the training picture. With --steps, a row "heldout_loss" has neither an item nor a seed.

    Settings of the result:

    - ``prompts``: each with ``text``, ``instance``, ``reference`` (path of the copy of its held-out
      picture, relative to the result's folder), ``colors`` (name of the color map of that picture),
      ``general`` (scored by "drift" only) and ``truncated`` (longer than the scorer's limit);
    - ``prompt_set``, ``seeds``, ``sampling``;
    - ``scorer``, ``captioner`` and ``image_model``: each with ``name``, ``kind``, ``model``,
      ``revision`` and ``note``; None if the captioner or image model is not used;
    - ``truth_i2t``: mean "i2t" score of the held-out pictures; None if there are none;
    - ``answers``, with --steps only: a `BestStep` for each run.
    """

    name = "clip_scores"
    title = "CLIP scores"
    unit = compare.ITEM
    metrics = METRICS
    described = DESCRIBED
    options = (ScoringOptions, SamplingOptions)

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        default = "default: the demo's two runs and base"
        parser.add_argument("runs", nargs="*", metavar="ADAPTER", help=default)
        parser.add_output("scores", DEMO, of_runs=True)

    def subjects(self) -> list[Subject]:
        from bilora_diffusion.config.machine import refuse_separate_processes

        refuse_separate_processes()
        if self.args.steps is not None:
            return checkpoints.of_runs(single(self.args.runs, weights=False), self.args.steps)
        if self.args.runs:
            return single(self.args.runs)
        runs = [str(DEMO / method) for method in DEMO_METHODS]
        for run in runs:
            if not Path(run, RUN).is_file():
                raise UserError(
                    f"no adapter is given, and there is no demo run {run}: run `make demo` first,"
                    " or name run folders or LoRA files."
                )
        self.notes.append(
            f"No adapter is given, so the demo's two runs ({' and '.join(runs)}) and the base model"
            " are scored."
        )
        return single([*runs, BASE])

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Read the settings, and load the scoring models in the main process."""
        from accelerate import PartialState

        from bilora_diffusion.config.machine import device_type

        from ..load import require_adapter
        from . import measure

        args = self.args
        text_runs = [subject.folder for subject in subjects if subject.is_text]
        if text_runs:
            raise UserError(f"{text_runs[0]} is a run on text: use python -m eval.text_scores.")
        self.seeds = settings.read_seeds(args.seeds)
        base = settings.base_model(subjects, args.base_model)
        model_names = settings.models(args, base)
        control = args.control or checkpoints.last_group(subjects)
        self.control = compare.control(subjects, control, prefer=None)
        question = settings.question(args, subjects, base)
        self.prompts = question.prompts
        self.prompt_set = question.name
        notes = (
            question.note,
            settings_note(subjects),
            settings.guidance_note(args, subjects),
        )
        self.notes += filter(None, notes)
        if args.steps is not None:
            self.notes += checkpoints.left_out(subjects, args.steps)
        self.sampling = settings.sampling(args, base, subjects)
        if note := settings.strength_note(args, self.sampling):
            self.notes.append(note)
        if self.sampling.guidance_from != ADAPTER_GUIDANCE:
            for subject in subjects:
                require_adapter(subject, guidance_title(self.sampling.guidance_from))
        self.training_sets = measure.training_sets(subjects, args.train_data)
        # Subjects with equal weights share the images of the first such subject.
        self.image_owners: dict[str, Subject] = {}  # by the hash of the weights
        for subject in reversed(subjects):
            self.image_owners[subject.digest] = subject
        # Without this argument, accelerate treats several processes on a CPU as one.
        self.state = PartialState(cpu="cpu" in (args.device, device_type()))
        device = self.state.device if args.device is None else open_device(args.device)
        self.device = str(device)
        self.models: tuple[Scorer, Captioner | None] | None = None
        self.image_model: ImageEmbedder | None = None
        if self.state.is_main_process:
            self.models = load_models(*model_names, device=self.device)
            if args.image_model is not None:
                self.image_model = load_image_model(args.image_model, self.device)

    def jobs(self, subject: Subject) -> list[Job]:
        """Return the image jobs of a subject."""
        from .images import jobs

        return jobs(self.image_owners[subject.digest], self.prompts, self.seeds)

    def produce(self, subjects: Sequence[Subject]) -> Sequence[Subject] | None:
        """Generate this process's share of the images; the main process returns the subjects.

        The other processes return None, because only the main process scores the images.
        """
        from .images import Store, jobs
        from .measure import ImageJudge, truth_pictures

        store = Store(self.folder / IMAGES, self.sampling, self.device)
        # Drift is measured from the base model's images of the general prompts.
        base = self.image_owners.get("") or single([BASE])[0]
        general_prompts = [prompt for prompt in self.prompts if prompt.general]
        originals = jobs(base, general_prompts, self.seeds)
        required = []
        for subject in subjects:
            required += self.jobs(subject)
        required += originals
        if self.state.is_main_process:
            num_images = len({job.file for job in required})
            self._announce(subjects, num_images, len(store.missing(required)))
        self.num_generated = self._generate(store, required)
        self.state.wait_for_everyone()
        if self.models is None:
            return None
        self.truths = truth_pictures(self.prompts, self.sampling.base_model)
        if self.image_model and not (self.truths or self.training_sets):
            self.notes.append(
                "--image_model has no pictures to compare the images with: there is neither a"
                " held-out picture nor a training set."
            )
        scorer, captioner = self.models
        self.judge = ImageJudge(
            store,
            scorer,
            captioner,
            self.truths,
            self.training_sets,
            originals,
            image_model=self.image_model,
        )
        self._describe(scorer, captioner)
        return subjects

    def _announce(self, subjects: Sequence[Subject], images: int, missing: int) -> None:
        """Print the numbers of prompts and images, and the notes."""
        general = sum(prompt.general for prompt in self.prompts)
        scored = len(self.prompts) - general
        labels = ", ".join(subject.label for subject in subjects)
        plan = f"{counted(scored, 'prompt')} ({self.prompt_set})"
        if general:
            plan += f" and {general} general ones"
        plan += (
            f" x {counted(len(self.seeds), 'seed')} for {labels}; {missing} of {images} images will"
            " be generated."
        )
        if self.args.prompts is None:
            plan += " For other prompts, give --prompts (see --help)."
        print(plan, *self.notes, sep="\n")

    def _generate(self, store: Store, jobs: Sequence[Job]) -> int:
        """Generate this process's share of the missing images, and return their number."""
        from .images import ImageBar, generate_in_processes

        batch = self.args.batch_size
        rank, count = self.state.process_index, self.state.num_processes
        if count == 1:
            return generate_in_processes(store, jobs, batch, self.args.processes)
        if rank > 0:
            return store.generate(jobs, batch=batch, process=(rank, count))
        with ImageBar(store, store.missing(jobs)) as bar:
            return store.generate(jobs, batch=batch, bar=bar, process=(rank, count))

    def _describe(self, scorer: Scorer, captioner: Captioner | None) -> None:
        """Write the copies of the held-out pictures, and fill in the result's settings."""
        prompts = []
        for number, prompt in enumerate(self.prompts):
            truth = self.truths.get(prompt.text)
            reference = None
            if truth is not None:
                reference = f"{TRUTHS}/{number:03d}.png"
                self._write_truth(truth, self.folder / reference)
            is_cut = scorer.is_cut(prompt.text)
            prompts.append({**asdict(prompt), "reference": reference, "truncated": is_cut})
        sampling = self.sampling.to_dict()
        if self.sampling.lora is not None:
            sampling[SAMPLING_OPTION] = self.sampling.lora.path.name
        self.settings = {
            "prompts": prompts,
            "prompt_set": self.prompt_set,
            "seeds": self.seeds,
            "sampling": sampling,
            "scorer": asdict(scorer.entry),
            "captioner": asdict(captioner.entry) if captioner else None,
            "image_model": asdict(self.image_model.entry) if self.image_model else None,
            "truth_i2t": self.judge.truth_i2t(),
        }

    def _write_truth(self, truth: Image, path: Path) -> None:
        """Write a small copy of a held-out picture; the viewer reads only the result's folder."""
        picture = truth.copy()
        picture.thumbnail((TRUTH_SIDE, TRUTH_SIDE))
        content = BytesIO()
        picture.save(content, format="PNG")
        with as_user_error(f"{path} can't be written", "give another output folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content.getvalue())

    def rows(self, subject: Subject) -> Iterable[Row]:
        yield from self.judge.rows(subject, self.jobs(subject))
        if self.args.steps is not None:
            yield from checkpoints.heldout_loss(subject)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        metrics = dict(METRICS)
        if self.args.steps is not None:
            metrics[HELDOUT_LOSS] = LOSS
        scores = [row for row in rows if row.metric in metrics]
        summarize = partial(compare.summaries, unit=self.unit)
        result = self.result(
            subjects,
            rows,
            summarize(scores, control=self.control),
            self.control,
            metrics=metrics,
            provenance=provenance_of_this_process(self.command, self.device),
        )
        result = self.over_steps(result, summarize)
        if self.curves is not None:
            self.settings["answers"] = [asdict(answer) for answer in best_steps(self.curves)]
        return result

    def write(self, result: Result) -> None:
        super().write(result)
        print(f"images generated: {self.num_generated}, in {self.folder / IMAGES}")
        # With --steps, the sentences on the best steps are also printed at the end.
        for sentence in reporting.answers(result):
            print(strip_controls(sentence))

    def report(self, result: Result) -> str:
        sentences = [f"**{report.escape_table_cell(text)}**" for text in reporting.answers(result)]
        return report.page(*sentences, super().report(result).rstrip())

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]]:
        return {"training seeds": lambda group: reporting.training_seeds(result, group)}

    def draw_figures(self, result: Result, folder: Path) -> list[str]:
        figures = []
        if reporting.grid(result, folder, self.truths):
            figures.append(reporting.GRID)
        return figures + super().draw_figures(result, folder)

    def introduction(self, result: Result) -> str:
        return reporting.introduction(result)

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        measured = {line.metric for line in result.summaries}
        columns = []
        for name in result.metrics:
            if name in measured:
                columns.append(Column(name, difference=True))
        return {"Scores": columns}

    def further(self, result: Result) -> list[str]:
        sentences = [*reporting.models(result), *report.sources(result)]
        return [
            reporting.legend(result),
            self.best_steps(result),
            reporting.paper_table(result),
            report.closing(replace(result, notes=[]), ("torch", "diffusers"), sentences),
        ]


def load_models(
    scorer: str, captioner: str | None, device: str = "cpu"
) -> tuple[Scorer, Captioner | None]:
    """Load the scorer and the captioner with these names; no captioner for None."""
    from . import captioners, models

    fix = "check its name and files, the connection to the hub, and the package open_clip_torch"
    with as_user_error(f'"{scorer}" can\'t be loaded', fix):
        loaded_scorer = models.load(scorer, device)
    if captioner is None:
        return loaded_scorer, None
    with as_user_error(f'"{captioner}" can\'t be loaded', fix):
        return loaded_scorer, captioners.load(captioner, loaded_scorer, device)


def load_image_model(name: str, device: str = "cpu") -> ImageEmbedder:
    """Load the model named by ``--image_model``."""
    from .models import dinov2

    fix = "check its name and files and the connection to the hub; weights must be in safetensors"
    with as_user_error(f'"{name}" can\'t be loaded', fix):
        return dinov2(name, device)


main = ClipScores.main
