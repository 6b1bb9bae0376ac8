"""Samples and scores of the checkpoints of runs, by eval.clip_scores."""

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

# Settings of eval.clip_scores that a sweep's result has too
SCORER_SETTINGS = ("sampling", "scorer", "truth_i2t")


class Scoring:
    """Samples the checkpoints of runs and scores them, once for each condition.

    Args:
        scores: of the experiment.
        runs_dir: folder of the runs, which gets a folder of images and scores for each condition.
        processes: ``--processes`` of eval.clip_scores.

    Attributes:
        num_prompts: number of prompts that are sampled.
        conditions: kinds of guidance times the experiment's named conditions.
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
        """Number of images of a run."""
        return self.num_checkpoint_images * len(self.scores.steps) * len(self.conditions)

    @property
    def num_checkpoint_images(self) -> int:
        """Number of images of a checkpoint in one condition."""
        return self.num_prompts * len(self.scores.seeds)

    def settings(self) -> dict[str, Any]:
        """What all runs of a result have in common, as JSON can hold it."""
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
        """Refuse before the training what would fail after it.

        Args:
            folders: of the runs that are to be trained or continued, and scored.
            base_model: of these runs.
        """
        for folder in folders:
            require_checkpoints(folder, self.scores.steps)
        require_memory(self.scores.memory_gigabytes)
        # The parser checks all flags, and the models are read as they will be for the scores.
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
            # In this process, so that models and libraries are loaded once.
            command = table.command_line("eval.clip_scores", words)
            ClipScores(ClipScores.parser().read(words), command).work()
            result = table.read(folder)
            self.results[condition.label] = result
            self._measure_colors(condition.label, result, folder)

    def flags(self, condition: Condition) -> list[str]:
        """Flags of eval.clip_scores for one condition."""
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
        """Measure how the colors of all images differ from their held-out pictures."""
        sampled = {prompt["text"] for prompt in result.settings["prompts"]}
        prompts = [prompt for prompt in read(self.scores.prompts) if prompt.text in sampled]
        truths = truth_pictures(prompts, result.settings["sampling"]["base_model"])
        for row in result.select("image"):
            if row.item in truths:
                with Image.open(folder / row.note) as image:
                    difference = color_difference(image, truths[row.item])
                self._color_differences.setdefault((label, row.subject), []).append(difference)

    def rows(self, subject: Subject, losses: Mapping[int, float]) -> Iterator[Row]:
        """The scores of a run, and the regrets of rules that choose one of its checkpoints.

        A value is the mean over the images of a checkpoint.

        Args:
            losses: held-out loss of the run by step, perhaps of further steps.
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
        """What each named condition adds to a run's scores in the first one.

        Args:
            means: by metric, label of the condition and step.
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
    """Refuse a run that is beyond a step whose checkpoint it lacks."""
    saved = checkpoint.steps(folder)
    for step in steps:
        if saved and step < saved[-1] and step not in saved:
            raise UserError(
                f"{folder} was trained with other --steps and has no checkpoint of step {step}:"
                " remove that folder, or give another --runs_dir."
            )


def require_memory(gigabytes: float) -> None:
    """Refuse a GPU that is smaller than the weights of the models that sample and score."""
    if not torch.cuda.is_available():
        return
    _, total_bytes = torch.cuda.mem_get_info()
    if total_bytes < gigabytes * 1e9:
        raise UserError(
            f"the experiment samples with {gigabytes:g} GB of weights, without quantization, and"
            f" this GPU has {total_bytes / 1e9:.0f} GB: use a larger one."
        )


def truths_by_step(result: Result, run: str) -> dict[int, list[float]]:
    """Ground truth of each caption at each checkpoint of a run, the captions in one order.

    Args:
        result: scored checkpoints.
        run: the run's name.
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
    # Captions with a value at each checkpoint
    captions = sorted(set.intersection(*map(set, truths.values())))
    ordered = {}
    for step, values in truths.items():
        ordered[step] = [values[caption] for caption in captions]
    return ordered
