"""LoRA and Bi-LoRA judged by sampled images, over checkpoints and both kinds of guidance.

    python benchmarks/pictures.py --preset mini-duotone --output_dir results/pictures_duotone
    python benchmarks/pictures.py --preset sdxl-3d_icon --dry_run
    python benchmarks/pictures.py --preset sdxl-3d_icon --output_dir pictures     # a GPU of 24 GB
    python benchmarks/pictures.py --preset mini-duotone --seeds 0,1 --steps 20,40 --max_prompts 8 \\
        --output_dir pictures/try

Each variant is trained once for each seed, on the same data and noise. Its checkpoints are sampled
with the same prompts and the same initial noise, once for each kind of guidance: "guidance 4" takes
both predictions from the adapter, as every program does; "base's guidance 2" takes the
unconditional one from the base model. A seed's value is the mean over its images; variants are
compared by the paired differences of the seeds.

Finished runs and images are not repeated, so the same command goes on where it stopped. Runs whose
rows are in ``--output_dir`` stay there and are not repeated either: seeds and variants can be added
later, without the first ones' folders. Each run trains on one GPU. Beside the usual files it writes
``pictures.json``: all numbers and no path, so that it can be posted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The repository and this folder, so that it also runs as `python -m benchmarks.pictures`
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import step_rules
from picture_checks import require_checkpoints, require_memory, require_scoring
from picture_record import Record
from picture_study import (
    CONTROL,
    CURVES,
    METRICS,
    PRESETS,
    SAMPLED_METRICS,
    VARIANTS,
    Guidance,
    curve_panels,
    draw_fronts,
    preset_truths,
    read_guidances,
    rule_section,
    step_sections,
    truths_by_step,
)
from PIL import Image

from bilora_diffusion.core.durable import dump_json, write_text
from bilora_diffusion.core.errors import TrainingError, UserError, did_you_mean
from bilora_diffusion.core.fields import option
from bilora_diffusion.core.files import counted, hours_for_each_second
from bilora_diffusion.core.values import HELDOUT_LOSS, WORKERS
from bilora_diffusion.image.config import resolve
from bilora_diffusion.mini.colors import color_difference
from bilora_diffusion.run.console import quiet
from eval import compare, report, table
from eval.clip_scores import ClipScores
from eval.clip_scores.prompts import read
from eval.command import COUNTS, Parser, open_device, open_folder, read_integers
from eval.evaluation import Evaluation
from eval.plot import Panel
from eval.subjects import Subject
from eval.sweep import subject_of
from eval.sweep_plan import IMAGE_SCRIPT, Plan, find_recipe, find_script, make_plan, parse
from eval.sweep_reporting import FINISHED
from eval.sweep_runs import Runner
from eval.table import Result, Row, provenance_of_this_process

POSTED = "pictures.json"


@dataclass(frozen=True)
class PicturesOptions:
    """Flags of the command."""

    section = "pictures"
    preset: str = option("mini-duotone", "What is trained and sampled.", choices=tuple(PRESETS))
    variants: str | None = option(
        None,
        f"Labels with semicolons between them, of {'; '.join(VARIANTS)} (default: the preset's).",
    )
    seeds: str | None = option(None, "Training seeds, as 0..4 or 0,1 (default: the preset's).")
    steps: str | None = option(None, "Checkpoints that are sampled (default: the preset's).")
    guidances: str | None = option(
        None, "Kinds of guidance, as adapter:4,base:2 (default: the preset's)."
    )
    max_prompts: int | None = option(None, "Sample the first prompts only.", range=COUNTS)
    runs_dir: Path = option(Path("runs/pictures"), "Folder of the runs and images.")  # noqa: RUF009
    jobs: int = option(1, "Training runs at a time.", range=WORKERS)
    processes: int | None = option(None, "Sampling processes.", range=WORKERS)
    dry_run: bool = option(False, "Print the plan, its hours and its memory only.")


class Pictures(Evaluation):
    """A subject is a training run. A row's item is the kind of guidance, "" for the held-out loss;
    its step is the checkpoint's, and its value is the mean over the images.

    ``settings``: ``preset``, ``options`` of the runs, ``variants``, ``steps``, ``guidances``,
    ``prompts``, ``images``, which is the number for each checkpoint and kind of guidance,
    ``scorer``.
    """

    name, title = "pictures", "Judged by sampled images"
    module = "benchmarks.pictures"
    metrics, options = METRICS, (PicturesOptions,)

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        super().__init__(args, command)
        self.preset = PRESETS[args.preset]
        self.steps = read_integers(args.steps, "--steps") if args.steps else self.preset.steps
        self.guidances = read_guidances(args.guidances) or self.preset.guidances
        self.plan = self._make_plan()
        self.runs_dir: Path = args.runs_dir / args.preset
        self.record = Record(self.folder)
        self.record.require_alike(self._common_settings(), self.plan.runs)
        # Runs with recorded rows are neither trained nor scored again.
        self.missing = [run for run in self.plan.runs if run.name not in self.record.rows]
        self.scored: dict[Guidance, Result] = {}
        self.color_differences: dict[tuple[Guidance, str], list[float]] = {}

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        parser.add_argument("--output_dir", type=Path, default=Path("pictures"))

    def _make_plan(self) -> Plan:
        """The runs, each checked by the training script's own parser."""
        labels = list(self.preset.variants)
        if self.args.variants is not None:
            labels = [label.strip() for label in self.args.variants.split(";")]
        for label in labels:
            if label not in VARIANTS:
                raise UserError(
                    f'--variants has "{label}"{did_you_mean(label, VARIANTS)}: choose'
                    f" from {'; '.join(VARIANTS)}."
                )
        seeds = read_integers(self.args.seeds, "--seeds") if self.args.seeds else self.preset.seeds
        options = {
            **self.preset.options,
            "max_train_steps": str(max(self.steps)),
            # The largest interval that has all sampled steps
            "checkpointing_steps": str(math.gcd(*self.steps)),
            # No limit: a checkpoint of an interruption must not push out one that is sampled.
            "checkpoints_total_limit": "0",
            "report_to": "none",
        }
        experiment = parse(
            {
                "recipe": self.preset.recipe,
                "options": options,
                "variants": {label: VARIANTS[label] for label in labels},
                "seeds": list(seeds),
                "metric": HELDOUT_LOSS if "validation_loss_steps" in options else "loss",
            },
            {},
        )
        recipe, script = find_recipe(self.preset.recipe), find_script(IMAGE_SCRIPT)
        return make_plan(experiment, Path(self.args.preset), recipe, script)

    def _common_settings(self) -> dict[str, Any]:
        """Settings that all runs of a result have in common, so that they can be compared."""
        return {
            "preset": self.args.preset,
            "prompts": self.preset.prompts,
            "images": self._prompt_count() * len(self.preset.sampling_seeds),
            "scoring": list(self.preset.scoring),
            "options": dict(self.plan.experiment.options),
            "guidances": [asdict(guidance) for guidance in self.guidances],
            "steps": sorted(self.steps),
        }

    def _prompt_count(self) -> int:
        """Number of prompts that are sampled, the first of the preset's set."""
        limits = [len(read(self.preset.prompts))]
        for limit in (self.preset.max_prompts, self.args.max_prompts):
            if limit is not None:
                limits.append(limit)
        return min(limits)

    def work(self) -> int | None:
        """Print the plan, and unless it is a dry run train, sample and compare."""
        print(self.describe())
        if self.args.dry_run:
            self._print_memory()
            return None
        open_folder(self.runs_dir, "--runs_dir")
        return super().work()

    def describe(self) -> str:
        """The size of the plan in runs and images, and its hours for each second of a step."""
        variants, seeds = len(self.plan.variants), len(self.plan.seeds)
        runs = variants * seeds
        images_of_checkpoint = self._prompt_count() * len(self.preset.sampling_seeds)
        images = runs * len(self.steps) * len(self.guidances) * images_of_checkpoint
        training_hours = hours_for_each_second(runs * max(self.steps), "a step")
        labels = ", ".join(guidance.label for guidance in self.guidances)
        return (
            f"{self.args.preset}: {counted(variants, 'variant')} x {counted(seeds, 'seed')} ="
            f" {counted(runs, 'run')} of {max(self.steps)} steps, {training_hours};"
            f" {images:,} images with {labels}, {hours_for_each_second(images, 'an image')}."
        )

    def _print_memory(self) -> None:
        """Print the memory of each variant's training, by the training script's ``--dry_run``."""
        if self.preset.sampling_gigabytes:
            size = f"{self.preset.sampling_gigabytes:g} GB"
            print(f"The images are made with {size} of weights, without quantization.")
        runner = Runner(self.plan.script, self.plan.recipe, self.runs_dir)
        first_seed = self.plan.seeds[0]
        for planned in self.plan.runs:
            if planned.seed != first_seed:
                continue
            print(f"\n{planned.variant}:", flush=True)
            words = runner.command(planned)
            # Without accelerate's launcher, since a dry run is of one process.
            words = [sys.executable, *words[words.index(str(self.plan.script)) :], "--dry_run"]
            if subprocess.run(words, check=False).returncode != 0:
                raise TrainingError(
                    f"--dry_run of {planned.variant} failed: its sentence stands above."
                )

    def subjects(self) -> Sequence[Subject]:
        """The planned and the recorded runs, seed by seed, in the order of `VARIANTS`."""
        subjects = dict(self.record.subjects)
        for planned in self.missing:
            subjects[planned.name] = Subject(planned.name, planned.variant, seed=planned.seed)
        order = list(VARIANTS)
        return sorted(
            subjects.values(), key=lambda subject: (subject.seed, order.index(subject.group))
        )

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Refuse before the training what would fail after it."""
        if not self.missing:
            return
        for planned in self.missing:
            require_checkpoints(self.runs_dir / planned.name, self.steps)
        require_memory(self.args.preset, self.preset.sampling_gigabytes)
        config = resolve(["--config", str(self.plan.recipe), *self.missing[0].flags])
        command_lines = [self._scoring_words(guidance) for guidance in self.guidances]
        require_scoring(command_lines, config.base_model)

    def produce(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """Train what is not finished; sample and score the checkpoints."""
        runner = Runner(self.plan.script, self.plan.recipe, self.runs_dir, self.args.jobs)
        outcomes = runner.run_all(self.missing)
        failures = [outcome for outcome in outcomes if outcome.status != FINISHED]
        if failures:
            first = failures[0]
            raise TrainingError(
                f"{len(failures)} of {len(outcomes)} runs failed, first {first.run}"
                f" ({first.error}): {self.runs_dir}/{first.run}.log has the reason, and the same"
                " command tries them again."
            )
        trained = {outcome.run: subject_of(self.runs_dir, outcome) for outcome in outcomes}
        if trained:
            for guidance in self.guidances:
                self.scored[guidance] = self._score(guidance, list(trained.values()))
        self._describe_settings()
        return [trained.get(subject.label, subject) for subject in subjects]

    def _score(self, guidance: Guidance, runs: Sequence[Subject]) -> Result:
        """Scores of all checkpoints with one kind of guidance, by eval.clip_scores."""
        folder = self.runs_dir / f"scores-{guidance.source}-{guidance.scale:g}"
        words = [f"{subject.label}={self.runs_dir / subject.label}" for subject in runs]
        words += ["--output_dir", str(folder), *self._scoring_words(guidance)]
        print(f"\n{guidance.label}:", flush=True)
        # In this process, so that models and libraries are loaded once.
        command = table.command_line("eval.clip_scores", words)
        ClipScores(ClipScores.parser().read(words), command).work()
        result = table.read(folder)
        self._measure_colors(guidance, result, folder)
        return result

    def _scoring_words(self, guidance: Guidance) -> list[str]:
        """Flags of eval.clip_scores for one kind of guidance."""
        words = ["--steps", ",".join(map(str, self.steps))]
        words += ["--prompts", self.preset.prompts]
        words += ["--seeds", ",".join(map(str, self.preset.sampling_seeds))]
        words += self.preset.scoring
        words += ["--guidance_from", guidance.source]
        words += ["--guidance_scale", f"{guidance.scale:g}"]
        words += ["--max_prompts", str(self._prompt_count())]
        if self.args.processes is not None:
            words += ["--processes", str(self.args.processes)]
        return words

    def _measure_colors(self, guidance: Guidance, result: Result, folder: Path) -> None:
        """Measure how the colors of all images differ from their held-out pictures."""
        truths = preset_truths(self.preset, result)
        for row in result.select("image"):
            if row.item in truths:
                with Image.open(folder / row.note) as image:
                    difference = color_difference(image, truths[row.item])
                self.color_differences.setdefault((guidance, row.subject), []).append(difference)

    def _describe_settings(self) -> None:
        variants = self.record.variants()
        for variant in self.plan.variants:
            variants[variant.label] = dict(variant.values)
        self.settings |= {**self._common_settings(), "variants": variants}
        # If all runs were recorded, nothing was scored now: the earlier result has the settings.
        scored = next(iter(self.scored.values()), self.record.result)
        assert scored is not None
        for name in ("sampling", "scorer", "truth_i2t"):
            self.settings[name] = scored.settings.get(name)

    def rows(self, subject: Subject) -> Iterator[Row]:
        if subject.label in self.record.rows:
            yield from self.record.rows[subject.label]
            return
        for guidance, result in self.scored.items():
            for entry in result.subjects:
                if entry.about["run"] != subject.label:
                    continue
                # The seed's value is the mean over its images of this checkpoint.
                fields = {"item": guidance.label, "step": entry.about["step"]}
                for metric in SAMPLED_METRICS:
                    values = [row.value for row in result.select(metric, entry.group)]
                    defined = [value for value in values if value is not None]
                    if defined:
                        yield subject.row(metric, compare.mean(defined), **fields)
                differences = self.color_differences.get((guidance, entry.label))
                if differences:
                    yield subject.row("colors", statistics.fmean(differences), **fields)
        losses: dict[int, float] = {}
        for line in subject.log():
            if HELDOUT_LOSS in line and line["step"] in self.steps:
                losses[line["step"]] = line[HELDOUT_LOSS]
                yield subject.row(HELDOUT_LOSS, line[HELDOUT_LOSS], step=line["step"])
        for guidance, result in self.scored.items():
            regrets = step_rules.regrets(truths_by_step(result, subject.label), losses)
            for rule, regret in regrets.items():
                yield subject.row(rule, regret, item=guidance.label)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        lines = compare.summaries(rows, CONTROL)
        current = provenance_of_this_process(self.command, open_device(None))
        provenance = self.record.provenance(current, is_extended=bool(self.scored))
        return self.result(subjects, rows, lines, CONTROL, provenance=provenance)

    def panels(self, result: Result) -> Mapping[str, Sequence[Sequence[Panel]]]:
        return {CURVES: curve_panels(result, self.guidances)}

    def figures(self, result: Result, folder: Path) -> list[str]:
        labels = [guidance.label for guidance in self.guidances]
        fronts = draw_fronts({self.args.preset: result}, labels, folder)
        return fronts + super().figures(result, folder)

    def introduction(self, result: Result) -> str:
        settings = result.settings
        seeds = len({entry.seed for entry in result.subjects})
        return (
            f"{settings['preset']}: {counted(seeds, 'training seed')};"
            f" {settings['images']} images of each checkpoint, from {settings['prompts']}."
            f" A cell is the mean over seeds; in brackets the difference to {CONTROL}, paired by"
            f" seed, with {report.INTERVALS}."
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[report.Column]]:
        return {}  # the tables are in `rule_section` and `step_sections`

    def further(self, result: Result) -> list[str]:
        return [*rule_section(result), *step_sections(result), report.closing(result)]

    def write(self, result: Result) -> None:
        super().write(result)
        assert result.provenance is not None
        posted = {
            "settings": result.settings,
            "provenance": asdict(result.provenance),
            "summaries": [asdict(line) for line in result.summaries],
            "rows": [asdict(row) for row in result.rows],
        }
        write_text(self.folder / POSTED, dump_json(posted))


main = Pictures.main

if __name__ == "__main__":
    quiet()
    sys.exit(main())
