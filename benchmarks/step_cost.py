"""Measure the cost of a training step for each method, as in the paper's Table 7.

    python benchmarks/step_cost.py --model mini                     # a minute or two on a CPU
    python benchmarks/step_cost.py --model t5-base --methods all --json t5.json
    python benchmarks/step_cost.py --model t5-base --methods all,full --batch 32   # Table A9
    python benchmarks/step_cost.py --model sdxl-unet                # 2.57 B parameters, 6 GB

All variants run in one process on the same base weights. In each round, every variant takes one
step, in rotating order. The ratio to LoRA is the median over rounds, with a 95 % bootstrap
interval. A step is forward, backward, clipping, the optimizer step with the projection onto the
ball (Eq. 10), and clearing the gradients. Weights are random, since time does not depend on them.
The peak memory of one variant can't be measured in a shared process, so each variant also runs two
steps in its own process.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import check, circumstances, finish, interleave, paired_ratio, seconds
from random_models import DTYPES, WORKLOADS, materialize
from torch import Tensor, nn

from bilora_diffusion import adapters, methods
from bilora_diffusion.adapters.fused import unfuse
from bilora_diffusion.config.command_line import UserErrorParser
from bilora_diffusion.core.errors import TrainingError, UserError, run_cli
from bilora_diffusion.methods import MethodOptions, Target
from bilora_diffusion.run import provenance
from bilora_diffusion.train.engine import Blocks, keep_freed_memory

SEED = 0
# Default of --max_grad_norm
MAX_GRAD_NORM = 1.0
# Number of steps for the methods' schedules, more than any benchmark takes
SCHEDULED_STEPS = 10_000


class VariantKind(NamedTuple):
    """A variant that can be benchmarked."""

    label: str
    method: str
    # Whether the fused product replaces PEFT's own forward pass
    fused: bool = True
    # Whether blocks are compiled, as with ``--compile``
    compiled: bool = False


# The methods of `--methods all`: those that train adapters. `full` must be named.
METHODS = tuple(name for name in methods.names() if not methods.get(name).exports_weights)
KINDS = {name: VariantKind(methods.get(name).title, name) for name in methods.names()} | {
    "bilora-peft": VariantKind("Bi-LoRA, PEFT's two adapters", "bilora", fused=False),
    "lora-peft": VariantKind("LoRA, PEFT's forward", "lora", fused=False),
    "bilora-compiled": VariantKind("Bi-LoRA, compiled", "bilora", compiled=True),
    "lora-compiled": VariantKind("LoRA, compiled", "lora", compiled=True),
}
BASELINE = "lora"


class Variant:
    """A method on its own copy of the base model's modules.

    The copies share the base weights, except that full fine-tuning copies them too.

    Args:
        kind: Key of `KINDS`.
        args: Arguments of the command line.
        base: Frozen model without adapters.
        inputs: Batch that every step uses.
    """

    def __init__(
        self, kind: str, args: argparse.Namespace, base: nn.Module, inputs: dict[str, Any]
    ) -> None:
        self.kind = kind
        self.workload = WORKLOADS[args.model]
        self.inputs = inputs
        self.batch = args.batch
        self.dtype = DTYPES[args.dtype]
        options = MethodOptions(num_steps=SCHEDULED_STEPS)
        self.method = methods.create(KINDS[kind].method, options)
        shared: dict[int, Any] = {}  # tensors that the copy shares to save memory
        if not self.method.exports_weights:
            for tensor in itertools.chain(base.parameters(), base.buffers()):
                shared[id(tensor)] = tensor
        self.model = copy.deepcopy(base, shared)
        torch.manual_seed(SEED)  # every variant starts from the same primary
        target = Target("model", self.model, self.workload.spec, self.workload.lr, 1e-2)
        groups = self.method.setup([target])
        if not KINDS[kind].fused:
            unfuse(self.model)
        self.optimizer = torch.optim.AdamW(groups, fused=True)  # as in training
        self.method.bind(self.optimizer)
        Blocks([self.model] if KINDS[kind].compiled else [])
        self.losses: list[float] = []
        self.layers = len(adapters.factors(self.model, adapters.PRIMARY))
        self.trainable = 0
        for group in groups:
            self.trainable += sum(parameter.numel() for parameter in group["params"])

    def train_step(self) -> Tensor:
        """Take one step and clear the gradients; return the loss."""
        loss = self.method.step(self.forward_backward, self)
        self.zero_grad()
        return loss

    def step(self) -> None:
        """Clip the gradients of the method's weights, then update. The method calls this."""
        torch.nn.utils.clip_grad_norm_(self.method.weights, MAX_GRAD_NORM)
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients. The method calls this too."""
        self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self) -> Tensor:
        """Compute the batch's loss and gradients, under autocast unless in fp32.

        The method calls this.
        """
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.workload.loss(self.model, self.inputs)
        loss.backward()
        return loss.detach()


def make(kinds: Sequence[str], args: argparse.Namespace, device: torch.device) -> list[Variant]:
    """Create the variants, which share one base model and one batch."""
    keep_freed_memory(device)  # as training does
    workload = WORKLOADS[args.model]
    dtype = DTYPES[args.dtype]
    base = materialize(workload.build, dtype=dtype, device=device, seed=SEED)
    base.train().requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    inputs = workload.inputs(base, args.batch, args.length, dtype, device, generator)
    return [Variant(kind, args, base, inputs) for kind in kinds]


def benchmark(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure all variants of the command line and return the result."""
    memory = {kind: memory_of(kind, args) for kind in args.variants}
    variants = make(args.variants, args, device)
    workload = WORKLOADS[args.model]

    def work(variant: Variant, number: int) -> float:
        torch.manual_seed(workload.warmup + number)  # all variants of a round have the same dropout
        losses: list[torch.Tensor] = []
        duration = seconds(lambda: losses.append(variant.train_step()), device)
        # This waits for the GPU, so it is not timed.
        variant.losses.append(float(losses[0]))
        return duration

    steps = [partial(work, variant) for variant in variants]
    times = interleave(steps, rounds=args.steps, warmup=workload.warmup)
    rows = {}
    # Ratios are paired by round, so a slow phase of the machine affects both times.
    baseline = times[args.variants.index(BASELINE)]
    for variant, variant_times in zip(variants, times, strict=True):
        ratio, interval = paired_ratio(variant_times, baseline)
        rows[variant.kind] = {
            "label": KINDS[variant.kind].label,
            "median_seconds": statistics.median(variant_times),
            "ratio_to_lora": ratio,
            "ratio_interval_95": interval,
            "peak_memory_bytes": memory[variant.kind],
            "trained_parameters": variant.trainable,
            "first_loss": variant.losses[0],
            "last_loss": variant.losses[-1],
            "seconds": variant_times,
        }
    return {
        "model": args.model,
        "batch": args.batch,
        "length": args.length,
        "dtype": args.dtype,
        "steps": args.steps,
        "note": workload.note.format(batch=args.batch, length=args.length),
        "layers": variants[0].layers,
        "variants": rows,
        **circumstances(device),
    }


