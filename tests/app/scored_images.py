"""Scored images for the viewer's tests: as the tabs see them, and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.scored import Model, Prompt, Scored, ScoredImage
from eval import table
from eval.table import Entry, Result, Row

NOTES = {"t2t": "caption", "nearest": "nearest_image"}


def adapter(label: str, digest: str = "") -> Entry:
    """An adapter of a run."""
    return Entry(label, label, method=label, digest=digest)


def scores_of(
    labels: Sequence[str],
    prompts: Sequence[Prompt],
    images: Sequence[ScoredImage],
    seeds: Sequence[int] = (0, 1),
    scorer: str = "test-CLIP",
) -> Scored:
    """Scores as the tabs see them; an adapter's digest is "digest LABEL"."""
    entries = [adapter(label, f"digest {label}") for label in labels]
    return Scored(entries, list(prompts), list(images), list(seeds), Model(scorer))


def write(scored: Scored, folder: Path) -> Path:
    """The files of a result that reads back as these scores."""
    rows = []
    for image in scored.images:
        label, text = scored.adapters[image.adapter].label, scored.prompts[image.prompt].text
        values: dict[str, tuple[float | None, str]] = {"image": (None, image.file)}
        for metric, value in image.scores.items():
            values[metric] = (value, getattr(image, NOTES.get(metric, ""), None) or "")
        for metric, (value, note) in values.items():
            rows.append(Row(label, label, image.seed, metric, text, None, value, note))
    settings = {"prompts": [vars(prompt) for prompt in scored.prompts], "seeds": scored.seeds}
    for role, model in (("scorer", scored.scorer), ("captioner", scored.captioner)):
        settings[role] = vars(model) if model else None
    result = Result("clip_scores", scored.adapters, settings=settings, rows=rows)
    folder.mkdir(parents=True, exist_ok=True)
    table.write(result, folder, "")
    return folder
