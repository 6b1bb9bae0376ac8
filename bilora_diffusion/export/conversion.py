"""Convert LoRA files to another format, and export them from a run's checkpoint.

A file is written under a temporary name, read back and compared, then renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import adapters
from ..adapters import INITIAL, PRIMARY, peft_key
from ..core import removed
from ..core.errors import TrainingError, UserError
from ..core.lora_names import (
    ADAPTER_METADATA,
    COMPONENTS,
    CONFIG,
    FILE_NAME,
    WEIGHTS,
    kohya_file_name,
)
from ..methods import get
from ..run import checkpoint, runlog
from ..run.folder import EXPORTS
from ..train.soundness import PICKLES
from .formats import Part, part_of, peft_adapter
from .lorafile import inspect, lora_files
from .reader import COMPONENT, Contents, compare, read, require_equal
from .writer import (
    file_metadata,
    refuse_existing,
    refuse_kohya,
    text_config,
    training_facts,
    write_adapter,
    write_file,
)

# Metadata entries that are not copied, since they depend on the tensors or on the file's name.
_DERIVED_METADATA = (
    "format",
    ADAPTER_METADATA,
    COMPONENT,
    "sshs_model_hash",
    "sshs_legacy_hash",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_output_name",
)

# Entries of PEFT's configuration that change the effect of an adapter's tensors.
_ACTING_CONFIG = ("base_model_name_or_path", "task_type", "r", "lora_alpha")


class Export(NamedTuple):
    """An exported file or folder."""

    path: Path
    is_new: bool  # False if an equal export existed before
    notes: tuple[str, ...] = ()  # lines about the export for the terminal


def convert(source: str | Path, to: str, output: str | Path | None = None) -> Path:
    """Write a LoRA file in another format and return its path; see `export_file`."""
    return export_file(source, to, output).path


def export_file(source: str | Path, to: str, output: str | Path | None = None) -> Export:
    """Write a LoRA file in another format; existing files are not replaced.

    Args:
        source: a LoRA file, a PEFT folder, or a run folder.
        to: "diffusers", "kohya" or "peft".
        output: a .safetensors file, or a folder for a file with the default name. PEFT's format is
            a folder, with one subfolder per model if there are several. By default the output is in
            the source folder, or next to the source file.

    Returns:
        The new export, or an existing one with the same content.

    Raises:
        UserError: the source can't be read or converted to the format, or the output exists and
            differs.
        TrainingError: the written file differs from the source, or every B of a PEFT adapter to
            write is zero.
    """
    source = Path(source)
    files = lora_files(source)
    contents = [read(file) for file in files]  # several if PEFT has one folder per model
    parts: dict[str, Part] = {}
    for file_contents in contents:
        parts |= file_contents.parts
    # The training metadata is the same in all files.
    joint_contents = Contents(parts, contents[0].metadata, contents[0].base_model)

    # The output for several PEFT folders is named after the folder that contains them.
    file = files[0] if len(files) == 1 else source / WEIGHTS
    # The output for a file with a default name is named after the file's folder.
    named_path = file.with_suffix("")
    if file.name in (FILE_NAME, WEIGHTS):
        named_path = file.parent
    stem = Path(kohya_file_name(named_path)).stem
    if output is None:
        folder = source if source.is_dir() else source.parent
        name = f"{stem}-{to}.safetensors"
        if to == "peft":
            name = f"{stem}-peft"
        elif to == "kohya" and file.name == FILE_NAME:
            # The name that the run itself uses.
            name = kohya_file_name(folder)
        output = folder / name
    return write(joint_contents, to, Path(output), stem)


def write(contents: Contents, to: str, target: Path, stem: str) -> Export:
    """Write the layers of a file or checkpoint in a format; see `export_file`.

    Args:
        contents: the layers and their metadata.
        to: "diffusers", "kohya" or "peft".
        target: the file or folder to write.
        stem: name, without suffix, of a kohya file that is written into a folder.
    """
    parts = contents.parts
    metadata = dict(contents.metadata)
    for key in _DERIVED_METADATA:
        metadata.pop(key, None)
    for name in parts:
        if name not in COMPONENTS:
            model = f'"{name}"'
            if name == "model":
                model = "a model that the file does not name"
            if contents.base_model:
                model += f" ({contents.base_model})"
            raise UserError(
                f"The adapter is for {model}, but only adapters for the models of image pipelines"
                " can be converted; use the file without conversion."
            )
    if to == "peft":
        return _write_peft(parts, contents.base_model, metadata, target)
    if to == "kohya":
        refuse_kohya(parts)
    path = target
    if target.suffix in PICKLES:
        raise UserError(f"{target} would be a pickle file; name a .safetensors file or a folder.")
    if target.suffix != ".safetensors" or target.is_dir():
        path = target / (FILE_NAME if to == "diffusers" else f"{stem}.safetensors")
    if _is_same_export(path, to, parts):
        return Export(path, is_new=False)
    if path.exists():
        raise UserError(f"{path} exists; name another --output, or delete it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = {name: part.layers for name, part in parts.items()}
    entries = file_metadata(parts, contents.base_model, path.stem, metadata)
    write_file(path, parts, to, entries, expected)
    return Export(path, is_new=True)


def _write_peft(
    parts: Mapping[str, Part], base_model: str, metadata: Mapping[str, str], target: Path
) -> Export:
    """Write a PEFT folder, with one subfolder per model if there are several."""
    folders = dict.fromkeys(parts, target)
    if len(parts) > 1:
        folders = {name: target / name for name in parts}
    exists = []  # one entry per model
    for name, folder in folders.items():
        exists.append(_is_same_export(folder / WEIGHTS, "peft", {name: parts[name]}))
    # An earlier export may have been interrupted between two models.
    if all(exists):
        return Export(target, is_new=False)
    refuse_existing(target, *folders.values())
    for name, folder in folders.items():
        tensors, config = peft_adapter(name, parts[name], base_model)
        # Besides the tensors, compare the layers that a reader finds.
        check = partial(compare, expected={name: parts[name].layers})
        write_adapter(folder, tensors, config, {**metadata, COMPONENT: name}, check)
    return Export(target, is_new=True)


def _is_same_export(path: Path, to: str, parts: Mapping[str, Part]) -> bool:
    """Return whether a file exists in this format that has exactly these layers.

    `compare` compares the products B @ A and DoRA's magnitudes. Metadata, such as the date, may
    differ.
    """
    if not path.is_file():
        return False
    try:
        if inspect(path).format != to:
            return False
        compare(path, {name: part.layers for name, part in parts.items()})
    except (UserError, TrainingError):  # unreadable, or other layers or values
        return False
    return True


def _is_same_text_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> bool:
    """Return whether a PEFT folder has these tensors, for the same model and with equal scale."""
    weights_file = folder / WEIGHTS
    config_file = folder / CONFIG
    if not weights_file.is_file() or not config_file.is_file():
        return False
    expected = {adapters.peft_path(key): value for key, value in tensors.items()}
    try:
        require_equal(weights_file, load_file(weights_file), expected)
        stored_config = json.loads(config_file.read_bytes())
        return all(stored_config[name] == config[name] for name in _ACTING_CONFIG)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, TrainingError):
        return False


class Primary(NamedTuple):
    """The primary of one model in a checkpoint."""

    tensors: dict[str, Tensor]  # for the original base weights, with modules trained in full
    config: dict[str, Any]  # PEFT's configuration in training
    # Whether the tensors have twice the trained rank, since the initialization changed the base
    # weights.
    is_doubled: bool

    @property
    def file_config(self) -> dict[str, Any]:
        """PEFT's configuration for a file with these tensors."""
        if self.is_doubled:
            return adapters.twice_the_rank(self.config)
        return self.config


