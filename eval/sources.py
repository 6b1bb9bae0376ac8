"""A subject, which is measured, opened by its name: a run folder, a file, or "base"."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.core import removed
from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.files import without_paths
from bilora_diffusion.core.lora_names import DENOISERS, ENCODERS, FILE_NAME
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.image.base_model import folder_of, read_base_model
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.run.record import RUN, read_metrics, read_run
from bilora_diffusion.text.config import TextConfig
from bilora_diffusion.train.soundness import PICKLES

from .cache import PEFT_CONFIG, PEFT_FILE, hash_of_lora, hash_of_models, hash_of_peft, peft_config
from .results.table import Entry, Row

BASE = "base"
# Option -> the option whose value it has where it is not given
STANDS_FOR = {
    "auxiliary_learning_rate": "learning_rate",
    "auxiliary_rank": "rank",
    "auxiliary_alpha": "lora_alpha",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject(Entry):
    """An :class:`~eval.results.table.Entry` with its files, which are not written into a result."""

    # Folder of the run; None if it is not a run
    folder: Path | None = None
    # A LoRA file, or the folder of a PEFT adapter or of whole models; None for the base model, and
    # where a command does not need them
    weights: Path | None = None
    # Content of ``run.json``; {} if it is not a run
    record: Mapping[str, Any] = field(default_factory=dict)
    # Scale of the guidance that the weights were trained towards (``--guided_target``); 1 for none
    guided_target: float = 1.0

    @property
    def finished(self) -> bool:
        """True for a finished run."""
        return self.record.get("status") == "finished"

    @property
    def best_step(self) -> int | None:
        """Step whose weights a run with ``--keep_best`` left; None for the last one."""
        return self.record.get("results", {}).get("best_step")

    @property
    def is_whole_model(self) -> bool:
        """True for a model that was trained whole, which has no adapter to scale."""
        return self.weights is not None and self.weights.is_dir()

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
        """The options of the run that influence what it learns, without seed and method."""
        script = TextConfig if self.is_text else DreamBoothConfig
        method_ignores = methods.option_names() - methods.get(str(self.method)).reads
        names = set(self.record["config"]) - script.changeable_options() - method_ignores
        names -= {"seed", "method"}
        depends_on_heldout = bool(
            self.option("keep_best") or self.option("early_stopping_patience")
        )
        settings: dict[str, Any] = {}
        for name in sorted(names):
            # An option that this version does not have, and that had no effect, says nothing.
            option = removed.OPTIONS.get(name)
            if option is None or not option.is_neutral(self.option(name), depends_on_heldout):
                settings[name] = self.option(name)
        return settings

    def log(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; [] if it is not a run."""
        if self.folder is None:
            return []
        return read_metrics(self.folder)

    def row(self, metric: str, value: float | None, **fields: Any) -> Row:
        """A row of this subject; a value that is not finite is None."""
        number = None
        if value is not None and math.isfinite(value):
            number = float(value)
        fields = {"subject": self.label, "group": self.group, "seed": self.seed, **fields}
        return Row(metric=metric, value=number, **fields)


def find(word: str) -> Subject:
    """Open the subject that a word of the command line names, with its weights and their hash.

    Its label is the name of its folder or file, its group the title of its method.
    """
    if word == BASE:
        return Subject(BASE, "base model", BASE, BASE)
    path = Path(word).expanduser()
    if path.is_dir():
        return _folder(path, word)
    if path.is_file():
        name = path.stem
        if path.name == FILE_NAME:  # which all exported files have
            name = path.resolve().parent.name
        return _file(path, name, word)
    names = [BASE]
    if path.parent.is_dir():
        names += [str(path.parent / neighbor.name) for neighbor in path.parent.iterdir()]
    raise UserError(
        f'there is no run folder and no file "{word}"{did_you_mean(word, names)}: correct the path;'
        " load an adapter of the hub by hf download first."
    )


