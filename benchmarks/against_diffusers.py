"""Whole commands side by side: diffusers' own SDXL DreamBooth script and this one.

    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py
    python benchmarks/against_diffusers.py --script train_dreambooth_lora_sdxl.py \\
        --model random_sdxl --resolution 256 --batch 1 --steps 69 --mixed_precision bf16 \\
        --methods bilora

``--script`` is a copy of diffusers' ``examples/dreambooth/train_dreambooth_lora_sdxl.py`` of the
version that is installed. Both see the same folder of images, with the same batch, rank, alpha,
rate, start and layers, and write one LoRA file. Whole processes take turns, in rotating order:
LoRA there, LoRA here and Bi-LoRA here, a seed for each round. Steps are timed by their progress
bars. Memory is the highest resident one, a GPU's own left out. On the miniature the held-out loss
of what each round made is measured on this project's grid. Random weights come from
``make_random_sdxl.py``.
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
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import KIBI, circumstances, interleave, paired_ratio, watched

from bilora_diffusion import methods, mini
from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import TrainingError, UserError, run_cli
from bilora_diffusion.image.config import resolve as parse_run
from bilora_diffusion.image.script import build_task
from bilora_diffusion.train.running import build_accelerator

OURS = str(Path(__file__).resolve().parents[1] / "train_dreambooth_bilora.py")
PEER = "diffusers, LoRA"
METHODS = ("lora", "bilora")
PROMPT = "a TOK icon, in the style of TOK"
RANK = 4
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


def command(method: str | None, folder: Path, seed: int, images: Path, args: Any) -> list[str]:
    """The words of this script's command line after ``python``; of the other without a method."""
    same = (
        f"--pretrained_model_name_or_path {args.model} --instance_data_dir {images}"
        f" --resolution {args.resolution} --train_batch_size {args.batch} --rank {RANK}"
        f" --max_train_steps {args.steps} --checkpointing_steps {args.steps + 1}"
        f" --mixed_precision {args.mixed_precision} --seed {seed} --output_dir {folder}"
        " --gradient_accumulation_steps 1 --learning_rate 1e-3 --lr_scheduler constant"
        " --lr_warmup_steps 0 --num_validation_images 0"
    )
    words = [*same.split(), "--instance_prompt", PROMPT]
    if method is None:
        return [str(args.script), *words, *shlex.split(args.peer_flags)]
    ours = f"--method {method} --lora_alpha {RANK} --init_lora_weights gaussian"
    ours += " --no_output_kohya_format --validation_dataset none --disk_cache no"
    return [OURS, *words, *ours.split()]


def run(words: Sequence[str], steps: int, log: Path) -> dict[str, float]:
    """Run a command of so many steps to its end; what it prints goes to ``log``.

    Returns:
        "seconds" of the whole process, until its first step began ("start") and of a later step
        (the median), and bytes of "memory".

    Raises:
        TrainingError: it failed, or showed no progress bar.
    """
    bars = {**os.environ, "TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1", "HF_HUB_OFFLINE": "1"}
    began, ticks, pipe = time.perf_counter(), [], subprocess.PIPE
    with log.open("wb") as kept:
        process: Any = subprocess.Popen(watched(words), stdout=pipe, stderr=pipe, env=bars)
        while block := os.read(process.stderr.fileno(), 2**16):
            now = time.perf_counter() - began
            kept.write(block)
            ticks += [(int(done), int(total), now) for done, total in STEP.findall(block)]
        resident, ended = process.stdout.read(), process.wait()
        whole = time.perf_counter() - began
    if ended:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise TrainingError(f"{Path(words[0]).name} ended with {ended}:\n" + "\n".join(last))
    first, *others = taken_at(ticks, steps)
    gaps = [later - earlier for earlier, later in zip([first, *others], others, strict=False)]
    step = statistics.median(gaps) if gaps else first
    memory = int(resident) * KIBI
    return {"seconds": whole, "start": max(0.0, first - step), "step": step, "memory": memory}


