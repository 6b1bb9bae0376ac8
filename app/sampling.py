"""Requests for images, and the sampler, which keeps one pipeline in memory."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL.Image import Image

from bilora_diffusion.core.errors import UserError, reason, strip_controls
from bilora_diffusion.core.files import is_file, quoted
from bilora_diffusion.core.lora_names import WEIGHTS
from bilora_diffusion.core.values import (
    ADAPTER_GUIDANCE,
    GUIDANCES,
    SAMPLER_STEPS,
    STRENGTHS,
    guidance_title,
    read_guidance_source,
)
from bilora_diffusion.export.conversion import export_checkpoint
from bilora_diffusion.image.base_model import BaseModel, read_base_model
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.mini import MINI, PIPELINES
from bilora_diffusion.run.checkpoint import CHECKPOINTS, DIGESTS, FILES
from bilora_diffusion.run.console import quiet
from eval.command import open_device
from eval.load import applied, require_adapter, set_strengths
from eval.sampler import USUAL_SAMPLER, RunSampler, sampler_of_runs
from eval.sources import find

from .catalog import Catalog
from .runs import RunItem

# Represents the base model where a run's path is expected
BASE = ""
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class BaseChoice:
    """A base model with its loading options, from the configuration of a run."""

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    vae: str | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BaseChoice:
        """Make the base model from the configuration of a run."""
        return cls(
            name=config.get("pretrained_model_name_or_path") or MINI,
            revision=config.get("revision"),
            variant=config.get("variant"),
            cache_dir=config.get("cache_dir"),
            vae=config.get("pretrained_vae_model_name_or_path"),
        )

    def read_base_model(self) -> BaseModel:
        """Read the model's configuration, and keep its name, which the usual settings depend on."""
        return replace(read_base_model(find_folder(self)), name=self.name)


@dataclass(frozen=True)
class Request:
    """An image to sample."""

    prompt: str
    seed: int
    steps: int
    # Guidance scale, as in diffusers
    guidance_scale: float
    # Strength of the adapter
    scale: float
    # Side of the image in pixels; None for the model's native size
    size: int | None = None
    # Model of the unconditional prediction; see `values.read_guidance_source`
    guidance_from: float | str = ADAPTER_GUIDANCE
    # LoRA file and scheduler of the runs' validation images
    sampler: RunSampler = USUAL_SAMPLER