def memory_of(kind: str, args: argparse.Namespace) -> int:
    """Measure a variant's peak memory in bytes, in its own process.

    Call this before the current process holds a model: outside of Linux, the peak of a child can
    include the memory of its parent.
    """
    command = [sys.executable, __file__, "--variant", kind]
    for name in ("model", "dtype", "batch", "length"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise TrainingError(f"the variant {kind} failed in its own process: {lines[-1]}")
    return int(process.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """Format the result as Markdown."""
    lines = [
        f"{result['model']}: {result['note']}; {result['dtype']}, {result['layers']} layers",
        "",
        "| method | memory (GB) | time (s) | relative to LoRA (95 % interval) |",
        "|---|---|---|---|",
    ]
    for row in result["variants"].values():
        spread = ""
        if row["ratio_interval_95"] is not None:
            low, high = row["ratio_interval_95"]
            spread = f" ({low:.3f} to {high:.3f})"
        lines.append(
            f"| {row['label']} | {row['peak_memory_bytes'] / 1e9:.2f}"
            f" | {row['median_seconds']:.3f} | {row['ratio_to_lora']:.3f}{spread} |"
        )
    device = result["device"]
    versions = result["versions"]
    facts = [device["cpu_model"], f"{device['cpu_cores']} cores"]
    facts += [f"{device['torch_threads']} threads", f"torch {versions['torch']}"]
    if device["gpu"]:
        facts.insert(0, device["gpu"])
    lines += ["", f"{result['steps']} rounds; {', '.join(facts)}."]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; options that are not given get the defaults of ``--model``."""
    parser = UserErrorParser(description="Measure time and memory of a step for each method.")
    parser.add_argument(
        "--model", required=True, choices=WORKLOADS, help="model, with random weights"
    )
    parser.add_argument("--steps", type=int, help="measured rounds; default: that of the model")
    parser.add_argument("--batch", type=int, help="samples per step; default: that of the model")
    parser.add_argument("--length", type=int, help="tokens per text; default: that of the model")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the base weights; bf16 trains under autocast"
    )
    usual = "lora,bilora,bilora-peft"
    parser.add_argument("--variants", default=usual, help=f"some of {','.join(KINDS)}")
    parser.add_argument(
        "--methods",
        help=f"instead of --variants: all ({','.join(METHODS)}), some of them, or all,full",
    )
    parser.add_argument(
        "--json", type=Path, help="also write the result with all step times to this file"
    )
    parser.add_argument(
        "--variant", choices=KINDS, help="run this variant alone and print its peak memory"
    )
    args = parser.parse_args(argv)
    args.variants = args.variants.split(",")
    if args.methods:
        names = []
        for word in args.methods.split(","):
            names += METHODS if word == "all" else [word]
        args.variants = [BASELINE]
        args.variants += [name for name in names if name != BASELINE]
    if args.length is not None and WORKLOADS[args.model].length is None:
        raise UserError(
            f"--length is {args.length}, but {args.model} is an image model: leave it out."
        )
    for name in ("dtype", "steps", "batch", "length"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(WORKLOADS[args.model], name))
    if BASELINE not in args.variants or len(set(args.variants) & KINDS.keys()) < len(args.variants):
        raise UserError(
            f"--variants is {','.join(args.variants)}: it must contain {BASELINE}, and each"
            f" name at most once, out of {', '.join(KINDS)}."
        )
    counts = ["steps", "batch"]
    if args.length is not None:
        counts.append("length")
    check(args, *counts)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table, or with ``--variant`` the peak memory in bytes."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.variant:
        (variant,) = make([args.variant], args, device)
        for _ in range(2):
            variant.train_step()
        return print(provenance.peak_memory(device))
    return finish(benchmark(args, device), table, args.json)


if __name__ == "__main__":
    sys.exit(run_cli(main))
