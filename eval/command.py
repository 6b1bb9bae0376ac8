"""Command-line parser, exit codes, output folder and device of all commands."""

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


# Suffixes of files that count as adapters; pickles are refused when they are opened
ADAPTER_FILES = (".safetensors", *PICKLES)
# Maximum number of integers in ``a..b``
MAX_RANGE = 10_000
# Maximum number of runs in an output folder's name; the number of the others and a hash follow
MAX_NAMED = 4
COUNTS = Range(10**9, "a larger number would take forever", at_least=1)
POSITIVE = Range(1e9, "larger values have no use here", greater_than=0)


class CommandHelp(command_line.Help, argparse.RawDescriptionHelpFormatter):
    """Help formatter: shows options as the training scripts do, and keeps the epilog's lines."""


class Parser(command_line.UserErrorParser):
    """The command-line parser of one command.

    Args:
        module: the command's module, as in ``python -m MODULE``.
        described: text of ``--help``; the first paragraph is shown above the flags, the rest below.
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
            help="a label for several runs that form a group; can be given several times",
        )

    def add_output(self, name: str, otherwise: Path = Path(), of_runs: bool = False) -> None:
        """Add ``--output_dir``; its default is ``name`` in the folder that holds the runs.

        Args:
            name: name of the default folder.
            otherwise: parent of the default folder if no runs are given.
            of_runs: add the runs, ``--steps`` and the prompts to the default name; see
                `question_of`.
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
        """Parse and check the arguments, and set the default of ``--output_dir``.

        Results and logs that ``runs/*`` matches besides the runs are skipped.
        """
        args = self.parse_args(argv)
        check(self._fields, vars(args))
        if getattr(args, "runs", None):
            args.runs = _without_results(args.runs)
        if self._output is not None and args.output_dir is None:
            name, otherwise = self._output
            if self._is_of_runs:
                name = "-".join([name, *question_of(args)])
            elif getattr(args, "steps", None) is not None:
                name = f"{name}-steps"  # does not overwrite the scores of the final weights
            runs = list(args.runs)
            for _, members in read_groups(getattr(args, "group", [])):
                runs += members
            args.output_dir = folder_of(runs, otherwise) / name
        return args


def question_of(args: argparse.Namespace) -> list[str]:
    """Return the parts of an output folder's name that distinguish comparisons.

    The parts are the names or labels of the runs, "steps" if their checkpoints are scored, and the
    name of the prompts if they are given. The chosen steps are not part of the name, because
    comparisons of the same runs' checkpoints share images.
    """
    names = []
    for word in args.runs:
        label, equals, _ = word.partition("=")
        path = Path(os.path.abspath(word))
        if path.name == FILE_NAME:  # all exported files have this name
            path = path.parent
        is_labelled = equals and not path.exists()
        names.append(_safe_name(label if is_labelled else path.name))
    parts = names[:MAX_NAMED]
    if len(names) > MAX_NAMED:
        # The hash covers all names, so another set of the same number of runs gets another folder.
        digest = blake2b("\n".join(names).encode(), digest_size=3).hexdigest()
        parts.append(f"and-{len(names) - MAX_NAMED}-more-{digest}")
    if args.steps is not None:
        parts.append("steps")
    if args.prompts is not None:
        parts.append(_safe_name(Path(args.prompts).stem))
    return parts


def _safe_name(name: str) -> str:
    """Return a name, cut to 40 characters, without characters special to paths and shells."""
    words = re.sub(r"[^\w.]+", "_", name.removesuffix(".safetensors"))
    return words.strip("._")[:40] or "x"


def folder_of(runs: Iterable[str], otherwise: Path = Path()) -> Path:
    """Return the folder that holds all runs: results are written there for the viewer to find.

    The result is ``otherwise`` if none of the runs is a path.
    """
    parents: list[Path] = []
    for word in runs:
        # A run may be LABEL=RUN. A word that is not a path, such as base, has no folder.
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
    """Return the words without results, logs and records, and print the words that are skipped.

    Files are skipped only if a folder is given too, so a single wrong word is refused by name.
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
        print(f"skipped, because they are not runs: {', '.join(left_out)}", file=sys.stderr)
    return runs


def read_integers(text: str, place: str) -> list[int]:
    """Return the whole numbers of a text such as ``0,1,5`` or ``0..4``, which includes 4.

    Args:
        text: numbers and ranges, separated by commas.
        place: start of the error message, which names the source of the text.
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
            raise UserError(f"{place}: give {integer} only once.")
    return integers


def run(work: Callable[[], int | None]) -> int:
    """Run the work of a command that can be interrupted and run again.

    Returns:
        The work's exit code, or 0 for None; after an exception, the exit code of `report_errors`,
        such as 2 after a UserError or TrainingError, and 130 after Ctrl-C.
    """
    exit_code: int | None = None

    def resumable() -> None:
        nonlocal exit_code
        with ends_in("interrupted: run the same command again to resume."):
            exit_code = work()

    return run_cli(resumable) or exit_code or 0


def open_folder(folder: Path, flag: str = "--output_dir") -> Path:
    """Create the output folder, and check that it is writable, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may check the same folder now
    except OSError as error:
        raise UserError(
            f"{folder} is not a writable folder ({error.strerror}): give another {flag}."
        ) from error
    return folder


def require_free(folder: Path, kind: str) -> None:
    """Raise UserError if the folder holds another command's result, which would be lost."""
    if not (folder / table.FILE).exists():
        return
    found_kind = table.head(folder)["kind"]
    if found_kind != kind:
        raise UserError(f"{folder} holds a result of eval.{found_kind}: give another --output_dir.")


def remove_last_figures(folder: Path, command: str, figures: Sequence[str]) -> None:
    """Remove the previous result's figures that the new result does not have.

    If another command line wrote the previous result, print that it is replaced.
    """
    if not (folder / table.FILE).exists():
        return
    last = table.head(folder)
    provenance = last.get("provenance")
    last_figures = last.get("figures")
    if isinstance(provenance, dict) and provenance.get("command") != command:
        last_command = strip_controls(str(provenance.get("command")))
        print(f"{folder}: this result replaces the result of `{last_command}`")
    if not isinstance(last_figures, list):
        return
    # Only pictures in this folder are removed: the file's names of figures can't be trusted.
    for path in folder.glob("*.png"):
        if path.name in last_figures and path.name not in figures:
            path.unlink(missing_ok=True)


def open_device(name: str | None) -> torch.device:
    """Return the device named by ``--device``; by default a GPU if there is one, else the CPU."""
    import torch  # here, so that --help does not wait for it

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f'--device "{name}" is not available: use cpu, or omit it.') from error
    return device