class Sampler:
    """Samples images and keeps the pipeline of the last base model in memory.

    Args:
        device: name of a device, such as "cuda:1"; None for a CUDA GPU if there is one.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = open_device(device)
        self._base: BaseChoice | None = None
        self._pipeline: Any = None

    def sample(
        self,
        base: BaseChoice,
        adapter: Path | None,
        requests: Sequence[Request],
        on_step: Callable[[int], None],
    ) -> list[Image]:
        """Sample an image for each request; this method is not thread-safe.

        Args:
            base: base model, which is loaded if it differs from the last one.
            adapter: run folder or LoRA file; None for the base model alone.
            requests: one request, or several that differ only in `scale` and `guidance_from`. The
                LoRA file of their sampler is applied even to the base model.
            on_step: called after each sampler step with the number of steps so far, counted over
                all images; an exception that it raises ends the sampling.

        Raises:
            UserError: the base model can't be loaded, or a request needs an adapter that can be
                scaled, but the subject was trained as a whole model.
        """
        pipeline = self._load(base)
        subject = find("base" if adapter is None else str(adapter))
        # Guidance from another model needs an adapter that can be scaled.
        for request in requests:
            if request.guidance_from != ADAPTER_GUIDANCE:
                require_adapter(subject, guidance_title(request.guidance_from))
        images: list[Image] = []
        sampler = requests[0].sampler
        with applied(pipeline, subject, requests[0].scale, sampler.lora):
            for number, request in enumerate(requests):
                set_strengths(pipeline, request.scale, sampler.lora)
                steps_before = number * request.steps

                def count_step(step: int, steps_before: int = steps_before) -> None:
                    on_step(steps_before + step)

                images += generate(
                    pipeline,
                    [request.prompt],
                    [request.seed],
                    size=request.size or family_of(pipeline).native_side(pipeline),
                    steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    guidance_from=request.guidance_from,
                    scheduler=sampler.scheduler,
                    on_step=count_step,
                )
        return images

    def _load(self, base: BaseChoice) -> Any:
        """Return the pipeline of a base model; it is loaded if it is not in memory."""
        if self._base == base:
            return self._pipeline
        self._base = self._pipeline = None  # frees the memory for the next pipeline
        quiet()
        try:
            pipeline = self._read(base)
        except (UserError, OSError) as error:
            # The reason can reveal the existence and the content of folders outside of the root, so
            # it is shown only in the terminal and not to visitors.
            print(strip_controls(f"{base.name}: {reason(error)}"), file=sys.stderr, flush=True)
            raise UserError(
                f"the base model {base.name} can't be loaded (the terminal has the reason):"
                f" download it with hf download {base.name}, or, if this is a path, put the"
                " model there"
            ) from error
        self._pipeline = pipeline.to(self.device)
        self._base = base
        return self._pipeline

    def _read(self, base: BaseChoice) -> Any:
        """Load the pipeline of a base model from its folder."""
        folder = find_folder(base)
        dtype = base.read_base_model().family.precision(self.device)
        if base.name in PIPELINES:  # a miniature fits every device in fp32
            dtype = torch.float32
        vae = None
        if base.vae:
            vae = find_folder(BaseChoice(base.vae, cache_dir=base.cache_dir))
        return load_pipeline(folder, dtype=dtype, variant=base.variant, vae=vae)


def find_folder(base: BaseChoice) -> str:
    """Find the folder of a base model on this machine; the viewer never downloads a model.

    Returns:
        The path of the folder, or the name of a miniature.

    Raises:
        UserError: the model is not on this machine.
    """
    # Unlike `Path.exists`, this returns False if the parent folder can't be entered.
    if base.name in PIPELINES or os.path.exists(base.name):
        return base.name
    try:
        return snapshot_download(
            base.name, revision=base.revision, cache_dir=base.cache_dir, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise UserError(
            f'the base model "{base.name}" is not on this machine: download it with'
            f" hf download {base.name}, or, if this is a path, put the model there"
        ) from error


@dataclass(frozen=True)
class Comparison:
    """Two sides that are sampled from the same base model."""

    base: BaseChoice
    # Name and run folder of each side; None for the base model alone
    sides: list[tuple[str, Path | None]]
    # Side of the training images in pixels; None if unknown
    size: int | None
    # Common sampler of the chosen runs
    sampler: RunSampler = USUAL_SAMPLER


def find_comparison(catalog: Catalog, a: str, b: str, uses_run_sampler: bool = True) -> Comparison:
    """Look up the two sides of a comparison.

    Args:
        catalog: folders of the viewer.
        a: path of the first side's run, or `BASE`.
        b: path of the second side's run, or `BASE`.
        uses_run_sampler: whether to use the LoRA file and the scheduler of the runs' validation
            images.

    Raises:
        UserError: a run no longer exists, the runs have different base models, a link leads out of
            the root, or the LoRA file is missing or has changed.
    """
    runs = {run.path: run for run in catalog.scan.runs if can_sample(run)}
    chosen_runs = []
    for path in (a, b):
        if path not in (BASE, *runs):
            raise UserError(f'the run "{path}" no longer exists: choose another')
        if path != BASE:
            chosen_runs.append(runs[path])
    bases = [BaseChoice.from_config(run.record["config"]) for run in chosen_runs]
    if len(set(bases)) > 1:
        raise UserError(
            f"the two runs have different base models, {bases[0].name} and {bases[1].name}:"
            " choose two with the same base model"
        )
    if not bases:
        # Both sides are the base model: use the base model of the first run, or the miniature.
        bases = [BaseChoice.from_config(run.record["config"]) for run in runs.values()]
        bases.append(BaseChoice(MINI))
    side_of_path: dict[str, tuple[str, Path | None]] = {BASE: ("base model", None)}
    size = None
    for run in chosen_runs:
        catalog.resolve(run.weights or run.path)  # refuses a link out of the root
        side_of_path[run.path] = (run.name, catalog.resolve(run.path))
        size = size or training_size(run)
    sampler = USUAL_SAMPLER
    if uses_run_sampler:
        sampler = sampler_of_runs([run.record["config"] for run in chosen_runs])
    return Comparison(bases[0], [side_of_path[a], side_of_path[b]], size, sampler)


def training_size(run: RunItem) -> int | None:
    """Return the side of a run's training images in pixels; None if it is not recorded."""
    size = run.record["config"].get("resolution")
    return size if isinstance(size, int) else None


def can_sample(run: RunItem) -> bool:
    """Return whether a run has weights of an image model; text models have a PEFT adapter."""
    return run.weights is not None and not run.weights.endswith(WEIGHTS)


@contextmanager
def temporary_export(catalog: Catalog, run: RunItem, step: int) -> Iterator[Path]:
    """Export a checkpoint's weights to a temporary file, which is deleted when the context exits.

    Raises:
        UserError: the checkpoint lacks a file or can't be exported, or a link leads out of the
            root.
    """
    # Links out of the root are refused, and so are pipes, which would block the reader.
    for name in (DIGESTS, *FILES):
        if not is_file(catalog.resolve(f"{run.path}/{CHECKPOINTS}/step-{step}/{name}")):
            raise UserError(f"the checkpoint at step {step} has no {name}: choose another")
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        (file,) = export_checkpoint(catalog.resolve(run.path), step, "diffusers", folder)
        yield file


def read_form(
    prompt: str,
    seed: float | None,
    steps: float | None,
    guidance: float,
    scale: float,
    guidance_from: float | str = ADAPTER_GUIDANCE,
) -> Request:
    """Check the values of a form, and make a request from them.

    Raises:
        UserError: a value is missing or out of range.
    """
    if not prompt or not prompt.strip():
        raise UserError("the prompt is empty: describe the image")
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed is {seed}: give a whole number from 0 to {MAX_SEED}")
    SAMPLER_STEPS.check("the number of steps", steps)
    GUIDANCES.check("the guidance scale", guidance)
    STRENGTHS.check("the adapter's scale", scale)
    return Request(
        prompt=prompt.strip(),
        seed=int(seed),
        steps=int(steps or 0),
        guidance_scale=float(guidance),
        scale=float(scale),
        guidance_from=read_source(guidance_from),
    )


def read_source(value: float | str) -> float | str:
    """Read the model of the unconditional prediction from a form.

    Raises:
        UserError: the value is not "adapter", "base" or a strength in the allowed range.
    """
    try:
        return read_guidance_source(value)
    except ValueError as error:
        raise UserError(f'"Guidance from" is {quoted(value)}: {error}') from error
