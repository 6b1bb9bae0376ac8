"""Variants of a run that are trained for comparison by ``--compare``, the demo and eval.sweep.

A variant is a label with its own options. All other options are the same. Unless the variants'
options change them, runs with the same seed use the same data, noise and initial values. With
several runs and ``--resume_from_checkpoint auto``, `plan` skips the finished ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import methods
from ..config.options import NO_CONTROL
from ..config.resolving import collect_notes
from ..config.run import HELDOUT_OPTIONS, RunConfig
from ..core.errors import TrainingError, add_source
from ..core.fields import default_of
from ..run.data import record_content, require_same_content, summarize
from ..run.folder import guard
from ..run.record import read_metrics, read_run
from ..run.settings import without_options
from .resume import holds_finished_run
from .setup import Script

# Options that do not affect the training but add recorded values for comparisons.
MEASURING_OPTIONS = (*sorted(HELDOUT_OPTIONS), "validation_loss_steps")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A label, and the variant's options as option -> value."""

    label: str
    options: Mapping[str, Any]

    @property
    def flags(self) -> tuple[str, ...]:
        """The options as ``--name=value``, for any script."""
        return to_flags(self.options)


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs of a command.

    Attributes:
        cfg: configuration of the run.
        checkpoint_folder: checkpoint to resume from; None for a new run.
        is_finished: whether an earlier command has finished the run.
    """

    cfg: Any
    checkpoint_folder: Path | None
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.cfg.output_dir)

    def require_same_data(self, task: Any) -> None:
        """Check that a finished run used the task's data, so that it can be compared with others.

        Raises:
            UserError: the run used different training data, or chose its weights with different
                held-out data.
        """
        if not self.is_finished:
            return
        content = record_content(task.training_content(), task.heldout_content())
        recorded_content = read_run(self.folder)["content"]
        require_same_content(
            recorded_content, summarize(content), depends_on_heldout=self.cfg.depends_on_heldout
        )


def plan(configs: Sequence[RunConfig]) -> list[PlannedRun]:
    """Plan the runs of a command from the content of their folders, without changing the folders.

    Args:
        configs: configuration of each run. With ``--resume_from_checkpoint auto``, finished
            runs of several are skipped; a single one is resumed, which exports it again.

    Raises:
        UserError: the content of a folder does not allow its run (`folder.guard`), or a checkpoint
            does not exist.
    """
    runs = []
    for cfg in configs:
        resumes = len(configs) > 1 and cfg.resume_from_checkpoint == "auto"
        if resumes and holds_finished_run(Path(cfg.output_dir), cfg):
            runs.append(PlannedRun(cfg, None, is_finished=True))
            continue
        checkpoint_folder = guard(
            Path(cfg.output_dir),
            cfg.resume_from_checkpoint,
            settings=cfg.resume_settings(),
            overwrite=cfg.overwrite_output_dir,
            exports_weights=methods.get(cfg.method).exports_weights,
        )
        runs.append(PlannedRun(cfg, checkpoint_folder))
    return runs


def require_paired(folders: Sequence[Path]) -> int:
    """Check that runs are paired, with the same inputs at every step; return the number of steps.

    Raises:
        TrainingError: the hashes of the inputs in the runs' logs differ.
    """
    hashes_of_run: list[list[str]] = []  # hash of the inputs of each step, for each run
    for folder in folders:
        rows = read_metrics(folder)
        hashes_of_run.append([row["digest"] for row in rows if "digest" in row])
    for step, hashes in enumerate(itertools.zip_longest(*hashes_of_run), start=1):
        if len(set(hashes)) != 1:
            raise TrainingError(
                f"the runs {', '.join(map(str, folders))} had different inputs at step {step}:"
                " train them with the same seed, data, batch size and number of steps."
            )
    return len(hashes_of_run[0])


def to_flags(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return options as ``--name=value``; booleans become yes and no."""
    flags = []
    for name, value in options.items():
        # Boolean options, and options with the choices yes and no, accept these words.
        if isinstance(value, bool):
            value = "yes" if value else "no"
        flags.append(f"--{name}={value}")
    return tuple(flags)


def identity_of(config: RunConfig) -> dict[str, Any]:
    """Return the options that affect a run's result or measurements and are not at their defaults.

    The recipe's options are included, so a finished run is not mistaken for a run of an edited
    recipe. Defaults are excluded, so a new option of the script does not rename any run.
    """
    options = config.to_dict()
    values = without_options(options, config.changeable_options())
    for name in MEASURING_OPTIONS:
        values[name] = options.get(name)
    for option in dataclasses.fields(config):
        if option.name in values and values[option.name] == default_of(option):
            del values[option.name]
    return values


def folder_name(label: str, seed: int, identity: Mapping[str, Any]) -> str:
    """Return the name of a run's folder: its variant, its seed, and a hash of its options."""
    # Keep letters, digits and periods of the label, at most 60 characters.
    slug = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")[:60] or "variant"
    text = json.dumps(identity, sort_keys=True, default=str)
    return f"{slug}-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def control_config(script: Script[Any], argv: Sequence[str], cfg: RunConfig) -> Any:
    """Create the configuration of the control: that of the command line with the other method.

    An option that both methods read, such as a radius, has a different meaning in each of them. So
    the control uses its method's default instead of the value on the command line.

    Args:
        script: training script.
        argv: command-line arguments.
        cfg: configuration of the run, which was read from the arguments.

    Raises:
        UserError: the other method can't be used with these options.
    """
    shared_options = methods.reads(cfg.method) & methods.reads(cfg.compare)
    typed_options = type(cfg).parser().explicit(argv)
    dropped_options = sorted(shared_options & typed_options.keys())
    options = {"method": cfg.compare, "compare": NO_CONTROL}
    options["output_dir"] = str(control_folder(Path(cfg.output_dir), cfg.compare))
    if cfg.hub_model_id:
        options["hub_model_id"] = f"{cfg.hub_model_id}-{cfg.compare}"

    with collect_notes() as known_notes:
        script.resolve(argv)
    with collect_notes() as notes, add_source(f"in the control run of --compare {cfg.compare}, "):
        # If a flag is repeated, the last one counts.
        config = script.resolve([*without_flags(argv, dropped_options), *to_flags(options)])
    for name in dropped_options:
        logger.warning(
            "--%s %s is for %s, so the control run takes the default of %s.",
            name,
            typed_options[name],
            cfg.method,
            cfg.compare,
        )
    # Notes that apply to both runs were already printed.
    for note in notes:
        if note not in known_notes:
            logger.warning("in the control run, %s", note)
    return config


def control_folder(folder: Path, method: str) -> Path:
    """Return the run folder of a control: the run's folder name followed by the method."""
    if folder.name in ("", ".."):  # a path such as "." has no name
        folder = folder.resolve()
    return Path(f"{folder}-{method}")


def without_flags(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Return command-line arguments without some options, each of which takes one value."""
    words: list[str] = []
    is_value = False  # whether the next word is the value of a removed flag
    for word in argv:
        flag, equals_sign, _ = word.partition("=")
        if is_value:
            is_value = False
        elif flag.startswith("--") and flag[2:].replace("-", "_") in names:
            is_value = not equals_sign
        else:
            words.append(word)
    return words
