"""``--compare``: the control run of a command, and which of the two runs are trained.

The control is the run of the same command with another ``--method``. Both see the same data, noise
and first values, so that they differ in their method alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import methods
from ..config import resolving
from ..config.options import NO_CONTROL
from ..config.run import RunConfig
from ..core.durable import strict_json
from ..core.errors import placed
from ..run.data import record_content, require_same_content, summarize
from ..run.folder import State, classify, guard
from ..run.record import read_run
from .setup import Script

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs of a command.

    Attributes:
        cfg: Its configuration.
        checkpoint_folder: Checkpoint to go on from; None for a new run.
        is_finished: An earlier command has trained it to its end, so it is not trained again.
    """

    cfg: Any
    checkpoint_folder: Path | None
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.cfg.output_dir)

    def require_same_data(self, task: Any) -> None:
        """Refuse other data than those of a run that is finished.

        Raises:
            UserError: The data of the task are not those of the run.
        """
        if not self.is_finished:
            return
        content = record_content(task.training_content(), task.heldout_content())
        recorded_content = read_run(self.folder)["content"]
        require_same_content(
            recorded_content, summarize(content), depends_on_heldout=self.cfg.depends_on_heldout
        )


def plan(configs: Sequence[RunConfig]) -> list[PlannedRun]:
    """Decide what a command does in the folders of its runs; nothing in them is changed.

    Args:
        configs: Of the run, and of its control if there is one.

    Raises:
        UserError: The content of a folder forbids it, or a checkpoint does not exist.
    """
    runs = []
    for cfg in configs:
        # A run alone that is finished is resumed all the same, which exports it once more.
        resumes = len(configs) > 1 and cfg.resume_from_checkpoint == "auto"
        if resumes and _has_finished(cfg):
            runs.append(PlannedRun(cfg, None, is_finished=True))
            continue
        checkpoint_folder = guard(
            Path(cfg.output_dir),
            cfg.resume_from_checkpoint,
            fit=cfg.fit,
            overwrite=cfg.overwrite_output_dir,
            exports_weights=methods.get(cfg.method).exports_weights,
        )
        runs.append(PlannedRun(cfg, checkpoint_folder))
    return runs


def _has_finished(cfg: RunConfig) -> bool:
    """Test that the output folder holds a finished run of this configuration."""
    folder = Path(cfg.output_dir)
    if classify(folder) is not State.FINISHED:
        return False
    recorded_options = read_run(folder)["config"]
    settings, _ = strict_json(cfg.resume_settings())
    missing = object()
    return all(recorded_options.get(name, missing) == settings[name] for name in settings)


def control_config(script: Script[Any], argv: Sequence[str], cfg: RunConfig) -> Any:
    """The configuration of the control: that of the command line with the other method.

    A typed option that both methods read, such as a radius, is a different quantity in each of
    them. As with a recipe for another method, the control takes its own default.

    Args:
        script: Resolves command lines.
        argv: The command line.
        cfg: Configuration that it was read to.

    Raises:
        UserError: The other method can't be trained so.
    """
    shared_options = methods.reads(cfg.method) & methods.reads(cfg.compare)
    typed_options = type(cfg).parser().explicit(argv)
    dropped_options = sorted(shared_options & typed_options.keys())
    # The last of two flags holds.
    words = without_flags(argv, dropped_options)
    words += ["--method", cfg.compare, "--compare", NO_CONTROL]
    words += ["--output_dir", str(control_folder(Path(cfg.output_dir), cfg.compare))]
    if cfg.hub_model_id:
        words += ["--hub_model_id", f"{cfg.hub_model_id}-{cfg.compare}"]

    with _collected_notes() as known_notes:
        script.resolve(argv)
    with _collected_notes() as notes, placed(f"in the control run of --compare {cfg.compare}, "):
        control = script.resolve(words)
    for name in dropped_options:
        logger.warning(
            "--%s %s is for %s, so the control run takes the default of %s.",
            name,
            typed_options[name],
            cfg.method,
            cfg.compare,
        )
    # Notes that hold for both runs came with the command line.
    for note in notes:
        if note not in known_notes:
            logger.warning("in the control run, %s", note)
    return control


def control_folder(folder: Path, method: str) -> Path:
    """The run folder of a control: beside that of the run, with the method after its name."""
    if folder.name in ("", ".."):  # of "." and the like the name is not in the path
        folder = folder.resolve()
    return Path(f"{folder}-{method}")


def without_flags(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Arguments of a command line without some options, each of which takes one value."""
    words: list[str] = []
    is_value = False  # of a flag that was left out
    for word in argv:
        flag, equals_sign, _ = word.partition("=")
        if is_value:
            is_value = False
        elif flag.startswith("--") and flag[2:].replace("-", "_") in names:
            is_value = not equals_sign
        else:
            words.append(word)
    return words


@contextmanager
def _collected_notes() -> Iterator[list[str]]:
    """Within the context the notes on a command line are collected instead of printed."""
    notes: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        notes.append(record.getMessage())
        return False

    resolving.logger.addFilter(collect)
    try:
        yield notes
    finally:
        resolving.logger.removeFilter(collect)
