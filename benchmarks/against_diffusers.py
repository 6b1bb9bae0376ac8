"""Whole commands side by side: diffusers' own SDXL DreamBooth script and this one.

    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py
    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py \\
        --model random_sdxl --resolution 256 --batch 1 --steps 69 --mixed_precision bf16 \\
        --methods bilora

``--script`` is a copy of diffusers' ``examples/dreambooth/train_dreambooth_lora_sdxl.py`` of the
version that is installed. Both see the same folder of images, with the same batch, rank, alpha,
rate, start and layers, and write one LoRA file. Whole processes take turns, in rotating order:
LoRA there, LoRA here and Bi-LoRA here, a seed for each round. Steps are timed by their progress
bars. On a CPU memory is the highest resident one, on a GPU what the device holds beyond what it
held before. On the miniature the held-out loss of what each round made is measured on this
project's grid. Random weights come from ``make_random_sdxl.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import KIBI, circumstances, interleave, paired_ratio, watched

from bilora_diffusion import methods, mini
from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import TrainingError, UserError, run_cli
from bilora_diffusion.image.config import parse as parse_run
from bilora_diffusion.image.decode import image_suffixes
from bilora_diffusion.image.script import build_task
from bilora_diffusion.train.running import build_accelerator

OURS = Path(__file__).resolve().parents[1] / "train_dreambooth_bilora.py"
PEER = "diffusers, LoRA"
METHODS = ("lora", "bilora")
PROMPT = "a TOK icon, in the style of TOK"
STEP = re.compile(rb"(\d+)/(\d+) \[")
FIGURES = {
    "seconds": ("whole command (s)", 1),
    "start": ("to the first step (s)", 1),
    "step": ("a step (s)", 1),
    "images_per_second": ("images/s", 1),
    "memory": ("memory (GB)", 1e-9),
    "heldout_loss": ("held-out loss x 1000", 1e3),
}
"""What a round measures of an arm -> its column, and its unit there."""
POLL = 0.1  # seconds between two looks at a device's memory


@dataclass(frozen=True)
class Taken:
    """What one command took.

    Args:
        seconds: of the whole process.
        start: until its first step began.
        step: median seconds of a step after the first; of all there are where there is but one.
        memory: bytes at its peak.
    """

    seconds: float
    start: float
    step: float
    memory: float


def command(
    method: str | None, folder: Path, seed: int, images: Path, args: argparse.Namespace
) -> list[str]:
    """The words of a command line after ``python``: of this script, or without a method of the
    other.
    """
    same = {
        "pretrained_model_name_or_path": args.model,
        "instance_data_dir": images,
        "instance_prompt": PROMPT,
        "resolution": args.resolution,
        "train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "max_train_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "rank": args.rank,
        "mixed_precision": args.mixed_precision,
        "checkpointing_steps": args.steps + 1,
        "num_validation_images": 0,
        "seed": seed,
        "output_dir": folder,
    }
    words = [word for name, value in same.items() for word in (f"--{name}", str(value))]
    if args.gradient_checkpointing:
        words.append("--gradient_checkpointing")
    if method is None:
        return [str(args.script), *words, *shlex.split(args.peer_flags)]
    ours = ["--method", method, "--lora_alpha", str(args.rank)]
    ours += ["--init_lora_weights", "gaussian", "--no_output_kohya_format"]
    ours += ["--validation_dataset", "none", "--disk_cache", "no"]
    return [str(OURS), *words, *ours, *shlex.split(args.our_flags)]


def run(words: Sequence[str], steps: int, log: Path) -> Taken:
    """Run a command of so many steps to its end; what it prints goes to ``log``.

    Raises:
        TrainingError: it failed, or showed no progress bar.
    """
    bars = {"TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1", "HF_HUB_OFFLINE": "1"}
    began, ticks = time.perf_counter(), []
    with device_memory() as held, log.open("wb") as kept:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            watched(words), stdout=pipe, stderr=pipe, env={**os.environ, **bars}
        )
        assert process.stdout is not None
        assert process.stderr is not None
        while block := os.read(process.stderr.fileno(), 2**16):
            now = time.perf_counter() - began
            kept.write(block)
            ticks += [(int(done), int(total), now) for done, total in STEP.findall(block)]
        resident = process.stdout.read()
        ended = process.wait()
        whole = time.perf_counter() - began
    if ended:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise TrainingError(f"{Path(words[0]).name} ended with {ended}:\n" + "\n".join(last))
    first, *others = taken_at(ticks, steps)
    gaps = [later - earlier for earlier, later in zip([first, *others], others, strict=False)]
    step = statistics.median(gaps) if gaps else first
    return Taken(whole, max(0.0, first - step), step, held() or int(resident) * KIBI)


def taken_at(ticks: Sequence[tuple[int, int, float]], steps: int) -> list[float]:
    """When each step of the training was done, from all that progress bars showed.

    Loading shows bars too: the training's is, of those of so many steps, the one that took longest.

    Args:
        ticks: steps done, of how many, and when.
        steps: how many there are.

    Raises:
        TrainingError: no bar has so many steps.
    """
    bars: list[dict[int, float]] = []
    for done, total, now in ticks:
        if total == steps:
            if done == 0 or not bars:
                bars.append({})
            bars[-1].setdefault(done, now)
    bars = [bar for bar in bars if bar.get(steps)]
    if not bars:
        raise TrainingError(f"the command shows no progress bar of {steps} steps.")
    longest = max(bars, key=lambda bar: bar[steps] - min(bar.values()))
    return [longest[done] for done in sorted(longest) if done]


@contextmanager
def device_memory() -> Iterator[Callable[[], int]]:
    """Watches, within the context, the memory that the GPU holds beyond what it held before; it is
    0 without a GPU.
    """
    if not torch.cuda.is_available():
        yield lambda: 0
        return
    free = torch.cuda.mem_get_info()[0]
    least, over = [free], threading.Event()

    def look() -> None:
        while not over.wait(POLL):
            least[0] = min(least[0], torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield lambda: free - least[0]
    finally:
        over.set()
        watcher.join()


def heldout_loss(lora: Path) -> float:
    """Loss of a LoRA for the miniature on its unseen icons, on the grid of this project's runs."""
    words = ["--dataset", "mini", "--mixed_precision", "no", "--report_to", "none"]
    words += ["--disk_cache", "no"]
    cfg = parse_run([*words, "--num_validation_images", "0", "--output_dir", str(lora / "grid")])
    task = build_task(cfg, build_accelerator(cfg))
    task.pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    assert task.grid is not None
    return task.grid()["heldout_loss"]


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that the command line asks for, with its logs and runs under ``folder``."""
    images = folder / "images"
    images.mkdir()
    for picture in sorted(args.images.iterdir()):
        if picture.suffix.lower() in image_suffixes():
            shutil.copy(picture, images)
    arms: dict[str, str | None] = {PEER: None}
    arms |= {methods.get(name).title: name for name in args.methods}
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}

    def work(arm: str, number: int) -> float:
        out = folder / f"{arms[arm]}-{number}"
        words = command(arms[arm], out, number, images, args)
        figures = asdict(run(words, args.steps, folder / f"{out.name}.log"))
        figures["images_per_second"] = args.batch / figures["step"]
        if args.model == str(mini.pipeline_dir()):
            figures["heldout_loss"] = heldout_loss(out)
        measured[arm].append(figures)
        print(f"round {number + 1}, {arm}: {figures}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
        return figures["seconds"]

    interleave(
        [lambda number, arm=arm: work(arm, number) for arm in measured],
        rounds=args.rounds,
        warmup=0,
    )
    rows = {arm: summary(measured[arm], measured[PEER]) for arm in measured}
    count = len(list(images.iterdir()))
    about = {"images": count, "rounds": args.rounds, "flags": settings(args)}
    used = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"arms": rows, **about, **circumstances(used)}


def summary(
    rounds: Sequence[dict[str, float]], peer: Sequence[dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Medians of an arm's figures, and their paired ratios to the peer with 95 % intervals."""
    row = {}
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        ratio, interval = paired_ratio(values, [one[name] for one in peer])
        row[name] = {"median": statistics.median(values), "ratio": ratio, "ratio_95": interval,
                     "values": values}  # fmt: skip
    return row


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that say what was measured, without places of this machine."""
    kept = {k: v for k, v in vars(args).items() if k not in ("json", "images", "script")}
    return {**kept, "model": Path(args.model).name, "script": args.script.name}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = {name: FIGURES[name] for name in result["arms"][PEER]}
    titles = " | ".join(title for title, _ in columns.values())
    lines = [f"| | {titles} |", "|---|" + "---|" * len(columns)]
    for arm, row in result["arms"].items():
        cells = []
        for name, (_, unit) in columns.items():
            one, spread = row[name], row[name]["ratio_95"]
            cell = f"{one['median'] * unit:.2f}"
            if arm != PEER:
                cell += f", x {one['ratio']:.2f}"
                cell += "" if spread is None else f" ({spread[0]:.2f} to {spread[1]:.2f})"
            cells.append(cell)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    device = result["device"]
    machine = device["gpu"] or f"{device['cpu_model']}, {device['cpu_cores']} cores"
    flags = result["flags"]
    lines += [
        "",
        f"{result['rounds']} rounds of {flags['steps']} steps of {flags['batch']} at"
        f" {flags['resolution']} px, {result['images']} images, {flags['mixed_precision']};"
        f" {machine}, torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line to settings.

    Raises:
        UserError: no such script or folder, a number out of range.
    """
    parser = argparse.ArgumentParser(description="diffusers' script and this one, side by side.")
    parser.add_argument("--script", type=Path, required=True, help="copy of diffusers' script")
    parser.add_argument("--model", default=str(mini.pipeline_dir()), help="default: the miniature")
    parser.add_argument("--images", type=Path, default=mini.train_dir(), help="default: 23 icons")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rank", type=int, default=4, help="alpha is the same, as it is there")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--mixed_precision", default="no", choices=("no", "fp16", "bf16"))
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--peer_flags", default="", help="more flags for diffusers' script")
    parser.add_argument("--our_flags", default="", help="more flags for this project's")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args(argv)
    if not args.script.is_file():
        raise UserError(f"--script is {args.script}, which is no file; give your copy of it.")
    if not args.images.is_dir():
        raise UserError(f"--images is {args.images}, which is no folder.")
    for name in ("resolution", "batch", "steps", "rounds", "rank"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; use at least 1.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    args = parse(argv)
    with TemporaryDirectory() as folder:
        result = benchmark(args, Path(folder))
    print(table(result))
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))