def open_run(folder: Path, word: str) -> Subject:
    """A run folder as a subject, without its weights."""
    record = read_run(folder)
    config = record["config"]
    method = methods.get(record["method"])
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
        guided_target=config.get("guided_target", 1.0),
    )


def _folder(folder: Path, word: str) -> Subject:
    """The run, the LoRA file or the PEFT adapter in a folder; a run has one of these files too."""
    name = folder.resolve().name
    if (folder / RUN).is_file():
        return _with_weights(open_run(folder, word))
    if (folder / FILE_NAME).is_file():
        return _file(folder / FILE_NAME, name, word)
    if (folder / PEFT_FILE).is_file():
        return _peft(folder, name, word)
    raise UserError(
        f"{word} is not a run folder (it has no {RUN}) and has neither {FILE_NAME} nor {PEFT_FILE}:"
        " give one, or name a .safetensors file in it."
    )


def _with_weights(subject: Subject) -> Subject:
    """A run with its weights and their hash."""
    assert subject.folder is not None
    folder = subject.folder
    status = subject.record.get("status")
    needed = _weight_files(subject)
    for name in needed:
        if not (folder / name).exists():
            raise UserError(
                f'{folder} is a run without {name} (its status is "{status}"): let it finish, or go'
                " on with --resume_from_checkpoint auto."
            )
    # A run that was resumed, or is still running, has the files of its last end.
    if not subject.finished:
        logger.warning(
            '%s has the status "%s": its weights are those of an earlier end.', folder, status
        )
    if needed == (FILE_NAME,):
        file = folder / FILE_NAME
        return replace(subject, weights=file, digest=hash_of_lora(file))
    if PEFT_FILE in needed:
        return replace(subject, weights=folder, digest=hash_of_peft(folder))
    return replace(subject, weights=folder, digest=hash_of_models(folder, needed))


def _weight_files(subject: Subject) -> tuple[str, ...]:
    """Names of the files and folders of weights that a run of this kind leaves."""
    has_whole_models = methods.get(str(subject.method)).exports_weights
    if subject.is_text:
        return ("model",) if has_whole_models else (PEFT_FILE, PEFT_CONFIG)
    if not has_whole_models:
        return (FILE_NAME,)
    if subject.option("train_text_encoder"):
        return (_denoiser(subject), *ENCODERS)
    return (_denoiser(subject),)


def _denoiser(subject: Subject) -> str:
    """Name of the model that an image run trains: the one in its folder, else by its base model."""
    assert subject.folder is not None
    for name in DENOISERS:
        if (subject.folder / name).is_dir():
            return name
    # Nothing is saved yet. A base model that is not on this machine counts as one with a UNet.
    base = str(subject.base_model)
    is_flow = folder_of(base) is not None and read_base_model(base).family.flow
    return DENOISERS[is_flow]  # (UNet, transformer)


def _file(path: Path, name: str, word: str) -> Subject:
    """A LoRA file as a subject called ``name``."""
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path.name} may run code when it is read: give a .safetensors file.")
    metadata = inspect(path).metadata
    method = metadata.get("bilora.method")
    base_model = None
    if method is not None:
        # Other programs write the name of a checkpoint file here, which can't be loaded.
        base_model = metadata.get("ss_sd_model_name")
    group = method or name
    if method in methods.names():
        group = methods.get(str(method)).title
    return Subject(
        label=name,
        group=group,
        kind="file",
        source=without_paths(word),
        method=method,
        digest=hash_of_lora(path),
        base_model=base_model,
        weights=path,
        guided_target=float(metadata.get("bilora.guided_target", 1)),
    )


def _peft(folder: Path, name: str, word: str) -> Subject:
    """A folder with a PEFT adapter as a subject called ``name``."""
    config = peft_config(folder)
    base = config.get("base_model_name_or_path")
    return Subject(
        label=name,
        group=name,
        kind="file",
        source=without_paths(word),
        digest=hash_of_peft(folder),
        base_model=base or None,
        weights=folder,
        about={"revision": config["revision"]} if config.get("revision") else {},
    )
