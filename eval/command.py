"""Parser, exit codes, output folder and device of all commands."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_diffusion.config import command_line
from bilora_diffusion.core.errors import (
    Interrupted,
    UserError,
    did_you_mean,
    run_cli,
    strip_controls,
)
from bilora_diffusion.core.fields import add_flags, check, options_of
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.core.values import Range
from bilora_diffusion.run.record import RUN
from bilora_diffusion.train.soundness import PICKLES

from . import table
from .subjects import read_groups

if TYPE_CHECKING:
    import torch


ADAPTER_FILES = (".safetensors", *PICKLES)
LARGEST_RANGE = 10_000
MOST_NAMED = 4
"""Runs that a folder of results is named after."""
COUNTS = Range(10**9, "no machine comes to the end of more", at_least=1)
POSITIVE = Range(1e9, "nothing is measured that far out", greater_than=0)


class CommandHelp(command_line.Help, argparse.RawDescriptionHelpFormatter):
    """Shows options as training does, and the text below them as it is written."""


class Parser(command_line.Sentences):
    """The command line of a command.

    Args:
        module: as in ``python -m MODULE``.
        described: its first paragraph stands above the flags, the rest below them.
        groups: dataclasses of options; see `bilora_diffusion.core.fields`.
    """

    def __init__(self, module: str, described: str | None, groups: Sequence[Any] = ()) -> None:
        summary, _, epilog = (described or "").partition("\n\n")
        super().__init__(
            prog=f"python -m {module}",
            description=summary,
            epilog=epilog,
            formatter_class=CommandHelp,
            allow_abbrev=False,
        )
        add_flags(self, groups, bare=True)
        self._fields = options_of(groups)
        self._output: tuple[str, Path] | None = None
        self._is_of_runs = False

    def add_runs(self, runs: str = "run folders") -> None:
        """Add the arguments that say which runs."""
        self.add_argument("runs", nargs="*", metavar="RUN", help=runs)
        self.add_argument(
            "--group",
            action="append",
            default=[],
            metavar="LABEL=RUN,RUN",
            help="runs that stand together under a name; can be given several times",
        )

    def add_output(self, name: str, otherwise: Path = Path(), of_runs: bool = False) -> None:
        """Add ``--output_dir``, by default ``name`` under the folder that holds the runs.

        Args:
            otherwise: the folder of that name where no runs are given.
            of_runs: the default name says which runs are scored too, see `question_of`.
        """
        self._output, self._is_of_runs = (name, otherwise), of_runs
        default = f"{name}-RUN-RUN[-steps][-PROMPTS]" if of_runs else name
        self.add_argument(
            "--output_dir",
            type=Path,
            help=f"default: {default}, in the folder that holds the runs",
        )

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments; results and logs among the runs, which ``runs/*`` brings, are left out."""
        args, extra_words = self.parse_known_args(argv)
        if extra_words:
            flags: list[str] = []
            for action in self._actions:
                flags += action.option_strings
            word = extra_words[0]
            raise UserError(
                f'unexpected "{word}"{did_you_mean(word, flags)}: --help lists all flags.'
            )
        check(self._fields, vars(args))
        if getattr(args, "runs", None):
            args.runs = _runs_alone(args.runs)
        if self._output is not None and args.output_dir is None:
            runs = list(args.runs)
            for _, members in read_groups(getattr(args, "group", [])):
                runs += members
            name, otherwise = self._output
            if self._is_of_runs:
                name = "-".join([name, *question_of(args)])
            args.output_dir = folder_of(runs, otherwise) / name
        return args


def question_of(args: argparse.Namespace) -> list[str]:
    """Words of a folder's name for what is scored, so that another question has another folder.

    The names or labels of the runs; "steps" for their checkpoints, whatever steps, since equal
    checkpoints share their images; the name of the prompts, if they are given.
    """
    names = []
    for word in args.runs:
        label, equals, _ = word.partition("=")
        path = Path(os.path.abspath(word))
        if path.name == FILE_NAME:  # which all exported files have
            path = path.parent
        is_labelled = equals and not path.exists()
        names.append(_plain(label if is_labelled else path.name))
    words = names[:MOST_NAMED]
    if len(names) > MOST_NAMED:
        # Of many runs the first, and a hash, which tells them from other sets of as many.
        digest = blake2b("\n".join(names).encode(), digest_size=3).hexdigest()
        words.append(f"and-{len(names) - MOST_NAMED}-more-{digest}")
    if args.steps is not None:
        words.append("steps")
    if args.prompts is not None:
        words.append(_plain(Path(args.prompts).stem))
    return words


