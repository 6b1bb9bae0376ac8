"""What bf16 leaves of the auxiliary at which radius: every layer of SDXL's UNet, and its output.

    python benchmarks/bf16_rounding.py                      # 2.57 B parameters: 12 GB, minutes
    python benchmarks/bf16_rounding.py --shapes mini        # a few seconds
    python benchmarks/bf16_rounding.py --no_network         # 6 GB, without the pass in fp32

A few Bi-LoRA steps on random weights in bf16 give the auxiliary its directions, as ascent makes
them. Then it is multiplied to each total norm rho, one pass is made, and for each layer the change
that the auxiliary makes to the layer's bf16 output is compared with s2 B2 A2 x in fp32:

- changed: share of the outputs that are not equal with and without the auxiliary;
- cosine: of the change made and the change wanted; 1 is nothing but the effect, 0 rounding alone;
- kept: <made, wanted> / ||wanted||^2, the share that survives. The base's outputs lie on bf16's
  grid and small changes fall back to it, but where the primary's part has moved them off it;
- relative: ||wanted|| / ||output||, for comparison with bf16's unit roundoff of 2^-9 = 0.002.

The network's output is compared in the same way, with the change that the same weights make when
all is computed in fp32, and so is the rise of the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arms
import torch
from arms import Arm
from measure import circumstances
from shapes import SHAPES
from torch import Tensor

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.errors import run_cli
from bilora_diffusion.methods import ball
from bilora_diffusion.methods.rounding import effect

RADII = (0.05, 0.1, 0.5, 1.0, 5.0)
FIGURES = ("changed", "cosine", "kept", "relative")
NETWORK = ("cosine", "kept", "relative")
HEAD = "| rho | outputs changed | cosine | kept | wanted / output |"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train a little, then look at every radius; returns what is written."""
    shape, device = SHAPES[args.shapes], torch.device("cpu")
    (arm,) = arms.make(["bilora"], shape, shape.batch, torch.bfloat16, device, args.seed)
    losses = [float(arm.train_step()) for _ in range(args.train_steps)]
    passes = [_layers_at(arm, rho) for rho in args.rho]
    network = [] if args.no_network else _network(arm, args.rho)
    return {
        "shapes": args.shapes,
        "note": shape.note.format(batch=shape.batch),
        "layers": arm.layers,
        "seed": args.seed,
        "train_steps": args.train_steps,
        "losses": losses,
        "rho": list(args.rho),
        "layer_names": [name for name, _ in arm.method.layers(AUXILIARY)],
        "by_layer": passes,
        "network": network,
        **circumstances(device),
    }


def _scale_to(arm: Arm, rho: float) -> None:
    """Give the auxiliary the total norm rho, in the direction that it has."""
    ball.project_(adapters.factors(arm.model, AUXILIARY), rho, onto=True)


@torch.no_grad()
def _layers_at(arm: Arm, rho: float) -> dict[str, list[float]]:
    """Figures of every layer in one pass at a radius, in the order of the layers."""
    _scale_to(arm, rho)
    layers: list[Any] = [layer for _, layer in arm.method.layers(AUXILIARY)]
    seen: dict[int, dict[str, float]] = {}

    def look(layer: Any, given: tuple[Any, ...], output: Tensor) -> None:
        found = effect(layer, given[0])
        wanted = float(found.wanted.norm())
        seen[id(layer)] = {
            "changed": float((found.made != 0).double().mean()),
            "cosine": float(found.cosine()),
            "kept": float((found.made * found.wanted).sum()) / wanted**2,
            "relative": wanted / float(output.float().norm()),
        }

    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        _forward(arm, torch.bfloat16)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: [seen[id(layer)][name] for layer in layers] for name in FIGURES}


