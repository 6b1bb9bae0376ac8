"""Layers of a denoiser that get adapters: groups of them, and the ends of layers' names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..adapters import adaptable
from ..adapters.access import is_within
from ..core.errors import UserError, did_you_mean
from ..core.values import (
    ALL_LAYERS,
    ALL_LINEAR,
    ATTENTION,
    CONVOLUTIONS,
    FEED_FORWARD,
    LAYER_GROUPS,
)
from .families.base import Family

FLAG = "--lora_layers"


def select_layers(words: Sequence[str], family: Family, model: nn.Module) -> tuple[str, ...]:
    """Names or ends of names, as an `AdapterSpec` takes them, of what the words stand for.

    - attention: the family's ``targets``.
    - feed-forward: the linear layers of the family's ``feed_forward`` modules.
    - convolutions: those in blocks, as in kohya's scripts; not the first and last of a UNet, which
      hold 4 channels, nor the patches of a transformer.
    - all-linear: every linear layer, as in PEFT; all: these and the convolutions.

    Raises:
        UserError: a word is neither a group nor the end of a layer's name, or a group is empty.
    """
    linear = adaptable(model)
    # Layers in blocks have a number in their names.
    convolutions = []
    for name in adaptable(model, convolutions=True):
        if any(part.isdigit() for part in name.split(".")):
            convolutions.append(name)
    groups = {
        ATTENTION: family.targets,
        FEED_FORWARD: [name for name in linear if is_within(name, family.feed_forward)],
        CONVOLUTIONS: convolutions,
        ALL_LINEAR: linear,
        ALL_LAYERS: linear + convolutions,
    }
    kind = type(model).__name__
    module_names = [f".{name}" for name, _ in model.named_modules()]
    layers: dict[str, None] = {}  # in order, without repetition
    for word in words:
        # A word is a group, or the end of a layer's name such as to_q.
        if word not in groups and not any(name.endswith(f".{word}") for name in module_names):
            raise UserError(
                f'{FLAG} "{word}" is not a layer of the {kind}{_hint(word, groups[ALL_LAYERS])}:'
                f" give {', '.join(LAYER_GROUPS)}, or the ends of layers' names such as"
                f" {family.targets[0]}."
            )
        if not groups.get(word, word):
            raise UserError(f"{FLAG} {word}: the {kind} has no such layer; give {ALL_LINEAR}.")
        layers |= dict.fromkeys(groups.get(word, [word]))
    return tuple(layers)


def _hint(word: str, names: Sequence[str]) -> str:
    """The end of a layer's name that a wrong word is most like."""
    ends: set[str] = set()
    for name in names:
        parts = name.split(".")
        ends |= {".".join(parts[start:]) for start in range(len(parts))}
    # The shortest first: "to_q" before "attn1.to_q".
    return did_you_mean(word, list(LAYER_GROUPS) + sorted(ends, key=len))
