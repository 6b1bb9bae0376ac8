"""Cost of a training step: the methods side by side, as in the paper's Table 7.

    python benchmarks/step_cost.py --shapes mini                     # a minute or two on a CPU
    python benchmarks/step_cost.py --shapes t5-base --methods all --json t5.json
    python benchmarks/step_cost.py --shapes t5-base --methods all --batch 32   # as in Table A4
    python benchmarks/step_cost.py --shapes llama-7b-layer --methods all   # fp32, 5 GB
    python benchmarks/step_cost.py --shapes mini --arms lora,lora-compiled,bilora,bilora-compiled
    python benchmarks/step_cost.py --shapes sdxl-unet                # 2.57 B parameters, 6 GB
    python benchmarks/step_cost.py --shapes sdxl-unet --dtype fp32   # 11 GB; for CPUs without bf16

All arms live in one process on the same base weights and take turns, one step each, in rotating
order; the ratio to LoRA is the median over rounds, its interval a 95 % bootstrap. A step is
forward, backward, clipping, optimizer step with the projection onto the ball (Eq. 10), gradients
forgotten. Weights are random: time does not depend on them. Peak memory cannot be told apart within
a process, so each arm is also run for two steps in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arms import BASELINE, KINDS, METHODS, Arm, make
from measure import circumstances, interleave, paired_ratio, seconds
from shapes import DTYPES, SHAPES

from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import TrainingError, UserError, run_cli
from bilora_diffusion.run import provenance

SEED = 0


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the command line asks for; returns what is printed and written."""
    memory = {kind: memory_of(kind, args) for kind in args.arms}
    device, shape = _device(), SHAPES[args.shapes]
    arms = make(args.arms, shape, args.batch, DTYPES[args.dtype], device, SEED)

    def work(arm: Arm, number: int) -> float:
        torch.manual_seed(shape.warmup + number)  # one dropout for all arms of a round
        losses: list[torch.Tensor] = []
        taken = seconds(lambda: losses.append(arm.train_step()), device)
        arm.losses.append(float(losses[0]))
        return taken

    steps = [lambda number, arm=arm: work(arm, number) for arm in arms]
    times = interleave(steps, rounds=args.steps, warmup=shape.warmup)
    rows = {}
    for arm, own in zip(arms, times, strict=True):
        ratio, interval = paired_ratio(own, times[args.arms.index(BASELINE)])
        rows[arm.kind] = {
            "label": KINDS[arm.kind].label,
            "median_seconds": statistics.median(own),
            "ratio_to_lora": ratio,
            "ratio_interval_95": interval,
            "peak_memory_bytes": memory[arm.kind],
            "trained_parameters": arm.trainable,
            "first_loss": arm.losses[0],
            "last_loss": arm.losses[-1],
            "seconds": own,
        }
    return {
        **{name: getattr(args, name) for name in ("shapes", "batch", "dtype", "steps")},
        "note": shape.note.format(batch=args.batch),
        "layers": arms[0].layers,
        "arms": rows,
        **circumstances(device),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_of(kind: str, args: argparse.Namespace) -> int:
    """Peak memory of one arm, from a process of its own; started before this one holds a model."""
    command = [sys.executable, __file__, "--arm", kind]
    for name in ("shapes", "dtype", "batch"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(f"the arm {kind} failed in its own process: {last}")
    return int(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"{result['shapes']}: {result['note']}; {result['dtype']}, {result['layers']} layers",
        "",
        "| method | memory (GB) | time (s) | relative to LoRA (95 % interval) |",
        "|---|---|---|---|",
    ]
    for row in result["arms"].values():
        interval = row["ratio_interval_95"]
        spread = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
        lines.append(
            f"| {row['label']} | {row['peak_memory_bytes'] / 1e9:.2f}"
            f" | {row['median_seconds']:.3f} | {row['ratio_to_lora']:.3f}{spread} |"
        )
    device, versions = result["device"], result["versions"]
    where = f"{device['cpu_model']}, {device['cpu_cores']} cores, {device['torch_threads']} threads"
    gpu = f"{device['gpu']}, " if device["gpu"] else ""
    lines += ["", f"{result['steps']} rounds; {gpu}{where}, torch {versions['torch']}."]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line to settings; what the shape decides is filled in.

    Raises:
        UserError: an unknown arm, a number out of range.
    """
    parser = argparse.ArgumentParser(description="Time and memory of a step, method by method.")
    parser.add_argument("--shapes", required=True, choices=SHAPES)
    parser.add_argument("--steps", type=int, help="measured rounds")
    parser.add_argument("--batch", type=int, help="samples of a step; default: the shapes' own")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base weights; bf16: autocast")
    parser.add_argument(
        "--arms", default="lora,bilora,bilora-peft", help=f"some of {','.join(KINDS)}"
    )
    parser.add_argument(
        "--methods", help=f"instead of --arms: all ({','.join(METHODS)}), or some of them"
    )
    parser.add_argument("--json", type=Path, help="also write the result, with every time, there")
    parser.add_argument("--arm", choices=KINDS, help="run it alone and print its peak memory")
    args = parser.parse_args(argv)
    args.arms = args.arms.split(",")
    if args.methods:
        wanted = METHODS if args.methods == "all" else tuple(args.methods.split(","))
        args.arms = [BASELINE, *(name for name in wanted if name != BASELINE)]
    for name in ("dtype", "steps", "batch"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(SHAPES[args.shapes], name))
    if BASELINE not in args.arms or len(set(args.arms) & KINDS.keys()) < len(args.arms):
        raise UserError(
            f"--arms is {','.join(args.arms)}; name {BASELINE} and others of {', '.join(KINDS)}."
        )
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; use at least 1.")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json is {args.json}; name a file in a folder that exists.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table; of a single arm this process's peak memory in bytes."""
    args = parse(argv)
    if args.arm:
        dtype, device = DTYPES[args.dtype], _device()
        (arm,) = make([args.arm], SHAPES[args.shapes], args.batch, dtype, device, SEED)
        for _ in range(2):
            arm.train_step()
        return print(provenance.peak_memory(device))
    result = benchmark(args)
    print(table(result))
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    sys.exit(run_cli(main))
