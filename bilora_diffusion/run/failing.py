"""How a run that ends before its time leaves its record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import room
from ..errors import TrainingError, UserError, keep_trace, unexpected
from .runlog import RunLog


@contextlib.contextmanager
def recorded(log: RunLog | None, folder: Path, trainer: Any) -> Iterator[None]:
    """Within the context, whatever ends the run is written into its record, and goes on its way.

    The trace of an error that nobody foresaw is kept in the run folder.

    Args:
        log: the main process's record; the other processes have none.
        folder: the run folder.
        trainer: tells how much there is still to write.

    Raises:
        TrainingError: the disk is full.
    """
    try:
        yield
    except KeyboardInterrupt:
        if log is not None:
            _close(log.interrupt)
        raise
    except Exception as error:
        full = room.is_full(error)
        foreseen = isinstance(error, UserError | TrainingError)
        if full:
            reason = room.sentence(error, folder, room.needs(trainer))
        else:
            reason = str(error) if foreseen else unexpected(error)
        if not full and not foreseen:
            keep_trace(error, folder)
        if log is not None:
            _close(lambda: log.fail(reason))
        if full:
            raise TrainingError(reason) from error
        raise


def _close(close: Any) -> None:
    with contextlib.suppress(OSError):  # on a full disk the record stays as it was
        close()
