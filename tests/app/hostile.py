"""Folders for the viewer that are damaged, or made by someone who wants to take it down."""

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
FORMULA = r"$$\rlap{\smash{\rule{999em}{999em}}}$$"


def replaced(make: Callable[[Path], Any], file: str, by: Callable[[Path], Any]) -> Any:
    """A good folder in which ``by`` makes something else in place of a file."""

    def damage(folder: Path) -> None:
        make(folder)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        by(path)

    return damage


def written(text: str) -> Any:
    return partial(Path.write_text, data=text)


def changed(file: str, old: str, new: str) -> Any:
    """Scores with other words in a file."""

    def damage(folder: Path) -> None:
        make_scores(folder)
        path = folder / file
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new), "utf-8")

    return damage


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
    links = {"a": "a", "b": "..", "c": "d", "d": "c", "e": "/", "validation/x": "."}
    links |= {"run.json": "metrics.jsonl", "metrics.jsonl": "run.json"}
    for link, to in links.items():
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(to)


def many(folder: Path) -> None:
    """More runs than anyone has, most of them unreadable."""
    for number in range(300):
        (folder / f"{number}").mkdir(parents=True)
        (folder / f"{number}" / "run.json").write_text("{")


def closed(folder: Path) -> None:
    """Files and folders that nobody may read."""
    make_run(folder)
    for name in ("metrics.jsonl", "validation", "run.json"):
        (folder / name).chmod(0)


BIG = "1" + "0" * 400
HALF = "\ud800"
FILES = {
    "run.json": make_run,
    "metrics.jsonl": make_run,
    "fit.json": make_run,
    "validation/step-2/000.png": make_run,
    "checkpoints/step-2/digests.json": make_run,
    "result.json": make_result,
    "figure.png": make_result,
    "report.md": make_result,
    "rows.csv": make_scores,
    "summary.csv": make_scores,
    "0-0.png": make_scores,
}
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "is a pipe": os.mkfifo,
    "is a folder": Path.mkdir,
    "is empty": Path.touch,
    "has a terabyte": sparse,
    "has other bytes": lambda path: path.write_bytes(b"\xff\xfe\x80\n" * 999),
    "is deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "is a picture that fills the memory": write_bomb,
}
RECORDS: dict[str, dict[str, Any]] = {
    "rho is a list": {"config": {"rho": [1]}},
    "rho is endless": {"config": {"rho": 1e999}},
    "config is null": {"config": None},
    "times are texts": {"wall_seconds": "x", "peak_memory_bytes": "x"},
    "time without end": {"wall_seconds": 1e999},
    "steps are huge": {"num_steps": 10**400},
    "steps are a text": {"config": {"max_train_steps": "x"}},
    "a billion images": {"config": {"validation_prompts": ["a"], "num_validation_images": 10**9}},
    "prompts are numbers": {"config": {"validation_prompts": [1, [2]], "num_validation_images": 1}},
    "half a letter": {"error": HALF, "started_at": HALF},
    "half a letter in a prompt": {"config": {"validation_prompts": [HALF]}},
    "markup everywhere": {
        **{"method": EVIL[:99], "status": "failed", "error": EVIL},
        "config": {"validation_prompts": [EVIL], "num_validation_images": 1, "rho_norm": EVIL},
    },
}
METRICS = {
    "endless loss": '{"step": 1, "loss": 1e999}',
    "huge loss": f'{{"step": 1, "loss": {BIG}}}',
    "huge step": f'{{"step": {BIG}, "loss": 1}}',
    "losses far apart": '{"step": 1, "loss": 1e149}\n{"step": 9, "loss": -1e149}',
    "smallest losses": '{"step": 1, "loss": 1e-323}\n{"step": 9, "loss": 3e-323}',
    "levels are none": '{"step": 1, "heldout_loss": 1, "heldout_loss_by_level/-1": 1}',
    "step is a text": '{"step": "1"}',
}
HOSTILE: dict[str, Callable[[Path], Any]] = {
    **{
        f"{file} {what}": replaced(make, file, damage)
        for file, make in FILES.items()
        for what, damage in DAMAGES.items()
        if what != "is a picture that fills the memory" or file.endswith(".png")
    },
    **{what: partial(make_run, **changes) for what, changes in RECORDS.items()},
    **{
        what: replaced(make_run, "metrics.jsonl", written(f"{text}\n"))
        for what, text in METRICS.items()
    },
    "fit without runs": replaced(make_run, "fit.json", written('{"spent": 1}')),
    # validation images, results and scores
    **{
        f"step {step[:9]}": lambda folder, step=step: make_images(make_run(folder), step)
        for step in ("9" * 30, "٣", "<script>")
    },
    "result is a list": replaced(make_result, "result.json", written("[]")),
    "kind is markup": partial(make_result, kind=EVIL),
    "kind is a command": replaced(partial(make_result, kind=COMMAND), "report.md", Path.mkdir),
    "figures are numbers": partial(make_result, figures=[1, {}]),
    "figure is half a letter": partial(make_result, figures=[f"{HALF}.png"]),
    "figures lead out": partial(make_result, figures=["../../x.png", "/etc/passwd"]),
    "report is a page": partial(
        make_result,
        report=f"{EVIL}\n\n{OVERLAY}\n\n{FORM}\n\n{PICTURES}\n\n{DIAGRAM}\n\n{FORMULA}",
    ),
    "report of pictures without end": partial(make_result, report="![" * 400_000),
    "scores of markup": partial(make_scores, labels=(EVIL, f"b{EVIL}"), texts=(EVIL,)),
    "score is not a number": changed("rows.csv", "0.25", "nan"),
    "huge scores": changed("rows.csv", "0.25", "1e308"),
    "huge seed": changed("rows.csv", ",0,", f",{2**70},"),
    "image of an unknown adapter": changed("rows.csv", "lora,lora,0,image", "x,x,0,image"),
    "prompts are others": changed("result.json", '"text": "a hat"', '"text": "another"'),
    "settings are lost": changed("result.json", '"seeds"', '"grains"'),
    "no seeds": partial(make_scores, listed=[]),
    "half a letter in the settings": changed("result.json", "test-CLIP", r"\ud800"),
    "labels are alike": changed("result.json", '"bilora"', '"lora"'),
    "scored image leads out": partial(make_scores, file="../../../../etc/passwd"),
    "scored image has a NUL": partial(make_scores, file="a\0b.png"),
    # names, links, rights, numbers
    "name is markup": named(EVIL.replace("/", "|")),
    "name of other bytes": named(b"\xff\xfe\x80"),
    "name of two lines": named("a\nb\r\tc"),
    "name of 250 letters": named("a" * 250),
    "links in circles": loops,
    "60 folders deep": lambda folder: make_run(folder.joinpath(*["deep"] * 60)),
    "300 broken runs": many,
    "nobody may read it": closed,
}
"""Damage -> a function that makes it at a place where nothing is yet."""


def make_good(root: Path) -> None:
    """Two runs, their scores and a result, which all tabs show."""
    for method in LABELS:
        make_run(root / "good" / method, method)
    make_scores(root / "good" / "scores")
    make_result(root / "good" / "landscape")
