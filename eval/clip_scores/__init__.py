"""Score adapters by CLIP: images from a prompt set, I2T, T2T and more, compared prompt by prompt.

    make demo && python -m eval.clip_scores --prompts mini-duotone-heldout \\
        --guidance_from base --guidance_scale 2            # the demo's two runs and the base model
    python -m eval.clip_scores runs/lora runs/bilora base --max_prompts 6 --seeds 0  # a minute
    python -m eval.clip_scores LoRA=runs/a Bi-LoRA=runs/b --seeds 0..3 --output_dir results/scores
    python -m eval.clip_scores runs/dog base                        # prompts of what it learned
    python -m eval.clip_scores some/lora.safetensors base --prompts my_prompts.txt \\
        --base_model stabilityai/stable-diffusion-xl-base-1.0
    python -m eval.clip_scores runs/dog --steps all                 # every checkpoint, over steps
    python -m eval.clip_scores runs/lora runs/bilora --base_precision int4      # merged and rounded
    accelerate launch -m eval.clip_scores runs/lora runs/bilora          # images on several GPUs

An adapter is a run folder, a LoRA file, or `base` for none; LABEL=ADAPTER gives it a label. All get
the same prompts and the same initial noise. Images are PNG files with their parameters, so the same
command goes on after an interruption, and no image is generated twice. The general prompts measure
drift from the base model. Beside the result's files it draws a grid of images.

Without --prompts the prompts are those of the first run's training: the prompts of the shipped
icons, else up to 64 captions of its held-out images, whose pictures are the ground truth, else its
instance prompt in 20 contexts, else its validation prompts, else up to 20 of its captions.

--steps ends with one sentence on the best step, which the report begins with.

With --image_model, pictures are compared by DINOv2 too, whatever the scorer.

Scorer and captioner default to the embedded ones for the miniature, and otherwise to
{scorer} and {captioner}; the paper names neither.
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
# Folder of the copies of held-out pictures, and their longest side in pixels
TRUTHS = "truth"
TRUTH_SIDE = 768
DEMO_METHODS = ("lora", "bilora")


class ClipScores(OverSteps):
    """The command. A row's item is the prompt's text, and its seed is that of the initial noise.

    A row "image" has no value and names an image's file in its note. The note of "t2t" is the
    caption, that of "nearest" the training picture.

    Settings of the result: ``prompts``, each with text, instance, reference (path of a copy of its
    held-out picture in the result's folder), colors (the map of the miniature's colors), general
    (scored by "drift" only) and truncated (longer than the scorer takes); ``prompt_set``,
    ``seeds``, ``sampling``; ``scorer``, ``captioner`` and ``image_model`` with name, kind, model,
    revision and note, None without captions or such a model; with --steps ``answers``, a `BestStep`
    for each run.
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
                    f"no adapter was named and there is no demo run {run}: run `make demo` first,"
                    " or name run folders or LoRA files."
                )
        self.notes.append(
            f"No adapter was named, so these are the demo's two runs ({' and '.join(runs)}), with"
            " the base model for context, scored by the embedded scorer."
        )
        return single([*runs, BASE])

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Read the settings, and load in the first process the models that score."""
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
        # Subjects with equal weights share the images of the first of them.
        self.image_owners: dict[str, Subject] = {}  # by the hash of the weights
        for subject in reversed(subjects):
            self.image_owners[subject.digest] = subject
        # Without the argument accelerate takes several processes on a CPU for one.
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
        """The images of a subject."""
        from .images import jobs

        return jobs(self.image_owners[subject.digest], self.prompts, self.seeds)

    def produce(self, subjects: Sequence[Subject]) -> Sequence[Subject] | None:
        """Generate the images, each process its share; the first process is to score them."""
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
                "--image_model has nothing to compare with: there is neither a held-out picture nor"
                " a training set."
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
        """Print how many images of which prompts are made and scored."""
        general = sum(prompt.general for prompt in self.prompts)
        scored = len(self.prompts) - general
        labels = ", ".join(subject.label for subject in subjects)
        plan = f"{counted(scored, 'prompt')} ({self.prompt_set})"
        if general:
            plan += f" and {general} general ones"
        plan += (
            f" x {counted(len(self.seeds), 'seed')} of {labels}; {missing} of {images} images are"
            " to be made."
        )
        if self.args.prompts is None:
            plan += " --prompts FILE or --prompts contexts asks others."
        print(plan, *self.notes, sep="\n")

    def _generate(self, store: Store, jobs: Sequence[Job]) -> int:
        """Generate the missing images, or this process's share of them; returns their number."""
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
        """Fill in the settings."""
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
        """Write a copy of a held-out picture for the viewer, which reads no other folders."""
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
        print(f"images made: {self.num_generated}, in {self.folder / IMAGES}")
        # The answer to what --steps asks is the last line at the terminal too.
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
    """Scorer and captioner by their names; no captioner for None."""
    from . import captioners, models

    fix = "check its name, its files, the connection to the hub, and that open_clip_torch is there"
    with as_user_error(f'"{scorer}" can\'t be loaded', fix):
        loaded_scorer = models.load(scorer, device)
    if captioner is None:
        return loaded_scorer, None
    with as_user_error(f'"{captioner}" can\'t be loaded', fix):
        return loaded_scorer, captioners.load(captioner, loaded_scorer, device)


def load_image_model(name: str, device: str = "cpu") -> ImageEmbedder:
    """The model of ``--image_model``."""
    from .models import dinov2

    fix = "check its name, its files and the connection to the hub; weights must be in safetensors"
    with as_user_error(f'"{name}" can\'t be loaded', fix):
        return dinov2(name, device)


main = ClipScores.main
