"""One thing that is measured, and what one word names: a run folder, a file, or base."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.config.run import FORMER_OPTIONS
from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.files import without_paths
from bilora_diffusion.core.lora_names import DENOISERS, ENCODERS, FILE_NAME
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.image.base_model import describe, folder_of
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.run.record import RUN, read_metrics, read_run
from bilora_diffusion.text.config import TextConfig
from bilora_diffusion.train.soundness import PICKLES

from .cache import PEFT_CONFIG, PEFT_FILE, of_lora, of_models, of_peft, peft_config
from .table import Entry, Row

BASE = "base"
STANDS_FOR = {
    "auxiliary_learning_rate": "learning_rate",
    "auxiliary_rank": "rank",
    "auxiliary_alpha": "lora_alpha",
}
"""Options that are another's value where they are not given."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject(Entry):
    """An :class:`~eval.table.Entry` with what it is measured by, which no result holds.

    Args:
        folder: of the run; None for what is no run.
        weights: a LoRA file, or the folder of a PEFT adapter or of whole models; None where they
            were not asked for, and for the base model.
        record: ``run.json``; {} for what is no run.
    """

    folder: Path | None = None
    weights: Path | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """True for a finished run."""
        return self.record.get("status") == "finished"

    @property
    def is_text(self) -> bool:
        """True for a run of train_text_bilora.py."""
        return "model_name_or_path" in self.record.get("config", {})

    def option(self, name: str) -> Any:
        """An option of the run; None where the record does not have it."""
        config = self.record.get("config", {})
        value = config.get(name)
        if value is None and name in STANDS_FOR:
            return config.get(STANDS_FOR[name])
        return value

    def settings(self) -> dict[str, Any]:
        """The options that made a difference to what was learned, but for the seed."""
        unread = methods.option_names() - methods.get(str(self.method)).reads
        script = TextConfig if self.is_text else DreamBoothConfig
        names = set(self.record["config"]) - script.without_influence - unread
        names -= {"seed", "method"} | FORMER_OPTIONS
        return {name: self.option(name) for name in sorted(names)}

    def log(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; [] for what is no run."""
        return [] if self.folder is None else read_metrics(self.folder)

    def row(self, metric: str, value: float | None, **fields: Any) -> Row:
        """A row of this subject; a value that is not finite is None."""
        value = None if value is None or not math.isfinite(value) else float(value)
        values = {"subject": self.label, "group": self.group, "seed": self.seed, **fields}
        return Row(metric=metric, value=value, **values)


def find(word: str) -> Subject:
    """Open what ``word`` names, with its weights and their digest.

    Its label is what to call it, its group its method's title.
    """
    if word == BASE:
        return Subject(BASE, "base model", BASE, BASE)
    path = Path(word).expanduser()
    if path.is_dir():
        return _folder(path, word)
    if path.is_file():
        # the folder's name where the file has the name that all have
        name = path.resolve().parent.name if path.name == FILE_NAME else path.stem
        return _file(path, "file", name, word)
    owner = path.parent
    names = []
    if owner.is_dir():
        names = [str(owner / neighbor.name) for neighbor in owner.iterdir()]
    raise UserError(
        f'there is no run folder and no file "{word}"{did_you_mean(word, [BASE, *names])}: correct'
        " the path; what is on the hub is had by hf download."
    )


def run(folder: Path, word: str) -> Subject:
    """A run folder as it is, without a look at its weights."""
    record = read_run(folder)
    config, method = record["config"], methods.get(record["method"])
    base = config.get("pretrained_model_name_or_path") or config.get("model_name_or_path")
    return Subject(
        label=folder.resolve().name,
        group=method.title,
        source=without_paths(word),
        method=method.name,
        seed=record.get("seed"),
        base_model=base,
        folder=folder,
        record=record,
    )


def _folder(folder: Path, word: str) -> Subject:
    name = folder.resolve().name
    if (folder / RUN).is_file():
        return _weights_of(run(folder, word))
    if (folder / FILE_NAME).is_file():
        return _file(folder / FILE_NAME, "file", name, word)
    if (folder / PEFT_FILE).is_file():
        return _peft(folder, name, word)
    raise UserError(
        f"{word} is not a run folder (it has no {RUN}) and has neither {FILE_NAME} nor {PEFT_FILE}:"
        " give one, or name a .safetensors file in it."
    )


def _weights_of(subject: Subject) -> Subject:
    assert subject.folder is not None
    folder, status = subject.folder, subject.record.get("status")
    needed = _needed(subject)
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise UserError(
            f'{folder} is a run without {missing[0]} (its status is "{status}"): let it finish, or'
            " go on with --resume_from_checkpoint latest."
        )
    if not subject.finished:
        logger.warning(
            '%s has the status "%s": its weights are those of an earlier end.', folder, status
        )
    if needed == (FILE_NAME,):
        file = folder / FILE_NAME
        return replace(subject, weights=file, digest=of_lora(file))
    if PEFT_FILE in needed:
        return replace(subject, weights=folder, digest=of_peft(folder))
    return replace(subject, weights=folder, digest=of_models(folder, needed))


def _needed(subject: Subject) -> tuple[str, ...]:
    """Files and folders that a run of its kind leaves."""
    exports_weights = methods.get(str(subject.method)).exports_weights
    if subject.is_text:
        return ("model",) if exports_weights else (PEFT_FILE, PEFT_CONFIG)
    if not exports_weights:
        return (FILE_NAME,)
    encoders = ENCODERS if subject.option("train_text_encoder") else ()
    return (_denoiser(subject), *encoders)


def _denoiser(subject: Subject) -> str:
    """Name of the model that an image run trains: the one that is there, else by its base."""
    folder = subject.folder
    assert folder is not None
    saved = [name for name in DENOISERS if (folder / name).is_dir()]
    base = str(subject.base_model)
    flow = folder_of(base) is not None and describe(base).family.flow
    return saved[0] if saved else DENOISERS[flow]


def _file(path: Path, kind: str, name: str, word: str, base_model: str | None = None) -> Subject:
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path.name} may run code when it is read: give a .safetensors file.")
    metadata = inspect(path).metadata
    method = metadata.get("bilora.method")
    if base_model is None and method is not None:
        # Other tools write the name of a checkpoint file here, which nothing can be loaded by.
        base_model = metadata.get("ss_sd_model_name")
    group = method or name
    if method in methods.names():
        group = methods.get(str(method)).title
    return Subject(
        label=name,
        group=group,
        kind=kind,
        source=without_paths(word),
        method=method,
        digest=of_lora(path),
        base_model=base_model,
        weights=path,
    )


def _peft(folder: Path, name: str, word: str) -> Subject:
    config = peft_config(folder)
    base = config.get("base_model_name_or_path")
    return Subject(
        label=name,
        group=name,
        kind="file",
        source=without_paths(word),
        digest=of_peft(folder),
        base_model=base or None,
        weights=folder,
        about={"revision": config["revision"]} if config.get("revision") else {},
    )
