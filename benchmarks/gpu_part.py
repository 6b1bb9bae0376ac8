"""One part of gpu_day.py, in its own process: training steps, then a sampled image.

A step is a run's `Trainer.train_step`, with a model of full size and random weights, on the
miniature's icons at the part's image size. ``--dry_run`` estimates the memory of the same run. The
results are written after the steps, and again after the image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_result import FAILED, MEASURED, OUT_OF_MEMORY
from benchmarks.measure import seconds
from benchmarks.random_pipelines import (
    SHAPES,
    RandomPrompts,
    build_pipeline,
    with_weights,
    write_outline,
)
from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.core.durable import write_text
from bilora_diffusion.core.errors import describe_error, run_cli
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.image.config import resolve as parse_run
from bilora_diffusion.image.pipeline import memory_by_phase
from bilora_diffusion.image.script import training_images
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.methods import for_run
from bilora_diffusion.run import provenance
from bilora_diffusion.train.dry_run import STEP, attach_copy, complete, process_bytes
from bilora_diffusion.train.engine import Blocks, build_accelerator
from bilora_diffusion.train.trainer import Trainer

RANK = 4
SAMPLING = "encoding or sampling"  # phase of `memory_by_phase`
# Phrases in the messages of out-of-memory errors that are not a `torch.OutOfMemoryError`
MEMORY_ERRORS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Part:
    """The settings of a part.

    Attributes:
        model: Key of `SHAPES`.
        pixels: Side of the images in pixels.
        batch: Images per step.
        method: Value of ``--method``.
        quantize: Value of ``--quantize``.
        compile: Whether the denoiser's blocks are compiled.
    """

    model: str
    pixels: int
    batch: int = 1
    method: str = "lora"
    quantize: str = "none"
    compile: bool = False

    @property
    def key(self) -> str:
        """Name of the part in the file of results."""
        words = [self.model, f"{self.pixels} px", f"batch {self.batch}", self.method]
        if self.quantize != "none":
            words.append(self.quantize)
        if self.compile:
            words.append("compile")
        return ", ".join(words)


@dataclass(frozen=True)
class Lengths:
    """Numbers of steps on a kind of device."""

    # Steps before the measured ones. The operations are counted in the first.
    warmup: int
    # Largest number of measured steps
    steps: int
    # Total seconds of measured steps, after which no further step is measured
    seconds: float
    # Sampler steps of the image
    sampler_steps: int


LENGTHS = {
    "cuda": Lengths(warmup=3, steps=10, seconds=120, sampler_steps=25),
    "cpu": Lengths(warmup=1, steps=2, seconds=20, sampler_steps=2),
}


def configuration(part: Part, device: torch.device, folder: Path) -> DreamBoothConfig:
    """Return the configuration of a part's run."""
    outline = folder / "model"
    write_outline(build_pipeline(part.model), outline)
    lengths = LENGTHS[device.type]
    words = (
        f"--pretrained_model_name_or_path {outline} --output_dir {folder / 'run'}"
        f" --dataset mini --validation_dataset none --disk_cache no --report_to none"
        f" --resolution {part.pixels} --train_batch_size {part.batch}"
        f" --gradient_accumulation_steps 1 --max_train_steps {lengths.warmup + lengths.steps}"
        f" --method {part.method} --rank {RANK} --lora_alpha {RANK} --learning_rate 1e-4"
        f" --lr_scheduler constant --lr_warmup_steps 0"
        f" --mixed_precision bf16 --gradient_checkpointing --quantize {part.quantize}"
        f" --num_validation_images 1 --validation_num_inference_steps {lengths.sampler_steps}"
    ).split()
    if part.compile:
        words.append("--compile")
    return parse_run([*words, "--validation_prompt", "a photo"])


def estimate(cfg: DreamBoothConfig, name: str, device: torch.device) -> dict[str, int]:
    """Estimate the bytes of a training step and of sampling, as ``--dry_run`` does.

    On a GPU, the memory of the CUDA context is left out, since PyTorch's statistics do not
    include it.
    """
    task = DreamBooth(cfg, build_pipeline(name), TrainingStream(cfg, training_images(cfg)))
    _, trained = attach_copy(task, cfg.max_train_steps or 1)
    process = 0 if device.type == "cuda" else process_bytes(device)
    phases = complete(memory_by_phase(task, device), trained, process)
    return {phase: sum(phases[phase].values()) for phase in (STEP, SAMPLING)}


