"""Folders for the viewer that are damaged, or made by someone who wants to take it down."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from app.scored import ScoredImage, ScoredPrompt
from eval import table
from eval.table import Result
from tests.app.scored_images import scores_of, write, write_bomb

EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>'
DEEP = "[" * 100_000
CURVES = {"settings": {}, "steps": [0, 5], "folds": [[1, 2]], "mean": [1, 2], "chosen_steps": 5}
LABELS = ("lora", "bilora")


def make_run(folder: Path, method: str = "lora", **changes: Any) -> Path:
    """A run of images with everything that the tabs look at."""
    options = {"validation_prompts": ["a hat"], "num_validation_images": 1, "rho": 0.05}
    record = {"schema_version": 1, "method": method, "seed": 0, "status": "finished"}
    record |= {"config": options, "started_at": "2026-01-01T00:00:00+00:00"} | changes
    (folder / "validation" / "step-2").mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    (folder / "folds.json").write_text(json.dumps(CURVES), "utf-8")
    (folder / "pytorch_lora_weights.safetensors").touch()
    lines = [{"step": step, "loss": 1 / step, "heldout_loss": 1.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    Image.new("RGB", (8, 8)).save(folder / "validation" / "step-2" / "000.png")
    return folder


def make_scores(folder: Path, prompt: str = "a hat", **more: Any) -> Path:
    """Scored images of two adapters."""
    images = {}
    for number, label in enumerate(more.get("labels", LABELS)):
        file = more.get("file", f"{number}.png")
        image = ScoredImage(file, {"i2t": more.get("score", 0.25)}, "a caption", "near.png")
        images[label, prompt, more.get("seed", 0)] = image
    about = [ScoredPrompt(prompt, "hat", "truth.png")]
    seeds = more.get("seeds", [more.get("seed", 0)])
    write(scores_of(more.get("labels", LABELS), about, images, seeds), folder)
    for name in ("0.png", "1.png", "near.png", "truth.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def make_result(folder: Path, report: str = "# Report", **changes: Any) -> Path:
    """A landscape with one figure."""
    folder.mkdir(parents=True, exist_ok=True)
    table.write(Result("landscape", figures=["figure.png"]), folder, report)
    record = json.loads((folder / table.FILE).read_text("utf-8"))
    (folder / table.FILE).write_text(json.dumps(record | changes), "utf-8")
    Image.new("RGB", (8, 8)).save(folder / "figure.png")
    return folder


def instead(make: Callable[[Path], Path], file: str, content: str | bytes | None) -> Any:
    """A good folder with another content of a file; None for a pipe that nobody writes to."""

    def damage(folder: Path) -> None:
        path = make(folder) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def replaced(make: Callable[[Path], Path], file: str, by: Callable[[Path], Any]) -> Any:
    """A good folder in which ``by`` makes something else in place of a file."""

    def damage(folder: Path) -> None:
        path = make(folder) / file
        path.unlink(missing_ok=True)
        by(path)

    return damage


def changed(make: Callable[[Path], Path], file: str, old: str, new: str) -> Any:
    """A good folder with other words in a file."""

    def damage(folder: Path) -> None:
        path = make(folder) / file
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new), "utf-8")

    return damage


def step(name: str) -> Any:
    """A run with another folder of validation images."""
    return replaced(make_run, f"validation/{name}/000.png", lambda path: _touch(path))


def _touch(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def config(**options: Any) -> Any:
    """A run with these options in its record."""
    return lambda folder: make_run(folder, "bilora", config=options)


def sparse(path: Path) -> None:
    """A file that says to have a terabyte."""
    with path.open("wb") as file:
        file.truncate(2**40)


def named(name: str | bytes) -> Any:
    """A good run and good scores in a folder of this name."""

    def damage(folder: Path) -> None:
        folder.mkdir()
        inner = os.path.join(os.fsencode(folder), os.fsencode(name))
        make_run(Path(os.fsdecode(inner)))
        make_scores(Path(os.fsdecode(inner)))

    return damage


def loops(folder: Path) -> None:
    """Links to themselves, to above, to one another and out of the root."""
    make_run(folder)
    for link, to in {
        "a": "a",
        "b": "..",
        "c": "d",
        "d": "c",
        "e": "/",
        "validation/x": ".",
    }.items():
        (folder / link).symlink_to(to)
    (folder / "run.json").unlink()
    (folder / "run.json").symlink_to("metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("run.json")


def many(folder: Path) -> None:
    """More runs than anyone has, most of them unreadable."""
    for number in range(300):
        (folder / f"{number}").mkdir(parents=True)
        (folder / f"{number}" / "run.json").write_text("{")


def deep(folder: Path) -> None:
    """Folders in folders in folders."""
    place = folder
    for _ in range(60):
        place = place / "deep"
    make_run(place)


def closed(folder: Path) -> None:
    """Files and folders that nobody may read."""
    make_run(folder)
    (folder / "metrics.jsonl").chmod(0)
    (folder / "validation").chmod(0)
    (folder / "run.json").chmod(0)


BIG = "1" + "0" * 400
BREAKS = b"\xff\xfe\x80"
HALF = "\ud800"
HOSTILE: dict[str, Callable[[Path], Any]] = {
    # run.json
    "rho is a list": config(rho=[1]),
    "rho is not a number": instead(
        make_run, "run.json", '{"schema_version": 1, "method": "bilora", "config": {"rho": NaN}}'
    ),
    "config is null": lambda folder: make_run(folder, config=None),
    "seed is a list": lambda folder: make_run(folder, seed=[1]),
    "times are texts": lambda folder: make_run(folder, wall_seconds="x", peak_memory_bytes="x"),
    "time without end": instead(
        make_run, "run.json", '{"schema_version": 1, "wall_seconds": 1e999}'
    ),
    "a billion images": config(validation_prompts=["a"], num_validation_images=10**9),
    "prompts are numbers": config(validation_prompts=[1, [2], {}], num_validation_images=1),
    "half a letter": lambda folder: make_run(folder, error=HALF, started_at=HALF),
    "half a letter in a prompt": config(validation_prompts=[HALF], num_validation_images=1),
    "half a letter in what no one reads": lambda folder: make_run(folder, method="new", other=HALF),
    "deep record": instead(make_run, "run.json", DEEP),
    "empty record": instead(make_run, "run.json", ""),
    "torn record": instead(make_run, "run.json", '{"schema_version": 1, "met'),
    "record of other bytes": instead(make_run, "run.json", BREAKS),
    "record is a folder": replaced(make_run, "run.json", Path.mkdir),
    "record is a pipe": instead(make_run, "run.json", None),
    "record of a terabyte": replaced(make_run, "run.json", sparse),
    "markup everywhere": lambda folder: make_run(
        folder,
        EVIL[:99],
        status="failed",
        error=EVIL,
        config={"validation_prompts": [EVIL], "num_validation_images": 1, "rho_norm": EVIL},
    ),
    # metrics.jsonl and folds.json
    "endless loss": instead(make_run, "metrics.jsonl", '{"step": 1, "loss": 1e999}\n'),
    "huge loss": instead(make_run, "metrics.jsonl", f'{{"step": 1, "loss": {BIG}}}\n'),
    "huge step": instead(make_run, "metrics.jsonl", f'{{"step": {BIG}, "loss": 1}}\n'),
    "losses far apart": instead(
        make_run, "metrics.jsonl", '{"step": 1, "loss": 1e149}\n{"step": 9, "loss": -1e149}\n'
    ),
    "deep metrics": instead(make_run, "metrics.jsonl", f"{DEEP}\n"),
    "levels are texts": instead(
        make_run, "metrics.jsonl", '{"step": 1, "heldout_loss_by_level/x": "x", "seconds": "x"}\n'
    ),
    "metrics of other bytes": instead(make_run, "metrics.jsonl", BREAKS + b"\n"),
    "metrics are a folder": replaced(make_run, "metrics.jsonl", Path.mkdir),
    "metrics are a pipe": instead(make_run, "metrics.jsonl", None),
    "metrics of a terabyte": replaced(make_run, "metrics.jsonl", sparse),
    "folds without folds": instead(make_run, "folds.json", '{"mean": [1], "steps": [1]}'),
    "deep folds": instead(make_run, "folds.json", DEEP),
    "folds are a pipe": instead(make_run, "folds.json", None),
    # validation images
    "step of 30 digits": step(f"step-{'9' * 30}"),
    "step in other digits": step("step-٣"),
    "step is markup": step("step-<script>"),
    "image is a bomb": replaced(make_run, "validation/step-2/000.png", write_bomb),
    "image is a pipe": instead(make_run, "validation/step-2/000.png", None),
    "image is a folder": replaced(make_run, "validation/step-2/000.png", Path.mkdir),
    # results
    "result is a list": instead(make_result, "result.json", "[]"),
    "deep result": instead(make_result, "result.json", DEEP),
    "kind is a list": lambda folder: make_result(folder, kind=[]),
    "kind is markup": lambda folder: make_result(folder, kind=EVIL),
    "kind is half a letter": lambda folder: make_result(folder, kind=HALF),
    "figures are numbers": lambda folder: make_result(folder, figures=[1, {}]),
    "figure is half a letter": lambda folder: make_result(folder, figures=[f"{HALF}.png"]),
    "figures lead out": lambda folder: make_result(folder, figures=["../../x.png", "/etc/passwd"]),
    "result is a pipe": instead(make_result, "result.json", None),
    "figure is a bomb": replaced(make_result, "figure.png", write_bomb),
    "figure is a pipe": instead(make_result, "figure.png", None),
    "report is a pipe": instead(make_result, "report.md", None),
    "report is a folder": replaced(make_result, "report.md", Path.mkdir),
    "report of other bytes": instead(make_result, "report.md", BREAKS * 1000),
    "report is a page": lambda folder: make_result(
        folder, f'{EVIL}<form action="http://evil.example/"><button>log in</button></form>'
    ),
    # scores
    "scores of markup": lambda folder: make_scores(folder, EVIL, labels=(EVIL, f"b{EVIL}")),
    "score is not a number": changed(make_scores, "rows.csv", "0.25", "nan"),
    "score without end": changed(make_scores, "rows.csv", "0.25", "-inf"),
    "huge scores": changed(make_scores, "rows.csv", "0.25", "1e308"),
    "huge seed": changed(make_scores, "rows.csv", ",0,", f",{2**70},"),
    "seed is not scored": lambda folder: make_scores(folder, seeds=[5]),
    "no seeds": lambda folder: make_scores(folder, seeds=[]),
    "half a letter in the settings": changed(make_scores, "result.json", "test-CLIP", r"\ud800"),
    "labels are alike": changed(make_scores, "result.json", '"bilora"', '"lora"'),
    "rows are a pipe": instead(make_scores, "rows.csv", None),
    "rows of other bytes": instead(make_scores, "rows.csv", BREAKS),
    "rows of a terabyte": replaced(make_scores, "rows.csv", sparse),
    "summary is a pipe": instead(make_scores, "summary.csv", None),
    "scored image is a bomb": replaced(make_scores, "0.png", write_bomb),
    "scored image is a pipe": instead(make_scores, "0.png", None),
    "scored image leads out": lambda folder: make_scores(folder, file="../../../../etc/passwd"),
    "scored image has a NUL": lambda folder: make_scores(folder, file="a\0b.png"),
    "scored image of a long name": lambda folder: make_scores(folder, file="a" * 5000),
    # names, links, rights, numbers
    "name is markup": named(EVIL.replace("/", "|")),
    "name of other bytes": named(BREAKS),
    "name of two lines": named("a\nb\r\tc"),
    "name of 250 letters": named("a" * 250),
    "links in circles": loops,
    "60 folders deep": deep,
    "300 broken runs": many,
    "nobody may read it": closed,
}
"""What is wrong -> what makes it at a place where nothing is yet."""


def make_good(root: Path) -> None:
    """Two runs, their scores and a result, which all tabs show."""
    for method in LABELS:
        make_run(root / "good" / method, method)
    make_scores(root / "good" / "scores")
    make_result(root / "good" / "landscape")
