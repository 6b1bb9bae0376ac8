"""Folders for the viewer's tests: runs, scored images and results, as the tools leave them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from app.scored import NOTES, Key, Scored, ScoredImage, ScoredPrompt, ScoringModel, Settings, scored
from eval import table
from eval.table import Entry, Result, Row, Summary

WEIGHTS = "pytorch_lora_weights.safetensors"
LABELS = ("lora", "bilora")
SEARCHED = {"name": "lora", "title": "lora", "fold": 1, "steps": [0, 5], "losses": [1, 2]}
FIT = {"settings": {}, "spent": 5, "runs": [SEARCHED], "out": {}, "choice": None, "standings": []}


def make_run(folder: Path, method: str = "lora", **changes: Any) -> Path:
    """A run's record and an empty file of weights."""
    record: dict[str, Any] = {"schema_version": 1, "method": method, "seed": 0}
    record |= {"status": "finished", "started_at": "2026-01-01T00:00:00+00:00", "results": {}}
    record |= {"config": {"pretrained_model_name_or_path": "mini"}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record | changes), "utf-8")
    (folder / WEIGHTS).touch()
    return folder


def make_images(folder: Path, step: int | str, count: int = 1) -> None:
    """Validation images of a run's step, each of another colour."""
    place = folder / "validation" / f"step-{step}"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        color = (step if isinstance(step, int) else 0, number, 0)
        Image.new("RGB", (8, 8), color).save(place / f"{number:03d}.png")


def make_whole_run(folder: Path, method: str = "lora", **changes: Any) -> Path:
    """A run of images with everything that the tabs look at."""
    config = {"validation_prompts": ["a hat"], "num_validation_images": 1, "rho": 0.05}
    make_run(folder, method, **{"config": config} | changes)
    make_images(folder, 2)
    (folder / "fit.json").write_text(json.dumps(FIT), "utf-8")
    rows = [{"step": step, "loss": 1 / step, "heldout_loss": 1.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def make_result(folder: Path, report: str = "# Report", **changes: Any) -> Path:
    """A landscape with one figure."""
    folder.mkdir(parents=True, exist_ok=True)
    table.write(Result("landscape", figures=["figure.png"]), folder, report)
    record = json.loads((folder / table.FILE).read_text("utf-8"))
    (folder / table.FILE).write_text(json.dumps(record | changes), "utf-8")
    Image.new("RGB", (8, 8)).save(folder / "figure.png")
    return folder


def make_scores(
    folder: Path,
    prompt: str = "a hat",
    labels: Sequence[str] = LABELS,
    file: str | None = None,
    score: float = 0.25,
    seed: int = 0,
    seeds: Sequence[int] = (0,),
) -> Path:
    """Scored images of two adapters."""
    images = {}
    for number, label in enumerate(labels):
        image = ScoredImage(file or f"{number}.png", {"i2t": score}, "a caption", "near.png")
        images[label, prompt, seed] = image
    write(scores_of(labels, [ScoredPrompt(prompt, "hat", "truth.png")], images, seeds), folder)
    for name in ("0.png", "1.png", "near.png", "truth.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


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


def draw(scores: Scored, folder: Path, color: Mapping[str, str]) -> None:
    """The pictures of scores, of one colour an adapter."""
    for (label, *_), image in scores.images.items():
        (folder / image.file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color[label]).save(folder / image.file)


def write_bomb(path: Path) -> Path:
    """A picture of a few bytes that says that it has 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    content = file.getvalue()
    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + content[24:29]
    path.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    return path
