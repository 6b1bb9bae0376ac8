"""Small results of CLIP scores with values that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval import compare
from eval.clip_scores.names import METRICS
from eval.provenance import Provenance
from eval.table import Entry, Result, Row

SCORER = {"name": "ViT-T/none", "kind": "open_clip", "model": "ViT-T", "revision": "x", "note": ""}
CAPTIONER = SCORER | {"name": "BLIP/none", "kind": "blip"}
NOTES = {"t2t": "caption {}", "nearest": "train-{}.png", "image": "images/{}.png"}

Values = Sequence[Sequence[float | None]]
"""Prompts of seeds."""


def result(
    columns: Mapping[str, Mapping[str, Values]],
    *,
    general: int = 0,
    control: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Result:
    """A compared result.

    Args:
        columns: label -> score -> its values; all of one shape. "base" is the base model.
        general: how many of the prompts, from the end, are general.
        control: by default the first.
        settings: others than the usual.
        changes: other fields of the result.
    """
    shape = next(iter(next(iter(columns.values())).values()))
    names = [f"Thing {p}" for p in range(len(shape))]
    texts = {name: f"an icon of a {name}, in the style of TOK" for name in names}
    unnamed = names[len(names) - general :]
    rows = []
    for label, scores in columns.items():
        for number, text in enumerate(texts.values()):
            for metric, values in {**scores, "image": [[None] * len(v) for v in shape]}.items():
                note = NOTES.get(metric, "").format(number)
                note = note.replace("images", f"images/{label}")
                for seed, value in enumerate(values[number]):
                    if value is not None or metric == "image":
                        rows.append(Row(label, label, seed, metric, text, None, value, note))
    control = control or next(iter(columns))
    prompts = [
        {
            "text": text,
            "instance": None if name in unnamed else name,
            "reference": None,
            "general": name in unnamed,
            "truncated": False,
        }
        for name, text in texts.items()
    ]
    usual = {
        "prompts": prompts,
        "prompt_set": "3d_icon",
        "seeds": list(range(len(shape[0]))),
        "sampling": {"base_model": "sdxl", "size": 64, "steps": 25, "guidance_scale": 5.0},
        "scorer": SCORER,
        "captioner": CAPTIONER,
    }
    made = Provenance(
        "python -m eval.clip_scores a b", {"torch": "2.13.0"}, "0123" * 10, False, {}, []
    )
    fields: dict[str, Any] = {"provenance": made} | changes
    return Result(
        kind="clip_scores",
        subjects=[
            Entry(label, label, "base" if label == "base" else "run", f"runs/{label}")
            for label in columns
        ],
        metrics=dict(METRICS),
        control=control,
        settings=usual | dict(settings or {}),
        rows=rows,
        summaries=compare.summaries(
            [row for row in rows if row.metric in METRICS], control, over="item"
        ),
        **fields,
    )
