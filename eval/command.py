"""What the commands of this package share: a parser, exit codes, output folder and device.

def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    return command.run(lambda: work(_parser().read(words), command_line("eval.NAME", words)))
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bilora_diffusion.errors import UserError, did_you_mean, run_cli

if TYPE_CHECKING:
    import torch

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Complaints are one sentence, with a hint for an unknown flag.

    Args:
        module: what ``python -m`` is given.
        described: the module's docstring; all but its first paragraph stands below the flags.
    """

    def __init__(self, module: str, described: str | None) -> None:
        summary, _, rest = (described or "").partition("\n\n")
        super().__init__(
            prog=f"python -m {module}",
            description=summary,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments.

        Raises:
            UserError: an unknown flag, or a missing or malformed value.
        """
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = did_you_mean(unknown[0], flags)
            raise UserError(f'unexpected "{unknown[0]}"{hint}: --help lists all flags.')
        return args

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a ``UserError``."""
        raise UserError(f"{message}: --help lists all flags.")


def run(work: Callable[[], int | None]) -> int:
    """Do the work of a command that goes on where it was interrupted.

    Args:
        work: returns an exit code of its own, or None for 0.

    Returns:
        That of the work; 2 after a sentence that says what to mend; 130 when it was interrupted.
    """
    code: int | None = None

    def kept() -> None:
        nonlocal code
        code = work()

    try:
        return run_cli(kept) or code or 0
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped.", file=sys.stderr)
        return INTERRUPTED


def open_folder(folder: Path, flag: str = "--output_dir") -> Path:
    """Make a folder that is to be written to, before anything is computed.

    Args:
        flag: which names the folder.

    Raises:
        UserError: it is a file or can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may make the same folder now
    except OSError as error:
        raise UserError(
            f"{folder} is no folder that can be written ({error.strerror}): give another {flag}."
        ) from error
    return folder


def open_device(name: str | None) -> torch.device:
    """The ``--device``; by default a GPU where there is one.

    Raises:
        UserError: it is not there.
    """
    import torch  # here, so that --help does not wait for it

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f'--device "{name}" is not there: use cpu, or leave it out.') from error
    return device
