"""What a training step costs: the methods side by side, as in the paper's Table 7.

    python benchmarks/step_cost.py --shapes mini                     # a minute or two on a CPU
    python benchmarks/step_cost.py --shapes t5-base --methods all --json t5.json
    python benchmarks/step_cost.py --shapes t5-base --methods all --batch 32   # as in Table A4
    python benchmarks/step_cost.py --shapes llama-7b-layer --methods all   # fp32, 5 GB
    python benchmarks/step_cost.py --shapes mini --arms lora,bilora,bilora-peft,bilora-power
    python benchmarks/step_cost.py --shapes mini --arms lora,lora-compiled,bilora,bilora-compiled
    python benchmarks/step_cost.py --shapes sdxl-unet                # 2.57 B parameters, 6 GB
    python benchmarks/step_cost.py --shapes sdxl-unet --dtype fp32   # 11 GB; for CPUs without bf16

All arms live in one process on the same base weights and take turns, one step each, in rotating
order; the ratio to LoRA is the median over rounds, its interval a 95 % bootstrap. A step is
forward, backward, clipping, optimizer step with the projection onto the ball (Eq. 10), gradients
forgotten. Weights are random: time does not depend on them. Operations are counted in one more
step: all, those outside forward and backward passes, and how often the step waits for a value. Peak
memory cannot be told apart within a process, so each arm is also run for two steps in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from arms import BASELINE, KINDS, METHODS, Arm, make
from measure import Operations, circumstances, interleave, median_seconds, paired_ratio, seconds
from shapes import DTYPES, SHAPES, require

from bilora_diffusion.errors import TrainingError, UserError, run_cli
from bilora_diffusion.methods.bilora import BiLoRA
from bilora_diffusion.run import provenance

PRECISIONS = ("bf16", "fp32")
DEFAULT_ARMS = ("lora", "bilora", "bilora-peft")
MEMORY_STEPS = 2


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the command line asks for; returns what is printed and written."""
    memory = {} if args.skip_memory else {kind: _memory_of(kind, args) for kind in args.arms}
    device = torch.device(args.device)
    arms = _make_arms(args, args.arms)
    times = _time_steps(arms, args, device)
    baseline = times[args.arms.index(BASELINE)]
    rows = {}
    for arm, own in zip(arms, times, strict=True):
        ratio, interval = paired_ratio(own, baseline)
        rows[arm.kind] = {
            "label": KINDS[arm.kind].label,
            "median_seconds": statistics.median(own),
            "ratio_to_lora": ratio,
            "ratio_interval_95": interval,
            "peak_memory_bytes": memory.get(arm.kind),
            **_operations(arm),
            "trained_parameters": arm.trainable,
            "first_loss": arm.losses[0],
            "last_loss": arm.losses[-1],
            "seconds": own,
        }
    return {
        "shapes": args.shapes,
        "note": SHAPES[args.shapes].note.format(batch=args.batch),
        "batch": args.batch,
        "dtype": args.dtype,
        "layers": arms[0].layers,
        "steps": args.steps,
        "warmup": args.warmup,
        "seed": args.seed,
        "arms": rows,
        "projection": _projection(arms, rows, device),
        **circumstances(device),
    }


def _operations(arm: Arm) -> dict[str, int | None]:
    """Operations of one more step: all, those outside forward and backward passes, and how often
    the step waits for a value. Where they can be seen, blocks run without compilation: then None.
    """
    if KINDS[arm.kind].compiled:
        return dict.fromkeys(("operations", "own_operations", "waits"))
    passes, step = Operations(), Operations()
    once = arm.forward_backward

    def counted() -> torch.Tensor:
        with passes:
            return once()

    arm.forward_backward = counted  # pyright: ignore[reportAttributeAccessIssue]
    with step:
        arm.train_step()
    del arm.forward_backward
    return {"operations": step.count, "own_operations": step.count - passes.count,
            "waits": step.waits}  # fmt: skip


def _make_arms(args: argparse.Namespace, kinds: Sequence[str]) -> list[Arm]:
    shape, dtype, device = SHAPES[args.shapes], DTYPES[args.dtype], torch.device(args.device)
    return make(kinds, shape, args.batch, dtype, device, args.seed)


def _time_steps(
    arms: Sequence[Arm], args: argparse.Namespace, device: torch.device
) -> list[list[float]]:
    def work(arm: Arm, number: int) -> float:
        torch.manual_seed(args.seed + args.warmup + number)  # one dropout for all arms of a round
        losses: list[torch.Tensor] = []
        taken = seconds(lambda: losses.append(arm.train_step()), device)
        arm.losses.append(float(losses[0]))
        return taken

    return interleave(
        [lambda number, arm=arm: work(arm, number) for arm in arms],
        rounds=args.steps,
        warmup=args.warmup,
    )


def _projection(
    arms: Sequence[Arm], rows: dict[str, dict[str, Any]], device: torch.device
) -> dict[str, float] | None:
    """Time of the projection alone on the trained auxiliary, and its share of that arm's step."""
    for arm in arms:
        if isinstance(arm.method, BiLoRA):
            own = arm.method.auxiliary
            project = partial(own.project_, range(own.count), arm.method.radius.rho)
            taken = median_seconds(project, device)
            share = taken / rows[arm.kind]["median_seconds"]
            return {"median_seconds": taken, "share_of_step": share}
    return None


