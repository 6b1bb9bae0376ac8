"""The folder that an evaluation writes to."""

from __future__ import annotations

from pathlib import Path

from bilora_diffusion.errors import UserError


def open_folder(folder: Path) -> Path:
    """Make the output folder, before anything is computed.

    Raises:
        UserError: it is a file or can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder} is no folder that can be written ({error.strerror}): give another"
            " --output_dir."
        ) from error
    return folder
