"""Sample and score the checkpoints of runs with eval.clip_scores."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.mini.colors import color_difference
from bilora_diffusion.run import checkpoint

from ..clip_scores import ClipScores, load_image_model, load_models, settings
from ..clip_scores.measure import truth_pictures
from ..clip_scores.prompts import read
from ..results import compare, table
from ..results.table import Result, Row
from ..subjects import Subject
from . import step_rules
from .experiment import Condition, Guidance, Scores
from .samples import CHANGES, COLORS, SAMPLED_METRICS

# Settings of an eval.clip_scores result that are copied into the sweep's result
SCORER_SETTINGS = ("sampling", "scorer", "truth_i2t")


class Scoring:
    """Sampler and scorer of the runs' checkpoints; each condition is sampled and scored separately.

    Args:
        scores: the experiment's settings.
        runs_dir: folder of the runs, which gets a folder of images and scores for each condition.
        processes: ``--processes`` of eval.clip_scores; None for its default.

    Attributes:
        num_prompts: number of prompts that are sampled.
        conditions: each named condition with each kind of guidance.
        results: scores of all checkpoints, by the condition's label.
    """

    def __init__(self, scores: Scores, runs_dir: Path, processes: int | None = None) -> None:
        self.scores = scores
        self.runs_dir = runs_dir
        self.processes = processes
        self.num_prompts = len(read(scores.prompts))
        if scores.max_prompts is not None:
            self.num_prompts = min(self.num_prompts, scores.max_prompts)
        self.conditions = scores.sampled_conditions()
        self.results: dict[str, Result] = {}
        self._color_differences: dict[tuple[str, str], list[float]] = {}

    @property
    def num_images(self) -> int:
        """Number of images for each run."""
        return self.num_checkpoint_images * len(self.scores.steps) * len(self.conditions)

    @property
    def num_checkpoint_images(self) -> int:
        """Number of images for each checkpoint in one condition."""
        return self.num_prompts * len(self.scores.seeds)

    def settings(self) -> dict[str, Any]:
        """Return the sampling settings that all runs of a result share; JSON-serializable."""
        scores = self.scores
        settings = {
            "prompts": scores.prompts,
            "num_prompts": self.num_prompts,
            "seeds": list(scores.seeds),
            "steps": sorted(scores.steps),
            "guidances": [guidance.text for guidance in scores.guidances],
            "options": dict(scores.options),
        }
        if scores.conditions:
            settings["conditions"] = {
                name: dict(scores.conditions[name]) for name in scores.conditions
            }
        return settings

    def check(self, folders: Sequence[Path], base_model: str) -> None:
        """Check before the training that the checkpoints can be sampled and scored.

        Args:
            folders: folders of the runs that will be trained or resumed, and scored.
            base_model: base model of these runs.

        Raises:
            UserError: a run lacks a checkpoint, the GPU is too small, a flag is wrong, or a model
                can't be loaded.
        """
        for folder in folders:
            require_checkpoints(folder, self.scores.steps)
        require_memory(self.scores.memory_gigabytes)
        # The parser checks all flags. The models are loaded once to check that they are usable.
        parser = ClipScores.parser()
        parsed = [parser.read(self.flags(condition)) for condition in self.conditions]
        for args in parsed:
            settings.sampling(args, base_model)
        load_models(*settings.models(parsed[0], base_model))
        if parsed[0].image_model is not None:
            load_image_model(parsed[0].image_model)

    def score(self, runs: Sequence[Subject]) -> None:
        """Sample and score all checkpoints of some runs."""
        for condition in self.conditions:
            folder = self.runs_dir / condition.folder
            words = [f"{subject.label}={self.runs_dir / subject.label}" for subject in runs]
            words += ["--output_dir", str(folder), *self.flags(condition)]
            print(f"\n{condition.label}:", flush=True)
            # Scored in this process, so models and libraries are loaded only once.
            command = table.command_line("eval.clip_scores", words)
            ClipScores(ClipScores.parser().read(words), command).work()
            result = table.read(folder)
            self.results[condition.label] = result
            self._measure_colors(condition.label, result, folder)

    def flags(self, condition: Condition) -> list[str]:
        """Return the flags of eval.clip_scores for one condition."""
        scores = self.scores
        flags = ["--steps", ",".join(map(str, scores.steps))]
        flags += ["--prompts", scores.prompts]
        flags += ["--seeds", ",".join(map(str, scores.seeds))]
        for name, value in {**scores.options, **condition.options}.items():
            if isinstance(value, str):
                flags += [f"--{name}", value]
            elif value:
                flags.append(f"--{name}")
        flags += ["--guidance_from", str(condition.guidance.source)]
        flags += ["--guidance_scale", f"{condition.guidance.scale:g}"]
        flags += ["--max_prompts", str(self.num_prompts)]
        if self.processes is not None:
            flags += ["--processes", str(self.processes)]
        return flags

    def _measure_colors(self, label: str, result: Result, folder: Path) -> None:
        """Measure the color differences between all images and their held-out pictures."""
        sampled = {prompt["text"] for prompt in result.settings["prompts"]}
        prompts = [prompt for prompt in read(self.scores.prompts) if prompt.text in sampled]
        truths = truth_pictures(prompts, result.settings["sampling"]["base_model"])
        for row in result.select("image"):
            if row.item in truths:
                with Image.open(folder / row.note) as image:
                    difference = color_difference(image, truths[row.item])
                self._color_differences.setdefault((label, row.subject), []).append(difference)

    def rows(self, subject: Subject, losses: Mapping[int, float]) -> Iterator[Row]:
        """Yield the scores of a run, and the regrets of rules that choose one of its checkpoints.

        A score is the mean over the images of a checkpoint.

        Args:
            subject: the run.
            losses: held-out loss of the run by step; steps without a checkpoint are allowed.
        """
        means: dict[tuple[str, str, int], float] = {}  # metric, label of a condition and step
        for label, result in self.results.items():
            for entry in result.subjects:
                if entry.about["run"] != subject.label:
                    continue
                step = entry.about["step"]
                fields = {"item": label, "step": step}
                for metric in SAMPLED_METRICS:
                    values = [row.value for row in result.select(metric, entry.group)]
                    defined = [value for value in values if value is not None]
                    if defined:
                        means[metric, label, step] = compare.mean(defined)
                        yield subject.row(metric, means[metric, label, step], **fields)
                differences = self._color_differences.get((label, entry.label))
                if differences:
                    yield subject.row(COLORS, statistics.fmean(differences), **fields)
        yield from self._changes(subject, means)
        for label, result in self.results.items():
            regrets = step_rules.regrets(truths_by_step(result, subject.label), losses)
            for rule, regret in regrets.items():
                yield subject.row(rule, regret, item=label)

    def _changes(
        self, subject: Subject, means: Mapping[tuple[str, str, int], float]
    ) -> Iterator[Row]:
        """Yield the changes of a run's scores from the first named condition to the others.

        Args:
            subject: the run.
            means: scores by metric, label of the condition, and step.
        """
        first_labels: dict[Guidance, str] = {}
        for condition in self.conditions:
            first_label = first_labels.setdefault(condition.guidance, condition.label)
            if first_label == condition.label:
                continue
            for metric, change in CHANGES.items():
                for step in self.scores.steps:
                    score = means.get((metric, condition.label, step))
                    first_score = means.get((metric, first_label, step))
                    if score is not None and first_score is not None:
                        fields = {"item": condition.label, "step": step}
                        yield subject.row(change, score - first_score, **fields)


def require_checkpoints(folder: Path, steps: Sequence[int]) -> None:
    """Raise UserError if a run has passed one of the steps and has no checkpoint of this step."""
    saved = checkpoint.steps(folder)
    for step in steps:
        if saved and step < saved[-1] and step not in saved:
            raise UserError(
                f"{folder} was trained with other --steps and has no checkpoint of step {step}:"
                " remove that folder, or give another --runs_dir."
            )


def require_memory(gigabytes: float) -> None:
    """Raise UserError if the GPU is smaller than the models that sample and score."""
    if not torch.cuda.is_available():
        return
    _, total_bytes = torch.cuda.mem_get_info()
    if total_bytes < gigabytes * 1e9:
        raise UserError(
            f"the experiment samples with {gigabytes:g} GB of weights, without quantization, but"
            f" this GPU has {total_bytes / 1e9:.0f} GB: use a larger one."
        )


def truths_by_step(result: Result, run: str) -> dict[int, list[float]]:
    """Return the score "truth" of each caption at each checkpoint of a run.

    Args:
        result: result of eval.clip_scores for checkpoints.
        run: name of the run.

    Returns:
        Step -> scores of the captions that have a score at every checkpoint, in the same order for
        all steps; {} without scores.
    """
    truths: dict[int, dict[str, float]] = {}
    for entry in result.subjects:
        if entry.about["run"] != run:
            continue
        for row in result.select("truth", entry.group):
            if row.value is not None:
                truths.setdefault(entry.about["step"], {})[row.item] = row.value
    if not truths:
        return {}
    # Captions with a value at every checkpoint
    captions = sorted(set.intersection(*map(set, truths.values())))
    ordered = {}
    for step, values in truths.items():
        ordered[step] = [values[caption] for caption in captions]
    return ordered
