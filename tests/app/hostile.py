"""Damaged folders, and hostile folders from an attacker of the viewer."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.app.folders import LABELS, make_images, make_result, make_scores, write_bomb
from tests.app.folders import make_whole_run as make_run

EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>'

COMMAND = "../../x; rm -rf ~"
OVERLAY = '<div style="position:fixed;inset:0;background:red;z-index:99999">overlay</div>'
FORM = '<form action="http://evil.example/"><button>log in</button></form>'
PICTURES = "!![a](b)[x](http://evil.example/a.png) ![y][1] <im<img x>g src=//evil.example>\n\n"
PICTURES += "[1]: http://evil.example/b.png"
DIAGRAM = "> ~~~mermaid\n> graph TD; A-->B\n> ~~~\n\n```mermaid\ngraph TD; A-->B\n```"
NESTED = "\n\n".join(f"{marks * 5000}deep" for marks in (">", "- ", "> - ", "1. "))
LAST_LINE = "the end of the report"
FORMULA = r"$$\rlap{\smash{\rule{999em}{999em}}}$$"


def replaced(make: Callable[[Path], Any], file: str, spoil: Callable[[Path], Any]) -> Any:
    """Return a function that makes a good folder and lets ``spoil`` write one of its files."""

    def damage(folder: Path) -> None:
        make(folder)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        spoil(path)

    return damage


def written(text: str) -> Any:
    return partial(Path.write_text, data=text)


def changed(file: str, old: str, new: str) -> Any:
    """Return a function that makes scores and replaces a text in one of their files."""

    def damage(folder: Path) -> None:
        make_scores(folder)
        path = folder / file
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new), "utf-8")

    return damage


def sparse(path: Path) -> None:
    """Write a sparse file with a size of one terabyte."""
    with path.open("wb") as file:
        file.truncate(2**40)


def in_folder(name: str | bytes) -> Any:
    """Return a function that makes a good run and good scores in a subfolder with this name."""

    def damage(folder: Path) -> None:
        folder.mkdir()
        inner = folder / os.fsdecode(name)
        make_run(inner)
        make_scores(inner)

    return damage


def loops(folder: Path) -> None:
    """Make a run with links to themselves, to parent folders, to each other and out of the root."""
    make_run(folder)
    links = {"a": "a", "b": "..", "c": "d", "d": "c", "e": "/", "validation/x": "."}
    links |= {"run.json": "metrics.jsonl", "metrics.jsonl": "run.json"}
    for link, target in links.items():
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(target)


def closed(folder: Path) -> None:
    """Make a run with files and folders that nobody has permission to read."""
    make_run(folder)
    for name in ("metrics.jsonl", "validation", "run.json"):
        (folder / name).chmod(0)


HALF_OF_A_PAIR = "\ud800"
# File -> a function that makes a folder with this file
FILES = {
    "run.json": make_run,
    "metrics.jsonl": make_run,
    "validation/step-2/000.png": make_run,
    "result.json": make_result,
    "report.md": make_result,
    "rows.csv": make_scores,
    "0-0.png": make_scores,
}
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "is a pipe": os.mkfifo,
    "is a folder": Path.mkdir,
    "has a terabyte": sparse,
    "has other bytes": lambda path: path.write_bytes(b"\xff\xfe\x80\n" * 999),
}


def damaged_files() -> dict[str, Callable[[Path], Any]]:
    """Return name -> a function that makes a folder, for each kind of damage in each file."""
    folders = {}
    for file, make in FILES.items():
        for name, damage in DAMAGES.items():
            folders[f"{file} {name}"] = replaced(make, file, damage)
    return folders


# Kind of damage -> a function that makes a folder with it
HOSTILE: dict[str, Callable[[Path], Any]] = damaged_files() | {
    "a picture that fills the memory": replaced(make_run, "validation/step-2/000.png", write_bomb),
    # runs
    "config is null": partial(make_run, config=None),
    "a billion images": partial(
        make_run, config={"validation_prompts": ["a"], "num_validation_images": 10**9}
    ),
    "half a letter": partial(make_run, error=HALF_OF_A_PAIR, started_at=HALF_OF_A_PAIR),
    "markup everywhere": partial(
        make_run,
        method=EVIL[:99],
        status="failed",
        error=EVIL,
        config={"validation_prompts": [EVIL], "num_validation_images": 1, "rho_norm": EVIL},
    ),
    "losses far apart": replaced(
        make_run, "metrics.jsonl", written('{"step": 1, "loss": 1e149}\n{"step": 9, "loss": 0}\n')
    ),
    "endless loss": replaced(make_run, "metrics.jsonl", written('{"step": 1, "loss": 1e999}\n')),
    "step is markup": lambda folder: make_images(make_run(folder), "<script>"),
    # results and scores
    "kind is markup": partial(make_result, kind=EVIL),
    "kind is a command": replaced(partial(make_result, kind=COMMAND), "report.md", Path.mkdir),
    "figures lead out": partial(make_result, figures=["../../x.png", "/etc/passwd", 1]),
    "report is a page": partial(
        make_result,
        report=f"{EVIL}\n\n{OVERLAY}\n\n{FORM}\n\n{PICTURES}\n\n{DIAGRAM}\n\n{FORMULA}",
    ),
    "report is nested without end": partial(make_result, report=f"{NESTED}\n\n{LAST_LINE}"),
    "report of pictures without end": partial(make_result, report="![" * 400_000),
    "scores of markup": partial(make_scores, labels=(EVIL, f"b{EVIL}"), texts=(EVIL,)),
    "score is not a number": changed("rows.csv", "0.25", "nan"),
    "settings are lost": changed("result.json", '"seeds"', '"grains"'),
    "scored image leads out": partial(make_scores, file="../../../../etc/passwd"),
    # names, links, permissions
    "name is markup": in_folder(EVIL.replace("/", "|")),
    "name of other bytes": in_folder(b"\xff\xfe\x80"),
    "name of a Windows path": in_folder("a\\b"),
    "name of two lines": in_folder("a\nb\r\tc"),
    "links in circles": loops,
    "60 folders deep": lambda folder: make_run(folder.joinpath(*["deep"] * 60)),
    "nobody may read it": closed,
}


def make_good(root: Path) -> None:
    """Make two runs, their scores and a result, so each tab has a good folder to show."""
    for method in LABELS:
        make_run(root / "good" / method, method)
    make_scores(root / "good" / "scores")
    make_result(root / "good" / "landscape")