def taken_at(ticks: Sequence[tuple[int, int, float]], steps: int) -> list[float]:
    """When each step of the training was done, from all that progress bars showed.

    Loading shows bars too: the training's is, of those of so many steps, the one that took longest.

    Args:
        ticks: steps done, of how many, and when.
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


def heldout_loss(lora: Path) -> float:
    """Loss of a LoRA for the miniature on its unseen icons, on the grid of this project's runs."""
    words = "--dataset mini --mixed_precision no --report_to none --disk_cache no"
    words += " --num_validation_images 0 --output_dir"
    cfg = parse_run([*words.split(), str(lora / "grid")])
    task = build_task(cfg, build_accelerator(cfg))
    task.pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    assert task.grid is not None
    return task.grid()["heldout_loss"]


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that the command line asks for, with its logs and runs under ``folder``."""
    images = folder / "images"
    shutil.copytree(mini.train_dir(), images, ignore=shutil.ignore_patterns("*.jsonl"))
    arms: dict[str, str | None] = {PEER: None}
    arms |= {methods.get(name).title: name for name in args.methods}
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}

    def work(arm: str, number: int) -> float:
        out = folder / f"{arms[arm]}-{number}"
        words = command(arms[arm], out, number, images, args)
        figures = run(words, args.steps, folder / f"{out.name}.log")
        figures["images_per_second"] = args.batch / figures["step"]
        if args.model == str(mini.pipeline_dir()):
            figures["heldout_loss"] = heldout_loss(out)
        measured[arm].append(figures)
        print(f"round {number + 1}, {arm}: {figures}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
        return figures["seconds"]

    works = [lambda number, arm=arm: work(arm, number) for arm in measured]
    interleave(works, rounds=args.rounds, warmup=0)
    rows = {arm: summary(measured[arm], measured[PEER]) for arm in measured}
    flags = {k: v for k, v in vars(args).items() if k != "json"}  # without places of this machine
    flags |= {"model": Path(args.model).name, "script": args.script.name}
    about = {"images": len(list(images.iterdir())), "rounds": args.rounds, "flags": flags}
    used = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"arms": rows, **about, **circumstances(used)}


def summary(rounds: Sequence[Any], peer: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Medians of an arm's figures, and their paired ratios to the peer with 95 % intervals."""
    row = {}
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        ratio, interval = paired_ratio(values, [one[name] for one in peer])
        row[name] = {"median": statistics.median(values), "ratio": ratio}
        row[name] |= {"ratio_95": interval, "values": values}
    return row


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = {name: FIGURES[name] for name in result["arms"][PEER]}
    titles = " | ".join(title for title, _ in columns.values())
    lines = [f"| | {titles} |", "|---|" + "---|" * len(columns)]
    for arm, row in result["arms"].items():
        cells = []
        for name, (_, unit) in columns.items():
            ratio, spread = row[name]["ratio"], row[name]["ratio_95"]
            cell = f", x {ratio:.2f}" if arm != PEER else ""
            cell += f" ({spread[0]:.2f} to {spread[1]:.2f})" if cell and spread else ""
            cells.append(f"{row[name]['median'] * unit:.2f}{cell}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    flags, device = result["flags"], result["device"]
    lines += [
        "",
        f"{result['rounds']} rounds of {flags['steps']} steps of {flags['batch']} at"
        f" {flags['resolution']} px, {flags['mixed_precision']}; {device['cpu_model']},"
        f" {device['cpu_cores']} cores, torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line to settings."""
    parser = argparse.ArgumentParser(description="diffusers' script and this one, side by side.")
    parser.add_argument("--script", type=Path, required=True, help="copy of diffusers' script")
    parser.add_argument("--model", default=str(mini.pipeline_dir()), help="default: the miniature")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--mixed_precision", default="no", choices=("no", "fp16", "bf16"))
    parser.add_argument("--peer_flags", default="", help="more flags for diffusers' script")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args(argv)
    if not args.script.is_file():
        raise UserError(f"--script is {args.script}, which is no file; give your copy of it.")
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
