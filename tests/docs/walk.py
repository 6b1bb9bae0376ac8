"""A simulated reader who runs a page's commands in order, in a fresh folder and in this process.

The first of `RULES` whose pattern is found in a command says how the command is run. A command
without a rule fails the test, so that each new command gets one. `STAND_INS` replaces words for
things that a reader has and a test does not, such as large models.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_image

from bilora_diffusion.image import script as image_script
from bilora_diffusion.image.config import resolve
from bilora_diffusion.run import runlog
from bilora_diffusion.text import script as text_script
from bilora_diffusion.text.config import resolve as resolve_text
from eval.results import table
from tests.app.visitor import Visitor
from tests.browser.driver import serving
from tests.docs.pages import IMAGE_SCRIPT, TEXT_SCRIPT, commands, load_program, program, scripts
from tests.docs.rules import LORA, RULES, STAND_INS, VIEWER, Rule
from tests.scripts.runs import ROOT, copied, free_port, interrupt, make_once, train_once
from tests.text.text_builders import ADAPTER, heldout, rows_for, train_text_once, write_rows

TRAINING: dict[str, Any] = {IMAGE_SCRIPT: resolve, TEXT_SCRIPT: resolve_text}

# Programs that need no files of the reader, with their default output folder. Each command is run
# once for all pages.
DEMOS = {"bilora_diffusion.demo": "demo", "examples/2_text.py": "demo-text"}
# Runs that pages assume to exist, each with its method
METHOD_OF_RUN = {
    "lora": "lora",
    "lora-0": "lora",
    "lora-sam": "lora-sam",
    "bilora": "bilora",
    "sample-0": "bilora",
    "dog": "bilora",
}
# Flags of image runs that pages assume to exist
MEASURED: dict[str, Any] = {
    "validation_dataset": None,
    "max_eval_samples": 2,
    "validation_loss_steps": 1,
    "checkpointing_steps": 1,
    "log_dynamics": True,
}


def understood(command: list[str]) -> tuple[list[str], Rule]:
    """Return the words of a command, with `STAND_INS` replaced, and its rule."""
    words = command
    for pattern, stand_in in STAND_INS:
        sought = pattern.split()
        for start in range(len(words) - len(sought) + 1):
            end = start + len(sought)
            if words[start:end] == sought:
                words = words[:start] + stand_in.split() + words[end:]
                break
    for rule in RULES:
        if re.search(rule.pattern, " ".join(words)):
            return words, rule
    pytest.fail(f"no rule of the walk matches this command: {' '.join(command)}")


@dataclass
class Step:
    """A command of a page: the command that was run instead, and its output."""

    words: list[str]
    name: str
    argv: list[str]
    printed: str = ""


class Walk:
    """A reader in a folder, which must be the current folder.

    Args:
        folder: The reader's folder; it gets the repository's recipes, and data to train on.
        names: Values of names in braces; see `stand_ins`.
        has_viewer: Whether to run the commands that start the viewer, which takes ten seconds.
    """

    def __init__(self, folder: Path, names: dict[str, str], *, has_viewer: bool) -> None:
        self.folder, self.names, self.has_viewer = folder, names, has_viewer
        self.started: list[list[str]] = []
        for name in ("recipes", "eval"):
            (folder / name).symlink_to(ROOT / name)
        photographs(folder / "my_photos", range(12))
        photographs(folder / "held_out", range(12, 15))
        for name, first in (("answers", 0), ("held_out", 24)):
            write_rows(folder / f"{name}.jsonl", conversations(8, first))

    def page(self, path: Path) -> Iterator[Step]:
        """Run the commands of a page, and yield each after it has run."""
        for script in scripts(path):
            for number in itertools.count():
                # Expand again: a command's globs match the files that earlier commands wrote.
                script_commands = commands(script, self.folder)
                if number == len(script_commands):
                    break
                command = script_commands[number]
                if command in self.started:
                    continue  # a page may repeat a command
                self.started.append(command)
                step = self.run(command)
                if step is not None:
                    yield step

    def run(self, command: list[str]) -> Step | None:
        """Run one command and check its results; return None if the command is not run."""
        words, rule = understood(command)
        if rule.reason or (rule is VIEWER and not self.has_viewer):
            return None
        words = words + rule.flags.split()
        for key, value in self.names.items():
            words = [word.replace("{" + key + "}", value) for word in words]
        name, argv = program(words)
        argv = self.prepare(name, argv)
        step = Step(words, name, argv)
        before = files(self.folder)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            start(name, argv)
        step.printed = printed.getvalue()
        changed = set()
        for path, state in files(self.folder).items():
            if before.get(path) != state:
                changed.add(path)
        check(step, self.folder, changed)
        return step

    def prepare(self, name: str, argv: list[str]) -> list[str]:
        """Create the runs that a command needs: those that it reads, or the one that it resumes.

        Returns:
            The arguments, in which a pattern for the runs of a sweep is replaced by their folders.
        """
        if "--resume_from_checkpoint" in argv and "latest" in argv:
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, 2)
                with pytest.raises(KeyboardInterrupt):
                    start(name, without_option(argv, "--resume_from_checkpoint"))
        if name.startswith("eval.") or name == "bilora_diffusion.export":
            for word in argv:
                folder = self.folder / word.removesuffix(f"/{LORA}")
                if folder.name in METHOD_OF_RUN and not folder.exists():
                    self.make_run(folder, METHOD_OF_RUN[folder.name], is_text="text" in name)
        expanded = []
        for word in argv:
            experiment = re.fullmatch(r"runs/(\w+)(/\*)+/?", word)
            if experiment:
                start("eval.sweep", [f"eval/experiments/{experiment[1]}.yaml", "--seeds", "0"])
                expanded += map(str, sorted(Path().glob(word)))
            else:
                expanded.append(word)
        return expanded

    def make_run(self, folder: Path, method: str, is_text: bool) -> None:
        """Create a run of two steps with all files that evaluations read."""
        if is_text:
            options = {"validation_file": heldout("causal"), "checkpointing_steps": 1}
            run = train_text_once("causal", method, method=method, **options)
        else:
            run = train_once(method, method=method, **MEASURED)
        copied(run, folder)


def start(name: str, argv: Sequence[str]) -> None:
    """Run a script or module in this process, or the viewer in a separate process."""
    AcceleratorState._reset_state()  # accelerate keeps one precision for a whole process
    if name == IMAGE_SCRIPT:
        image_script.train(argv)
    elif name == TEXT_SCRIPT:
        text_script.train(argv)
    elif name == "app.viewer":
        view(Path(argv[0]))
    elif name in DEMOS:
        run_demo(name, list(argv))
    else:
        assert not load_program(name).main(list(argv))


def without_option(argv: list[str], option: str) -> list[str]:
    """Return the arguments without an option and its value."""
    position = argv.index(option)
    return argv[:position] + argv[position + 2 :]


def run_demo(name: str, argv: list[str]) -> None:
    """Run a demo, or copy its output if another page had the same command."""
    output = DEMOS[name]
    if "--output_dir" in argv:
        output = argv[argv.index("--output_dir") + 1]
        argv = without_option(argv, "--output_dir")

    def make(folder: Path) -> None:
        assert not load_program(name).main([*argv, "--output_dir", str(folder)])

    copied(make_once(name, make, *argv), Path(output))


def view(root: Path) -> None:
    """Start the viewer, and check that it answers, lists the runs, and ends at a signal."""
    run_names = sorted(path.parent.name for path in root.glob("*/run.json"))
    assert run_names
    port = free_port()
    with TemporaryDirectory() as folder, serving(root.resolve(), Path(folder) / "log", port):
        visitor = Visitor(port)
        listing = ""
        for event, values in visitor.events("frame-runs"):
            listing += visitor.send(event, values)
        for name in run_names:
            assert f'"{name} (' in listing


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the modification time and the size of each file in a reader's folder."""
    states = {}
    for path in folder.rglob("*"):
        if path.is_file():
            states[path] = (path.stat().st_mtime_ns, path.stat().st_size)
    return states