def measure(part: Part, device: torch.device, report: Callable[[dict[str, Any]], None]) -> None:
    """Measure a part.

    Args:
        part: Settings of the part.
        device: Device of the run.
        report: Function that is called with the results so far, after the steps and after the
            image.
    """
    with TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder)
        cfg = configuration(part, device, folder)
        accelerator = build_accelerator(cfg)
        device = accelerator.device
        estimates = estimate(cfg, part.model, device)
        started = time.perf_counter()
        # As in a run, weights are quantized layer by layer while they are moved to the device.
        first_device = device if part.quantize == "none" else torch.device("cpu")
        pipeline = build_pipeline(part.model, with_weights(first_device))
        task = DreamBooth(cfg, pipeline, TrainingStream(cfg, training_images(cfg)))
        task.prompts = RandomPrompts(part.model, pipeline, device)
        if part.quantize != "none":
            for model in task.models.values():
                quantize(model, torch.bfloat16, device=device)
        task.to_device(device)
        trainer = Trainer(task, for_run(vars(cfg), cfg.max_train_steps or 1), cfg, accelerator)
        trainer.initialise()
        measurements = {"outcome": MEASURED, "setup_seconds": time.perf_counter() - started}
        measurements |= train(trainer, LENGTHS[device.type])
        measurements["images_per_second"] = part.batch / measurements["step_seconds"]
        measurements["estimated_bytes"] = estimates[STEP]
        report(measurements)

        sampling: dict[str, Any] = {"estimated_bytes": estimates[SAMPLING]}
        try:
            reset_peak(device)
            sampling["seconds"] = seconds(
                lambda: task.validate(trainer.step, folder, trainer.evaluating()), device
            )
            sampling["peak_bytes"] = provenance.peak_memory(device)
            sampling["outcome"] = MEASURED
        except Exception as error:
            sampling |= failure(error)
        sampling["sampler_steps"] = LENGTHS[device.type].sampler_steps
        report(measurements | {"sampling": sampling})


def train(trainer: Trainer, lengths: Lengths) -> dict[str, Any]:
    """Train the steps of a part.

    Returns:
        Seconds of each measured step and their median, seconds of the warm-up steps after the
        first, operations of a step, peak memory in bytes (on a GPU also the reserved memory), and
        losses.
    """
    device = trainer.accelerator.device
    compiled_models = []
    if trainer.cfg.compile:
        compiled_models = [target.model for target in trainer.method.targets]
    blocks = Blocks(compiled_models)
    step_times: list[float] = []
    warmup_times: list[float] = []
    losses = []
    operations = 0
    for batches in trainer.micro_batches():
        if trainer.step == 0:
            with counted_operations() as counter:
                losses.append(trainer.train_step(batches)["loss"])
            operations = counter.get_total_flops()
            reset_peak(device)
            continue
        with blocks.step(trainer.step + 1):
            values = trainer.train_step(batches)  # waits for the device
        losses.append(values["loss"])
        if trainer.step <= lengths.warmup:
            warmup_times.append(values["seconds"])
            continue
        step_times.append(values["seconds"])
        if sum(step_times) > lengths.seconds:
            break
    measurements: dict[str, Any] = {
        "step_seconds": statistics.median(step_times),
        "seconds": step_times,
        "warmup_seconds": warmup_times,
        "operations": operations,
        "peak_bytes": provenance.peak_memory(device),
        "losses": losses,
    }
    if device.type == "cuda":
        measurements["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return measurements


@contextmanager
def counted_operations() -> Iterator[FlopCounterMode]:
    """Count the operations of matrix products, convolutions and attention within a context.

    Compiled blocks run uncompiled, since the counter can't see into their kernels.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield stack.enter_context(FlopCounterMode(display=False))


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory statistics of a GPU. The peak of a CPU process can't be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def failure(error: BaseException) -> dict[str, str]:
    """Return the outcome and reason of a part or image that ended with an error."""
    cause: BaseException | None = error
    while cause is not None:
        is_full = isinstance(cause, torch.OutOfMemoryError | MemoryError)
        if is_full or any(words in str(cause) for words in MEMORY_ERRORS):
            return {"outcome": OUT_OF_MEMORY}
        cause = cause.__cause__
    return {"outcome": FAILED, "reason": describe_error(error)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the part that the command line describes, and write its results."""
    parser = argparse.ArgumentParser(description="Measure one part; gpu_day.py runs this script.")
    parser.add_argument("part", type=json.loads, help="fields of `Part`, as JSON")
    parser.add_argument("--device", choices=LENGTHS, required=True)
    parser.add_argument("--json", type=Path, required=True, help="result file")
    args = parser.parse_args(argv)
    part = Part(**args.part)
    if part.model not in SHAPES:
        parser.error(f"no model {part.model}")

    def report(measurements: dict[str, Any]) -> None:
        write_text(args.json, json.dumps(measurements))

    try:
        measure(part, torch.device(args.device), report)
    except Exception as error:
        report(failure(error))
        raise


if __name__ == "__main__":
    sys.exit(run_cli(main))
