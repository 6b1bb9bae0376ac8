"""Scored images for the viewer's tests: as the tabs see them, and as files."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from app.scored import NOTES, Key, Scored, ScoredImage, ScoredPrompt, ScoringModel, Settings, scored
from eval import table
from eval.table import Entry, Result, Row, Summary


def scores_of(
    labels: Sequence[str],
    prompts: Sequence[ScoredPrompt],
    images: Mapping[Key, ScoredImage],
    seeds: Sequence[int] = (0, 1),
    scorer: ScoringModel | None = None,
    captioner: ScoringModel | None = None,
    summaries: Sequence[Summary] = (),
) -> Scored:
    """Scores as the tabs see them; an adapter's digest is "digest LABEL"."""
    rows = []
    for (label, text, seed), image in images.items():
        values: dict[str, tuple[float | None, str]] = {"image": (None, image.file)}
        for metric, value in image.scores.items():
            values[metric] = (value, getattr(image, NOTES.get(metric, ""), None) or "")
        for metric, (value, note) in values.items():
            rows.append(Row(label, label, seed, metric, text, None, value, note))
    entries = [Entry(one, one, method=one, digest=f"digest {one}") for one in labels]
    settings = Settings(list(prompts), list(seeds), scorer or ScoringModel("test-CLIP"), captioner)
    about = asdict(settings)
    return scored(Result("clip_scores", entries, settings=about, rows=rows, summaries=summaries))


def write(scores: Scored, folder: Path) -> Path:
    """The files of a result that reads back as these scores."""
    folder.mkdir(parents=True, exist_ok=True)
    table.write(scores.result, folder, "")
    return folder


def write_bomb(path: Path) -> Path:
    """A picture of a few bytes that says that it has 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    content = file.getvalue()
    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + content[24:29]
    path.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    return path