def export_checkpoint(
    folder: str | Path, step: int, to: str | None = None, output: str | Path | None = None
) -> list[Path]:
    """Write the adapter of a run's checkpoint and return the paths; see `export_step`."""
    return [export.path for export in export_step(folder, step, to, output)]


def export_step(
    folder: str | Path, step: int, to: str | None = None, output: str | Path | None = None
) -> list[Export]:
    """Write the adapter of a run's checkpoint.

    No model is loaded, since a checkpoint has the tensors and PEFT's configuration.

    Args:
        folder: run folder.
        step: step of the checkpoint.
        to: format, as in `export_file`; None for the formats that the run exports. A text run
            has only "peft".
        output: as in `export_file`; by default `exports/step-N` in the run folder.
    """
    folder = Path(folder)
    record = runlog.read_run(folder)
    config = record["config"]
    target = Path(output or folder / EXPORTS / f"step-{step}")
    primaries = primaries_of_step(folder, step)
    # A run on text.
    if "model_name_or_path" in config:
        if to not in (None, "peft"):
            raise UserError(
                f"{folder} is a text run, and {to}'s format can't store its adapter; use --to peft."
            )
        (primary,) = primaries.values()  # a text run has one model
        base_model = str(config["model_name_or_path"])
        peft_config = text_config(primary.file_config, base_model, config["task_type"])
        if _is_same_text_adapter(target, primary.tensors, peft_config):
            return [Export(target, is_new=False)]
        refuse_existing(target)
        write_adapter(target, primary.tensors, peft_config)
        return [Export(target, is_new=True)]
    if to is None and target.suffix == ".safetensors":
        raise UserError(
            f"{target} is a single file; choose its format with --to diffusers or --to kohya."
        )
    parts = {}
    for name, primary in primaries.items():
        scale = primary.config["lora_alpha"] / primary.config["r"]  # s = alpha / rank
        parts[name] = part_of(name, primary.tensors, primary.config, scale)
    base_model = config["pretrained_model_name_or_path"]
    contents = Contents(parts, training_facts(config, step), base_model)
    formats = [to or "diffusers"]
    if to is None and config["output_kohya_format"]:
        formats.append("kohya")
    stem = Path(kohya_file_name(folder, step)).stem
    return [write(contents, file_format, target, stem) for file_format in formats]