@torch.no_grad()
def _network(arm: Arm, radii: Sequence[float]) -> list[dict[str, float]]:
    """Output and loss of the whole network, at each radius, in bf16 and then in fp32."""
    in_bf16 = _passes(arm, radii, torch.bfloat16)
    for parameter in arm.model.parameters():
        parameter.data = parameter.data.float()
    arm.inputs = _float(arm.inputs)
    in_fp32 = _passes(arm, radii, None)
    rows = []
    for (made, rise, _), (wanted, true_rise, output) in zip(in_bf16, in_fp32, strict=True):
        length = float(wanted.norm())
        product = float((made * wanted).sum())
        rows.append(
            {
                "cosine": product / (float(made.norm()) * length),
                "kept": product / length**2,
                "relative": length / float(output.norm()),
                "loss_rise": rise,
                "loss_rise_fp32": true_rise,
            }
        )
    return rows


def _passes(
    arm: Arm, radii: Sequence[float], amp: torch.dtype | None
) -> list[tuple[Tensor, float, Tensor]]:
    """Change of the output, change of the loss, and the output, at each radius."""
    with adapters.only(arm.model, (PRIMARY,)):
        output, loss = _forward(arm, amp)
    found = []
    for rho in radii:
        _scale_to(arm, rho)
        moved, moved_loss = _forward(arm, amp)
        found.append((moved - output, moved_loss - loss, output))
    return found


def _forward(arm: Arm, amp: torch.dtype | None) -> tuple[Tensor, float]:
    """The model's output in float64, and the loss of the batch."""
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        kept.append(output[0].double())

    hook = arm.model.register_forward_hook(keep)
    try:
        with torch.autocast("cpu", amp) if amp else contextlib.nullcontext():
            loss = arm.shape.loss(arm.model, arm.inputs)
    finally:
        hook.remove()
    return kept[0], float(loss)


def _float(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _float(value) for name, value in inputs.items()}
    return inputs.float() if inputs.is_floating_point() else inputs


def markdown(result: dict[str, Any]) -> str:
    """The tables: medians and quartiles over layers, and the whole network."""
    lines = [
        f"{result['note']}; {result['layers']} layers with an auxiliary, total norm rho;"
        f" medians over layers, quartiles in brackets. Random weights, directions after"
        f" {result['train_steps']} steps; commit {result['commit']}.",
        "",
        HEAD,
        "|---|---|---|---|---|",
    ]
    for rho, figures in zip(result["rho"], result["by_layer"], strict=True):
        cells = [_quartiles(figures["changed"], ".1%")]
        cells += [_quartiles(figures[name], ".2f") for name in ("cosine", "kept")]
        cells.append(_quartiles(figures["relative"], ".1e"))
        lines.append(f"| {rho:g} | {' | '.join(cells)} |")
    if result["network"]:
        lines += [
            "",
            "The output of the whole network, against the same change computed in fp32:",
            "",
            "| rho | cosine | kept | wanted / output | loss rise in bf16 | in fp32 |",
            "|---|---|---|---|---|---|",
        ]
        for rho, row in zip(result["rho"], result["network"], strict=True):
            lines.append(
                f"| {rho:g} | {row['cosine']:.2f} | {row['kept']:.2f} | {row['relative']:.1e}"
                f" | {row['loss_rise']:+.1e} | {row['loss_rise_fp32']:+.1e} |"
            )
    return "\n".join(lines) + "\n"


def _quartiles(values: Sequence[float], form: str) -> str:
    known = [value for value in values if value == value]
    low, middle, high = statistics.quantiles(known, n=4)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="sdxl-unet")
    parser.add_argument("--rho", type=float, nargs="+", default=list(RADII))
    parser.add_argument("--train_steps", type=int, default=3, help="steps that give directions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_network", action="store_true", help="look at the layers only")
    parser.add_argument("--output_dir", type=Path, default=Path("results/bf16_rounding"))
    args = parser.parse_args(argv)
    result = measure(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = args.output_dir / args.shapes
    stem.with_suffix(".json").write_text(json.dumps(result) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))
    print(markdown(result), end="")


if __name__ == "__main__":
    run_cli(main)
