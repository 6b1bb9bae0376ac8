"""Write folders for tests of the viewer: runs, scored images and results."""

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from app.scores import NOTES, Key, ScoredImage, Scores, ScoringModel, Settings, read_scores
from bilora_diffusion.run.checkpoint import DIGESTS, FILES
from eval.clip_scores.prompts import Prompt
from eval.results import table
from eval.results.table import Entry, Result, Row

WEIGHTS = "pytorch_lora_weights.safetensors"
LABELS = ("lora", "bilora")
# Color of each adapter's images
COLORS = ("teal", "orange", "maroon")


def make_run(folder: Path, method: str = "lora", **changes: Any) -> Path:
    """Write a run's record, changed by ``changes``, and an empty weights file."""
    record: dict[str, Any] = {
        "schema_version": 1,
        "method": method,
        "seed": 0,
        "status": "finished",
        "started_at": "2026-01-01T00:00:00+00:00",
        "results": {},
        "config": {"pretrained_model_name_or_path": "mini"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record | changes), "utf-8")
    (folder / WEIGHTS).touch()
    return folder


def make_images(folder: Path, step: int | str, count: int = 1) -> None:
    """Write the validation images of a step, each in another color."""
    images_folder = folder / "validation" / f"step-{step}"
    images_folder.mkdir(parents=True, exist_ok=True)
    red = step if isinstance(step, int) else 0
    for number in range(count):
        Image.new("RGB", (8, 8), (red, number, 0)).save(images_folder / f"{number:03d}.png")


def make_whole_run(folder: Path, method: str = "lora", **changes: Any) -> Path:
    """Write an image run with all the files that the tabs read."""
    config = {"validation_prompts": ["a hat"], "num_validation_images": 1, "rho": 0.05}
    make_run(folder, method, **({"config": config} | changes))
    make_images(folder, 2)
    checkpoint = folder / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name in (DIGESTS, *FILES):
        (checkpoint / name).touch()
    rows = '{"step": 1, "loss": 1.0, "heldout_loss": 1.0}\n'
    rows += '{"step": 2, "loss": 0.5, "heldout_loss": 1.0}\n'
    (folder / "metrics.jsonl").write_text(rows)
    return folder


def make_result(folder: Path, report: str = "# Report", **changes: Any) -> Path:
    """Write a result of ``eval.landscape`` with one figure; ``changes`` go into its record."""
    folder.mkdir(parents=True, exist_ok=True)
    table.write(Result("landscape", figures=["figure.png"]), folder, report)
    record = json.loads((folder / table.FILE).read_text("utf-8"))
    (folder / table.FILE).write_text(json.dumps(record | changes), "utf-8")
    Image.new("RGB", (8, 8)).save(folder / "figure.png")
    return folder


def make_scores(
    folder: Path,
    labels: Sequence[str] = LABELS,
    texts: Sequence[str] = ("a hat",),
    seeds: Sequence[int] = (0,),
    file: str | None = None,
) -> Scores:
    """Write scored images of adapters, each adapter in its color in `COLORS`.

    Args:
        folder: folder of the result.
        labels: names of the adapters.
        texts: prompts.
        seeds: seeds of the images.
        file: file name in the rows of all images; by default, each row names its image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for number, label in enumerate(labels):
        for position, (text, seed) in enumerate(product(texts, seeds)):
            scores = {"i2t": 0.25 + 0.01 * number * (position - 1), "nearest": 0.5}
            name = file or f"{number}-{position}.png"
            images[label, text, seed] = ScoredImage(name, scores, "a caption", "near.png")
            image = Image.new("RGB", (8, 8), COLORS[number])
            image.save(folder / f"{number}-{position}.png")
    for name in ("near.png", "truth.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    prompts = []
    for text in texts:
        prompts.append(Prompt(text, text.split()[-1], Path("truth.png")))
    return write(scores_of(labels, prompts, images, seeds), folder)


def scores_of(
    labels: Sequence[str],
    prompts: Sequence[Prompt],
    images: Mapping[Key, ScoredImage],
    seeds: Sequence[int],
) -> Scores:
    """Return the scores of images as the tabs read them."""
    rows = []
    for (label, text, seed), image in images.items():
        values: dict[str, tuple[float | None, str]] = {"image": (None, image.file)}
        for metric, value in image.scores.items():
            values[metric] = (value, getattr(image, NOTES.get(metric, ""), None) or "")
        for metric, (value, note) in values.items():
            rows.append(Row(label, label, seed, metric, text, None, value, note))
    entries = [Entry(label, label, method=label) for label in labels]
    settings = Settings(list(prompts), list(seeds), ScoringModel("test-CLIP"), None)
    about = TypeAdapter(Settings).dump_python(settings, mode="json")
    return read_scores(Result("clip_scores", entries, settings=about, rows=rows))


def write(scores: Scores, folder: Path) -> Scores:
    """Write scores as a result."""
    folder.mkdir(parents=True, exist_ok=True)
    table.write(scores.result, folder, "")
    return scores


def write_bomb(path: Path) -> Path:
    """Write a picture of a few bytes whose header claims 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    content = file.getvalue()
    # Bytes 12 to 28 are the name, width, height and format of the chunk IHDR; its CRC follows.
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    return path