def primaries_of_step(folder: Path, step: int) -> dict[str, Primary]:
    """Read the primary of each model from a run's checkpoint.

    Raises:
        UserError: the run has no checkpoint of this step, the checkpoint is damaged, or the run's
            checkpoints can't be exported.
    """
    record = runlog.read_run(folder)
    if get(record["method"]).exports_weights:
        raise UserError(
            f"{folder} trains whole models, whose checkpoints can't be exported; let the run end at"
            " the step that you want with --max_train_steps."
        )
    if record["config"].get("use_ema"):
        raise UserError(
            f"{folder} was trained with the removed option --use_ema, so its averaged weights can't"
            f" be exported: use the version {removed.TAG} in git."
        )
    steps = checkpoint.steps(folder)
    if step not in steps:
        known_steps = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {known_steps}.")
    saved = checkpoint.load(folder / checkpoint.CHECKPOINTS / f"step-{step}")
    primaries = {}
    for model, config in saved.extra["result"]["adapters"].items():
        # Adapter -> PEFT's key -> tensor; "whole" has the modules that are trained in full.
        adapter_tensors: dict[str, dict[str, Tensor]] = {PRIMARY: {}, INITIAL: {}, "whole": {}}
        for adapter, tensors_by_key in adapter_tensors.items():
            prefix = f"{model}/{adapter}/"
            for key, value in saved.tensors.items():
                if key.startswith(prefix):
                    tensors_by_key[peft_key(key.removeprefix(prefix))] = value
        initial = adapter_tensors[INITIAL]
        portable = adapters.portable(adapter_tensors[PRIMARY], initial)
        primaries[model] = Primary(portable | adapter_tensors["whole"], config, bool(initial))
    return primaries
