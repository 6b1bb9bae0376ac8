"""Bi-LoRA (Algorithm 1 of the paper) in one file of plain PyTorch.

    pip install torch safetensors scikit-learn
    python examples/minimal.py              # less than a minute on a CPU; nothing is downloaded

A network trained on upright digits learns from 40 images to recognize digits that are rotated by 90
degrees. The script trains it with LoRA and with Bi-LoRA and tests both on the other images. On this
small problem, Bi-LoRA with the paper's radius of 0.05 is as accurate as LoRA, and a larger radius
does not help. `tests/methods/test_minimal.py` compares this file with the library.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.stats import ttest_1samp
from sklearn.datasets import load_digits
from torch import Tensor, nn

RADII = (0.0, 0.05, 0.5)  # with radius 0 the auxiliary stays zero, which is LoRA
SEEDS = range(5)


class BiLoRALinear(nn.Module):
    """A frozen linear layer with a primary adapter (A1, B1) and an auxiliary one (A2, B2)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / rank  # s of both adapters
        self.A1, self.B1 = self.create_factors()
        self.A2, self.B2 = self.create_factors()

    def create_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Create a random A (rank, in) and a zero B (out, rank), so B @ A is zero at first."""
        # They have the dtype of the base weight. Use fp32: bf16 would lose small updates.
        A = self.base.weight.new_empty(self.rank, self.base.in_features)
        B = self.base.weight.new_zeros(self.base.out_features, self.rank)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        # Eq. 7: W = W0 + s B1 A1 + s B2 A2. In evaluation mode, W = W0 + s B1 A1.
        y = self.base(x) + self.scale * (x @ self.A1.T @ self.B1.T)
        if self.training:
            y = y + self.scale * (x @ self.A2.T @ self.B2.T)
        return y


def add_adapters(model: nn.Module, rank: int, alpha: float) -> dict[str, BiLoRALinear]:
    """Freeze a model and replace its linear layers in place; return the new layers by name."""
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            layers[name] = BiLoRALinear(module, rank, alpha)
            model.set_submodule(name, layers[name])
    return layers


@torch.no_grad()
def auxiliary_norm(layers: dict[str, BiLoRALinear]) -> float:
    """Compute the auxiliary's norm over all layers, c = sqrt(sum_i ||s B2_i A2_i||_F^2)."""
    square = 0.0
    for layer in layers.values():
        A, B = layer.A2.double(), layer.B2.double()
        # ||B A||_F^2 = tr((B^T B) (A A^T)): (rank, rank) matrices instead of an (out, in) one.
        square += layer.scale**2 * float(((B.T @ B) * (A @ A.T)).sum())
    return math.sqrt(max(square, 0.0))


@torch.no_grad()
def project(layers: dict[str, BiLoRALinear], rho: float) -> None:
    """Project the auxiliary onto the ball of radius rho."""
    # Eq. 10, with the scale s inside the norm: if c > rho, multiply B2 and A2 of every layer by
    # sqrt(rho / c).
    norm = auxiliary_norm(layers)
    if norm > rho:
        for layer in layers.values():
            layer.A2.mul_(math.sqrt(rho / norm))
            layer.B2.mul_(math.sqrt(rho / norm))


def train(
    model: nn.Module,
    layers: dict[str, BiLoRALinear],
    batches: Iterable[tuple[Tensor, Tensor]],
    rho: float = 0.05,
    lr: float = 2e-3,
    auxiliary_lr: float = 2e-3,
    weight_decay: float = 0.0,
) -> None:
    """Train a classifier with one forward and one backward pass for each batch (Algorithm 1)."""
    primary, auxiliary = [], []
    for layer in layers.values():
        primary += [layer.A1, layer.B1]
        auxiliary += [layer.A2, layer.B2]
    # Eq. 9: descent on B1 and A1, ascent on B2 and A2, both with the gradient of one backward pass.
    # The auxiliary has no weight decay, which would pull it towards zero.
    descent = {"params": primary, "lr": lr, "weight_decay": weight_decay}
    ascent = {"params": auxiliary, "lr": auxiliary_lr, "weight_decay": 0.0, "maximize": True}
    optimizer = torch.optim.AdamW([descent, ascent])
    model.train()
    for inputs, labels in batches:
        F.cross_entropy(model(inputs), labels).backward()
        # Clip the primary alone: in a joint norm, the auxiliary's gradients would make the clipping
        # of the primary's stronger.
        nn.utils.clip_grad_norm_(primary, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        project(layers, rho)


def save(layers: dict[str, BiLoRALinear], folder: Path) -> None:
    """Save the primary as a LoRA adapter that `peft.PeftModel.from_pretrained` loads."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A1.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B1.detach()
    layer = next(iter(layers.values()))  # all layers have the same rank and alpha
    config = {"peft_type": "LORA", "r": layer.rank, "lora_alpha": layer.alpha}
    # A regular expression: in a list, "1" would also match the layer "0.1".
    config["target_modules"] = "|".join(re.escape(name) for name in layers)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def sample_batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield 150 batches of 8 random images, the same for all radii."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(150):
        rows = torch.randperm(len(images), generator=generator)[:8]
        yield images[rows], labels[rows]


def train_base(images: Tensor, labels: Tensor) -> nn.Module:
    """Train the base model, a small network."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of images that the model classifies correctly without the auxiliary."""
    return 100 * float((model.eval()(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Print the held-out accuracy of LoRA and Bi-LoRA, and their difference over seeds."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16  # (1797, 64), from 0 to 1
    labels = torch.tensor(digits)
    base = train_base(images[:600], labels[:600])
    images = images[600:].view(-1, 8, 8).rot90(dims=(1, 2)).flatten(1)  # (1197, 64)
    labels = labels[600:]
    print(f"{'base model':18} {accuracy(base, images, labels):.1f} % of the rotated digits")
    accuracies: dict[float, list[float]] = {rho: [] for rho in RADII}
    for seed in SEEDS:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        training, heldout = order[:40], order[40:]
        for rho in RADII:
            torch.manual_seed(seed)  # the same initial factors for all radii
            model = copy.deepcopy(base)
            layers = add_adapters(model, rank=8, alpha=16)
            train(model, layers, sample_batches(images[training], labels[training], seed), rho)
            accuracies[rho].append(accuracy(model, images[heldout], labels[heldout]))
    for rho, percentages in accuracies.items():
        title = f"Bi-LoRA, rho {rho}" if rho else "LoRA"
        print(f"{title:18} {sum(percentages) / len(SEEDS):.1f} %", end="")
        if rho:
            differences = torch.tensor(percentages) - torch.tensor(accuracies[0.0])
            interval = ttest_1samp(differences, 0).confidence_interval()
            print(f", minus LoRA {differences.mean():+.1f}", end="")
            print(f" [{interval.low:+.1f}, {interval.high:+.1f}]", end="")
        print()
    print("Means over 5 seeds; 95 % intervals of paired differences (Student's t).")


if __name__ == "__main__":
    main()