def _memory_of(kind: str, args: argparse.Namespace) -> int:
    """Peak memory of one arm, from a process of its own; started before this one holds a model."""
    command = [sys.executable, __file__, "--arm", kind]
    for name in ("shapes", "dtype", "device", "seed", "batch"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(f"the arm {kind} failed in its own process: {last}")
    return json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"]


def run_single_arm(args: argparse.Namespace) -> None:
    """Take two steps with one arm and print this process' peak memory as a line of JSON."""
    (arm,) = _make_arms(args, [args.arm])
    for _ in range(MEMORY_STEPS):
        arm.train_step()
    peak = provenance.peak_memory(torch.device(args.device))
    print(json.dumps({"arm": args.arm, "peak_memory_bytes": peak}))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"{result['shapes']}: {result['note']}; {result['dtype']}, {result['layers']} layers",
        "",
        "| method | memory (GB) | time (s) | relative to LoRA (95 % interval)"
        " | operations, of which its own | waits |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["arms"].values():
        interval = row["ratio_interval_95"]
        spread = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
        peak = row["peak_memory_bytes"]
        memory = "not measured" if peak is None else f"{peak / 1e9:.2f}"
        ratio = f"{row['ratio_to_lora']:.3f}{spread}"
        counted = row["operations"] is not None
        count = f"{row['operations']:,}, {row['own_operations']:,}" if counted else "not counted"
        lines.append(
            f"| {row['label']} | {memory} | {row['median_seconds']:.3f} | {ratio} | {count}"
            f" | {row['waits'] if counted else 'not counted'} |"
        )
    if projection := result["projection"]:
        share = f"{100 * projection['share_of_step']:.2f} % of the step"
        lines += ["", f"Projection: {_duration(projection['median_seconds'])}, {share}."]
    device, versions = result["device"], result["versions"]
    where = f"{device['cpu_model']}, {device['cpu_cores']} cores, {device['torch_threads']} threads"
    gpu = f"{device['gpu']}, " if device["gpu"] else ""
    lines += ["", f"{result['steps']} rounds; {gpu}{where}, torch {versions['torch']}."]
    return "\n".join(lines)


def _duration(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line to settings; what the shape decides is filled in.

    Raises:
        UserError: an unknown shape, arm, dtype or device, a number out of range, no folder for
            the JSON file.
    """
    parser = _Parser(description="Time and memory of a training step, the methods side by side.")
    parser.add_argument("--shapes", required=True, help=", ".join(SHAPES))
    parser.add_argument("--steps", type=int, help="measured rounds")
    parser.add_argument("--warmup", type=int, help="rounds before them")
    parser.add_argument("--batch", type=int, help="samples of a step; default: the shapes' own")
    parser.add_argument("--dtype", help="of the base weights: bf16 (under autocast) or fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", default=",".join(DEFAULT_ARMS), help=f"some of {','.join(KINDS)}")
    parser.add_argument(
        "--methods", help=f"instead of --arms: all ({','.join(METHODS)}), or some of them"
    )
    parser.add_argument(
        "--json", type=Path, help="also write the result, with every time, to this file"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip_memory", action="store_true", help="leave out the processes for peak memory"
    )
    parser.add_argument(
        "--arm", help="run this arm alone and print its peak memory (used for the memory column)"
    )
    args = parser.parse_args(argv)
    args.arms = args.arms.split(",")
    if args.methods:
        wanted = METHODS if args.methods == "all" else tuple(args.methods.split(","))
        args.arms = [BASELINE, *(name for name in wanted if name != BASELINE)]
    require("--shapes has", args.shapes, SHAPES)
    shape = SHAPES[args.shapes]
    for name in ("dtype", "steps", "warmup", "batch"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(shape, name))
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    require("--dtype has", args.dtype, PRECISIONS)
    for kind in [*args.arms, *([args.arm] if args.arm else [])]:
        require("--arms has", kind, KINDS)
    if BASELINE not in args.arms or len(set(args.arms)) < len(args.arms):
        raise UserError(
            f"--arms is {','.join(args.arms)}; name each arm once, and {BASELINE} among them."
        )
    if args.steps < 1 or args.warmup < 0:
        raise UserError(
            f"--steps is {args.steps} and --warmup {args.warmup}; use at least 1 and 0."
        )
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}; use at least 1.")
    if args.device not in ("cpu", "cuda") or (
        args.device == "cuda" and not torch.cuda.is_available()
    ):
        raise UserError(f"--device is {args.device!r}; use cpu, or cuda where there is a GPU.")
    if args.json is not None and (not args.json.parent.is_dir() or args.json.is_dir()):
        raise UserError(f"--json is {args.json}; name a file in a folder that exists.")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print: a Markdown table, then one line of JSON."""
    args = parse(argv)
    if args.arm:
        return run_single_arm(args)
    result = benchmark(args)
    print(table(result), end="\n\n")
    brief = {
        kind: {k: v for k, v in row.items() if k != "seconds"}
        for kind, row in result["arms"].items()
    }
    print(json.dumps({**result, "arms": brief}))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(run_cli(main))
