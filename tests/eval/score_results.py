"""Small results of CLIP scores with values that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.scores import compare
from eval.scores.schema import AdapterEntry, ImageScore, ModelEntry, PromptEntry, ScoresResult

SCORER = ModelEntry("ViT-T/none", "open_clip", "ViT-T", "none")
EMBEDDED = ModelEntry("small-CLIP", "embedded", "small-CLIP", "0123", "Of icons only.")

Values = Sequence[Sequence[float | None]]
"""Prompts of seeds."""


def result(
    columns: Mapping[str, Mapping[str, Values]],
    *,
    general: int = 0,
    control: int | None = 0,
    **changes: Any,
) -> ScoresResult:
    """A compared result.

    Args:
        columns: label -> score -> its values; all of one shape. "base" is the base model.
        general: how many of the prompts, from the end, are general.
        control: position of the control.
        changes: other fields of the result.
    """
    labels = list(columns)
    shape = next(iter(next(iter(columns.values())).values()))
    count, seeds = len(shape), len(shape[0])
    images = [
        ImageScore(
            a,
            p,
            s,
            f"images/{label}/seed-{s}/{p}.png",
            caption=f"caption {p}" if "t2t" in columns[label] else None,
            nearest_image=f"train-{p}.png" if "nearest" in columns[label] else None,
            **{metric: values[p][s] for metric, values in columns[label].items()},
        )
        for a, label in enumerate(labels)
        for p in range(count)
        for s in range(seeds)
    ]
    fields: dict[str, Any] = {
        "scorer": SCORER,
        "captioner": ModelEntry("BLIP/none", "blip", "BLIP"),
        "sampling": {
            "base_model": "sdxl",
            "size": 64,
            "steps": 25,
            "guidance_scale": 5.0,
            "scale": 1.0,
            "dtype": "float32",
        },
        "seeds": list(range(seeds)),
        "prompt_set": "3d_icon",
        "adapters": [
            AdapterEntry(
                label,
                "base" if label == "base" else "run",
                f"runs/{label}",
                None if label == "base" else label.lower(),
                "" if label == "base" else f"{a:064d}",
                f"images/{label}",
            )
            for a, label in enumerate(labels)
        ],
        "prompts": [
            PromptEntry(
                f"a ToK icon of a thing {p}, in the style of ToK",
                instance=None if p >= count - general else f"Thing {p}",
                general=p >= count - general,
            )
            for p in range(count)
        ],
        "images": images,
        "summaries": [],
        "comparisons": [],
        "provenance": {
            "command": "python -m eval.clip_scores runs/LoRA runs/Bi-LoRA",
            "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
            "commit": "0123456789abcdef",
            "uncommitted_changes": False,
            "device": {"name": "a processor"},
        },
        **changes,
    }
    return compare.compared(ScoresResult(**fields), control)