def _plain(name: str) -> str:
    """A name without what paths and shells have a meaning for."""
    return re.sub(r"[^\w.]+", "_", name.removesuffix(".safetensors")).strip("._")[:40] or "x"


def folder_of(runs: Iterable[str], otherwise: Path = Path()) -> Path:
    """The folder that holds all of some runs, where their results are put and the viewer looks."""
    parents: list[Path] = []
    for word in runs:
        # LABEL=RUN is a run too; what is no place, such as base, has no folder.
        for place in (word, word.partition("=")[2]):
            if place and Path(place).exists():
                path = Path(os.path.normpath(place))
                folder = path.parent if path.is_file() else path
                parents.append(folder.absolute().parent)
                break
    if not parents:
        return otherwise
    common = Path(os.path.commonpath(parents))
    working_folder = Path.cwd()
    if common.is_relative_to(working_folder):
        return common.relative_to(working_folder)
    return common


def _runs_alone(words: Sequence[str]) -> list[str]:
    """The words without what lies among runs: results, logs and records, named in one line.

    A plain file is left out only beside a folder, so that a single wrong word is refused by name.
    """
    has_folders = any(Path(word).is_dir() for word in words)

    def is_left_out(word: str) -> bool:
        path = Path(word)
        if path.is_file():
            return has_folders and path.suffix.lower() not in ADAPTER_FILES
        return not (path / RUN).exists() and (path / table.FILE).is_file()

    left = [word for word in words if is_left_out(word)]
    if left:
        print(f"left out, since they are no runs: {', '.join(left)}", file=sys.stderr)
    return [word for word in words if word not in left]


def read_integers(text: str, place: str) -> list[int]:
    """The whole numbers of ``0,1,5`` or ``0..4``, 4 included.

    Args:
        place: the beginning of a sentence about the text.
    """
    integers: list[int] = []
    for word in text.split(","):
        numbers = re.fullmatch(r"\s*(-?\d{1,18})(?:\.\.(-?\d{1,18}))?\s*", word)
        if numbers is None:
            raise UserError(f"{place}: write whole numbers, such as 0,1 or 0..3.")
        low, high = int(numbers[1]), int(numbers[2] or numbers[1])
        if not 0 <= high - low < LARGEST_RANGE:
            raise UserError(f"{place}: write a..b with a <= b, at most {LARGEST_RANGE} numbers.")
        integers += range(low, high + 1)
    for integer, count in Counter(integers).items():
        if count > 1:
            raise UserError(f"{place}, with {integer} twice: keep one.")
    return integers


def run(work: Callable[[], int | None]) -> int:
    """Do the work of a command that goes on where it was interrupted.

    Returns:
        That of the work; 2 after a sentence that says what to mend; 130 when it was interrupted.
    """
    code: int | None = None

    def resumable() -> None:
        nonlocal code
        try:
            code = work()
        except KeyboardInterrupt:
            sentence = "interrupted: the same command goes on where this one stopped."
            raise Interrupted(sentence) from None

    return run_cli(resumable) or code or 0


def open_folder(folder: Path, flag: str = "--output_dir") -> Path:
    """Make a folder that is to be written to, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may make the same folder now
    except OSError as error:
        raise UserError(
            f"{folder} is not a folder that can be written ({error.strerror}): give another {flag}."
        ) from error
    return folder


def require_free(folder: Path, kind: str) -> None:
    """Refuse a folder that holds the result of another command, which would be lost."""
    if not (folder / table.FILE).exists():
        return
    found_kind = table.head(folder)["kind"]
    if found_kind != kind:
        raise UserError(f"{folder} holds a result of eval.{found_kind}: give another --output_dir.")


def remove_last_figures(folder: Path, command: str, figures: Sequence[str]) -> None:
    """Remove the figures of the result that a folder holds but for those that are drawn anew, and
    say which other command the new result replaces.
    """
    if not (folder / table.FILE).exists():
        return
    last = table.head(folder)
    provenance, last_figures = last.get("provenance"), last.get("figures")
    if isinstance(provenance, dict) and provenance.get("command") != command:
        last_command = strip_controls(str(provenance.get("command")))
        print(f"{folder} held the result of `{last_command}`, which this one replaces")
    # The names stand in a file that anyone may have written: only pictures in the folder go.
    pictures = {path.name for path in folder.glob("*.png")}
    for name in last_figures if isinstance(last_figures, list) else []:
        if name in pictures and name not in figures:
            (folder / name).unlink(missing_ok=True)


def open_device(name: str | None) -> torch.device:
    """The ``--device``; by default a GPU where there is one."""
    import torch  # here, so that --help does not wait for it

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f'--device "{name}" is not there: use cpu, or leave it out.') from error
    return device
