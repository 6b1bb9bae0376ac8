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
from bilora_diffusion.core.errors import UserError, ends_in, run_cli, strip_controls
from bilora_diffusion.core.fields import add_flags, check, options_of
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.core.values import Range
from bilora_diffusion.run.record import RUN
from bilora_diffusion.train.soundness import PICKLES

from .results import table
from .subjects import read_groups

if TYPE_CHECKING:
    import torch


# Endings of files that count as adapters; pickles are refused when they are opened
ADAPTER_FILES = (".safetensors", *PICKLES)
# Numbers of ``a..b``
MAX_RANGE = 10_000
# Runs that the name of a folder of results has; of more it has a hash
MAX_NAMED = 4
COUNTS = Range(10**9, "no machine comes to the end of more", at_least=1)
POSITIVE = Range(1e9, "nothing is measured that far out", greater_than=0)


class CommandHelp(command_line.Help, argparse.RawDescriptionHelpFormatter):
    """Shows options as the training scripts do, and keeps the line breaks of the text below."""


class Parser(command_line.UserErrorParser):
    """The command line of a command.

    Args:
        module: as in ``python -m MODULE``.
        described: text of ``--help``; its first paragraph stands above the flags, the rest below.
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
        """Add the arguments that name the runs."""
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
            otherwise: the folder that gets ``name`` if no runs are given.
            of_runs: the default name also has the runs and prompts, see `question_of`.
        """
        self._output = (name, otherwise)
        self._is_of_runs = of_runs
        default = f"{name}-RUN-RUN[-steps][-PROMPTS]" if of_runs else name
        self.add_argument(
            "--output_dir",
            type=Path,
            help=f"default: {default}, in the folder that holds the runs",
        )

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments; results and logs that ``runs/*`` matches beside the runs are left out."""
        args = self.parse_args(argv)
        check(self._fields, vars(args))
        if getattr(args, "runs", None):
            args.runs = _without_results(args.runs)
        if self._output is not None and args.output_dir is None:
            name, otherwise = self._output
            if self._is_of_runs:
                name = "-".join([name, *question_of(args)])
            elif getattr(args, "steps", None) is not None:
                name = f"{name}-steps"  # not over the scores of the runs' ends
            runs = list(args.runs)
            for _, members in read_groups(getattr(args, "group", [])):
                runs += members
            args.output_dir = folder_of(runs, otherwise) / name
        return args


def question_of(args: argparse.Namespace) -> list[str]:
    """Parts of the name of the output folder, so that each comparison has its own folder.

    The names or labels of the runs; "steps" for their checkpoints, whichever steps these are, since
    equal checkpoints share their images; the name of the prompts, if they are given.
    """
    names = []
    for word in args.runs:
        label, equals, _ = word.partition("=")
        path = Path(os.path.abspath(word))
        if path.name == FILE_NAME:  # which all exported files have
            path = path.parent
        is_labelled = equals and not path.exists()
        names.append(_safe_name(label if is_labelled else path.name))
    parts = names[:MAX_NAMED]
    if len(names) > MAX_NAMED:
        # The hash is of all names, so that other sets of as many runs get another folder.
        digest = blake2b("\n".join(names).encode(), digest_size=3).hexdigest()
        parts.append(f"and-{len(names) - MAX_NAMED}-more-{digest}")
    if args.steps is not None:
        parts.append("steps")
    if args.prompts is not None:
        parts.append(_safe_name(Path(args.prompts).stem))
    return parts


def _safe_name(name: str) -> str:
    """A name without the characters that have a meaning in paths and shells."""
    words = re.sub(r"[^\w.]+", "_", name.removesuffix(".safetensors"))
    return words.strip("._")[:40] or "x"


def folder_of(runs: Iterable[str], otherwise: Path = Path()) -> Path:
    """The folder that holds all of some runs: results are put there, and the viewer finds them."""
    parents: list[Path] = []
    for word in runs:
        # A run may be LABEL=RUN. Words that are not a path, such as base, have no folder.
        for name in (word, word.partition("=")[2]):
            if name and Path(name).exists():
                path = Path(os.path.normpath(name))
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


def _without_results(words: Sequence[str]) -> list[str]:
    """The words without results, logs and records, which are named in one printed line.

    A file is left out only beside a folder, so that a single wrong word is refused by its name.
    """
    has_folders = any(Path(word).is_dir() for word in words)
    runs, left_out = [], []
    for word in words:
        path = Path(word)
        if path.is_file():
            is_run = not has_folders or path.suffix.lower() in ADAPTER_FILES
        else:
            is_run = (path / RUN).exists() or not (path / table.FILE).is_file()
        if is_run:
            runs.append(word)
        else:
            left_out.append(word)
    if left_out:
        print(f"left out, since they are not runs: {', '.join(left_out)}", file=sys.stderr)
    return runs


def read_integers(text: str, place: str) -> list[int]:
    """The whole numbers of ``0,1,5`` or ``0..4``, 4 included.

    Args:
        place: start of the error's sentence, which says where the text stands.
    """
    integers: list[int] = []
    for word in text.split(","):
        numbers = re.fullmatch(r"\s*(-?\d{1,18})(?:\.\.(-?\d{1,18}))?\s*", word)
        if numbers is None:
            raise UserError(f"{place}: write whole numbers, such as 0,1 or 0..3.")
        low, high = int(numbers[1]), int(numbers[2] or numbers[1])
        if not 0 <= high - low < MAX_RANGE:
            raise UserError(f"{place}: write a..b with a <= b, at most {MAX_RANGE} numbers.")
        integers += range(low, high + 1)
    for integer, count in Counter(integers).items():
        if count > 1:
            raise UserError(f"{place}, with {integer} twice: keep one.")
    return integers


def run(work: Callable[[], int | None]) -> int:
    """Do the work of a command that can be interrupted and given again.

    Returns:
        The work's exit code; 2 after an error's sentence; 130 after an interruption.
    """
    exit_code: int | None = None

    def resumable() -> None:
        nonlocal exit_code
        with ends_in("interrupted: the same command goes on where this one stopped."):
            exit_code = work()

    return run_cli(resumable) or exit_code or 0


def open_folder(folder: Path, flag: str = "--output_dir") -> Path:
    """Make the output folder, and test before anything is computed that it can be written to."""
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
    """Remove the last result's figures that the new one does not have.

    If the last result is of another command, print that it is replaced.
    """
    if not (folder / table.FILE).exists():
        return
    last = table.head(folder)
    provenance = last.get("provenance")
    last_figures = last.get("figures")
    if isinstance(provenance, dict) and provenance.get("command") != command:
        last_command = strip_controls(str(provenance.get("command")))
        print(f"{folder} held the result of `{last_command}`, which this one replaces")
    if not isinstance(last_figures, list):
        return
    # Only pictures in the folder are removed: anyone may have written the names in the file.
    for path in folder.glob("*.png"):
        if path.name in last_figures and path.name not in figures:
            path.unlink(missing_ok=True)


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