def photographs(folder: Path, numbers: range) -> None:
    """Write crops of the photographs in installed packages, with many sizes, shapes and formats."""
    portrait: Any = get_sample_data("grace_hopper.jpg")
    with portrait as file:
        sources = [Image.open(file).convert("RGB")]
    sources.append(Image.fromarray(load_sample_image("china.jpg")))
    sources.append(Image.fromarray(load_sample_image("flower.jpg")))
    folder.mkdir()
    for number in numbers:
        source = sources[number % len(sources)]
        left, top = 20 * number, 10 * number
        width, height = 150 + 25 * (number % 4), 150 + 30 * (number % 5)
        suffix = ("jpg", "png", "webp")[number % 3]
        part = source.crop((left, top, left + width, top + height))
        part.save(folder / f"{number}.{suffix}")


def conversations(count: int, first: int) -> list[dict[str, Any]]:
    """Return rows of a question and an answer, in the format that every script reads."""
    rows = []
    for row in rows_for("causal", count, first):
        question = {"role": "user", "content": row["prompt"]}
        rows.append({"messages": [question, {"role": "assistant", "content": row["answer"]}]})
    return rows


def check(step: Step, folder: Path, changed: set[Path]) -> None:
    """Check that a command has written or printed the result that its page describes."""
    if step.name == "app.viewer":
        return  # `view` has checked it
    assert changed or step.printed, f"{step.name} wrote nothing and printed nothing"
    if step.name in TRAINING:
        check_training(step, folder, changed)
    elif step.name.startswith("eval."):
        results = [path.parent for path in changed if path.name == table.FILE]
        assert results
        for result in results:
            assert table.read(result).rows
            assert (result / "report.md") in changed
    elif step.name == "bilora_diffusion.export" and {"--to", "--step"} & set(step.argv):
        lines = step.printed.splitlines()
        assert lines
        if "merged" in step.argv:  # llama.cpp's commands follow the folder
            lines = lines[:1]
        for line in lines:
            assert (folder / line.rpartition(": ")[2]).exists()
    elif step.name == "bilora_diffusion.caption":
        assert {path.suffix for path in changed} == {".txt"}
    elif step.name == "bilora_diffusion.demo":
        assert "grid.png" in {path.name for path in changed}


def check_training(step: Step, folder: Path, changed: set[Path]) -> None:
    """Check the files of a run and of its control."""
    config = TRAINING[step.name](step.argv)
    if config.dry_run:
        assert "GB" in step.printed
        assert not changed
        return
    runs = [Path(config.output_dir)]
    if config.compare != "none":
        runs.append(runs[0].with_name(f"{runs[0].name}-{config.compare}"))
    for run in runs:
        assert runlog.read_run(run)["status"] == "finished"
        assert {folder / run / name for name in (LORA, ADAPTER)} & changed
        if step.name == IMAGE_SCRIPT and config.validation_prompts:
            assert list(run.glob("validation/step-*/000.png"))
