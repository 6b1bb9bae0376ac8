"""A subject of a measurement: a run folder, a file of an adapter, or the base model."""

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
# Option -> the option that provides its default value
STANDS_FOR = {
    "auxiliary_learning_rate": "learning_rate",
    "auxiliary_rank": "rank",
    "auxiliary_alpha": "lora_alpha",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject(Entry):
    """An :class:`~eval.results.table.Entry` with fields that are not written into a result."""

    # Folder of the run; None if it is not a run
    folder: Path | None = None
    # A LoRA file, or the folder of a PEFT adapter or of whole models; None for the base model, or
    # if the command does not need the weights
    weights: Path | None = None
    # Content of ``run.json``; {} if it is not a run
    record: Mapping[str, Any] = field(default_factory=dict)
    # Guidance scale of the training target (``--guided_target``); 1 for an unguided target
    guided_target: float = 1.0

    @property
    def finished(self) -> bool:
        """Whether this is a finished run."""
        return self.record.get("status") == "finished"

    @property
    def best_step(self) -> int | None:
        """Step of the weights that ``--keep_best`` has kept; None for the last step."""
        return self.record.get("results", {}).get("best_step")

    @property
    def is_whole_model(self) -> bool:
        """Whether an image subject was trained whole, so it has no adapter to scale."""
        return self.weights is not None and self.weights.is_dir()

    @property
    def is_text(self) -> bool:
        """Whether this is a run of train_text_bilora.py."""
        return "model_name_or_path" in self.record.get("config", {})

    def option(self, name: str) -> Any:
        """Return the value of an option of the run; None if the record has no value.

        An auxiliary's option without a value has the value of the primary's (`STANDS_FOR`).
        """
        config = self.record.get("config", {})
        value = config.get(name)
        if value is None and name in STANDS_FOR:
            return config.get(STANDS_FOR[name])
        return value

    def settings(self) -> dict[str, Any]:
        """Return the options that influence the training result, except seed and method."""
        script = TextConfig if self.is_text else DreamBoothConfig
        method_ignores = methods.option_names() - methods.get(str(self.method)).reads
        names = set(self.record["config"]) - script.changeable_options() - method_ignores
        names -= {"seed", "method"}
        depends_on_heldout = bool(
            self.option("keep_best") or self.option("early_stopping_patience")
        )
        settings: dict[str, Any] = {}
        for name in sorted(names):
            # A removed option is left out if its value had no effect on the training.
            option = removed.OPTIONS.get(name)
            if option is None or not option.is_neutral(self.option(name), depends_on_heldout):
                settings[name] = self.option(name)
        return settings

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; [] if the subject is not a run."""
        if self.folder is None:
            return []
        return read_metrics(self.folder)

    def row(self, metric: str, value: float | None, **fields: Any) -> Row:
        """Return a row of this subject; a value that is not finite becomes None."""
        number = None
        if value is not None and math.isfinite(value):
            number = float(value)
        fields = {"subject": self.label, "group": self.group, "seed": self.seed, **fields}
        return Row(metric=metric, value=number, **fields)


def find(word: str) -> Subject:
    """Open the subject that a word of the command line names, with its weights and their hash.

    Its label is the name of its folder or file. Its group is the title of its method, the method's
    name if this version does not have the method, or its label if no method is recorded. The base
    model has the label "base".
    """
    if word == BASE:
        return Subject(BASE, "base model", BASE, BASE)
    path = Path(word).expanduser()
    if path.is_dir():
        return _folder(path, word)
    if path.is_file():
        name = path.stem
        if path.name == FILE_NAME:  # all exported files have this name
            name = path.resolve().parent.name
        return _file(path, name, word)
    names = [BASE]
    if path.parent.is_dir():
        names += [str(path.parent / neighbor.name) for neighbor in path.parent.iterdir()]
    raise UserError(
        f'there is no run folder and no file "{word}"{did_you_mean(word, names)}: correct the path;'
        " download an adapter of the Hub with hf download first."
    )


def open_run(folder: Path, word: str) -> Subject:
    """Open a run folder as a subject, without its weights.

    Args:
        folder: the run folder.
        word: the folder as the command line names it.
    """
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
    """Open the run, LoRA file or PEFT adapter in a folder.

    A run folder may contain a LoRA file or a PEFT adapter too; it is opened as a run.
    """
    name = folder.resolve().name
    if (folder / RUN).is_file():
        return _with_weights(open_run(folder, word))
    if (folder / FILE_NAME).is_file():
        return _file(folder / FILE_NAME, name, word)
    if (folder / PEFT_FILE).is_file():
        return _peft(folder, name, word)
    raise UserError(
        f"{word} is not a run folder (it has no {RUN}) and has neither {FILE_NAME} nor {PEFT_FILE}:"
        " give another folder, or name a .safetensors file in it."
    )


def _with_weights(subject: Subject) -> Subject:
    """Return the run with its weights and their hash."""
    assert subject.folder is not None
    folder = subject.folder
    status = subject.record.get("status")
    needed = _weight_files(subject)
    for name in needed:
        if not (folder / name).exists():
            raise UserError(
                f'{folder} is a run without {name} (its status is "{status}"): let it finish, or'
                " resume it with --resume_from_checkpoint auto."
            )
    # A run that was resumed and is not finished has the weights of its previous end.
    if not subject.finished:
        logger.warning(
            '%s has the status "%s": its weights are from an earlier export.', folder, status
        )
    if needed == (FILE_NAME,):
        file = folder / FILE_NAME
        return replace(subject, weights=file, digest=hash_of_lora(file))
    if PEFT_FILE in needed:
        return replace(subject, weights=folder, digest=hash_of_peft(folder))
    return replace(subject, weights=folder, digest=hash_of_models(folder, needed))


def _weight_files(subject: Subject) -> tuple[str, ...]:
    """Return the names of the files or folders of weights that a finished run has."""
    has_whole_models = methods.get(str(subject.method)).exports_weights
    if subject.is_text:
        return ("model",) if has_whole_models else (PEFT_FILE, PEFT_CONFIG)
    if not has_whole_models:
        return (FILE_NAME,)
    if subject.option("train_text_encoder"):
        return (_denoiser(subject), *ENCODERS)
    return (_denoiser(subject),)


def _denoiser(subject: Subject) -> str:
    """Return the name of the denoiser of an image run, from its folder or its base model."""
    assert subject.folder is not None
    for name in DENOISERS:
        if (subject.folder / name).is_dir():
            return name
    # No weights are saved so far. A base model that is not on this machine is taken for a UNet.
    base = str(subject.base_model)
    is_flow = folder_of(base) is not None and read_base_model(base).family.flow
    return DENOISERS[is_flow]  # (UNet, transformer)


def _file(path: Path, name: str, word: str) -> Subject:
    """Return a LoRA file as a subject.

    Args:
        path: the file.
        name: label of the subject.
        word: the file or its folder as the command line names it.
    """
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path.name} may run code when it is read: give a .safetensors file.")
    metadata = inspect(path).metadata
    method = metadata.get("bilora.method")
    base_model = None
    if method is not None:
        # In files of other programs, this entry names a checkpoint file, which can't be loaded.
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
    """Return a folder with a PEFT adapter as a subject; see `_file` for the arguments."""
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
