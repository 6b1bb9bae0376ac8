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

# Metadata that is not copied, since it depends on the tensors or on the file's name.
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

# Entries of PEFT's configuration that change what an adapter's tensors do.
_ACTING_CONFIG = ("base_model_name_or_path", "task_type", "r", "lora_alpha")


class Export(NamedTuple):
    """An exported file or folder."""

    path: Path
    is_new: bool  # False if the same export existed before
    notes: tuple[str, ...] = ()  # lines about it for the terminal


def convert(source: str | Path, to: str, output: str | Path | None = None) -> Path:
    """Write a LoRA file in another format and return its path; see `export_file`."""
    return export_file(source, to, output).path


def export_file(source: str | Path, to: str, output: str | Path | None = None) -> Export:
    """Write a LoRA file in another format; existing files are not replaced.

    Args:
        source: a LoRA file, a folder that PEFT wrote, or a run folder.
        to: "diffusers", "kohya" or "peft".
        output: a .safetensors file, or a folder for a file with the default name. PEFT's format is
            a folder, with a subfolder for each of several models. By default the output is next to
            the source.

    Returns:
        The export, new or existing with the same content.

    Raises:
        UserError: the source can't be read or converted to the format, or the output exists and
            differs.
        TrainingError: the written file differs from the source.
    """
    source = Path(source)
    files = lora_files(source)
    contents = [read(file) for file in files]  # several folders of PEFT, one for each model
    parts: dict[str, Part] = {}
    for file_contents in contents:
        parts |= file_contents.parts
    # Metadata of training are the same in all of them.
    joint_contents = Contents(parts, contents[0].metadata, contents[0].base_model)

    # The folder above several folders gives the name.
    file = files[0] if len(files) == 1 else source / WEIGHTS
    # A file with the default name is named after its folder.
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
            # As the run would have named it.
            name = kohya_file_name(folder)
        output = folder / name
    return write(joint_contents, to, Path(output), stem)


def write(contents: Contents, to: str, target: Path, stem: str) -> Export:
    """Write the layers of a file or checkpoint in a format; see `export_file`.

    Args:
        target: the file or folder.
        stem: name of kohya's file in a folder.
    """
    parts = contents.parts
    metadata = dict(contents.metadata)
    for key in _DERIVED_METADATA:
        metadata.pop(key, None)
    for name in parts:
        if name not in COMPONENTS:
            model = f'"{name}"'
            if name == "model":
                model = "a model that PEFT names"
            if contents.base_model:
                model += f" ({contents.base_model})"
            raise UserError(
                f"The adapter is for {model}, and only those for models of image pipelines are"
                " converted; use it as it is."
            )
    if to == "peft":
        return _write_peft(parts, contents.base_model, metadata, target)
    if to == "kohya":
        refuse_kohya(parts)
    path = target
    if target.suffix in PICKLES:
        raise UserError(f"{target} would be a pickle; name a .safetensors file or a folder.")
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
    """Write PEFT's folder, with a subfolder for each of several models."""
    folders = dict.fromkeys(parts, target)
    if len(parts) > 1:
        folders = {name: target / name for name in parts}
    exists = []  # of each model
    for name, folder in folders.items():
        exists.append(_is_same_export(folder / WEIGHTS, "peft", {name: parts[name]}))
    # An earlier export may have been interrupted between two models.
    if all(exists):
        return Export(target, is_new=False)
    refuse_existing(target, *folders.values())
    for name, folder in folders.items():
        tensors, config = peft_adapter(name, parts[name], base_model)
        # Also compare the layers that a reader finds, not only the tensors.
        check = partial(compare, expected={name: parts[name].layers})
        write_adapter(folder, tensors, config, {**metadata, COMPONENT: name}, check)
    return Export(target, is_new=True)


def _is_same_export(path: Path, to: str, parts: Mapping[str, Part]) -> bool:
    """Test that a file exists that has these layers, and nothing else, in this format.

    Products and DoRA's magnitudes are compared by `compare`; metadata, such as the date, may
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
    """Test that a folder of PEFT has these tensors, for the same model and with the same scale."""
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

    tensors: dict[str, Tensor]  # for the initial base weights of the run
    config: dict[str, Any]  # PEFT's configuration of training
    is_doubled: (
        bool  # the initialization changed the base weights, so the rank is twice that of training
    )

    @property
    def file_config(self) -> dict[str, Any]:
        """PEFT's configuration of a file with the tensors."""
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

    No model is loaded: a checkpoint has the tensors and PEFT's configuration.

    Args:
        folder: folder of the run.
        to: as for `export_file`; None for the formats that the run exports.
        output: as for `export_file`; by default `exports/step-N` in the run folder.
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
                f"{folder} is a run on text, whose adapters have no place in {to}'s format; use"
                " --to peft."
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
        raise UserError(f"{target} is one file; say which by --to diffusers or --to kohya.")
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
    """Read the primaries of a run's checkpoint, by model.

    Raises:
        UserError: the run has none of this step, or what it has is not exported.
    """
    record = runlog.read_run(folder)
    if get(record["method"]).exports_weights:
        raise UserError(
            f"{folder} trains whole models, and checkpoints of these are not exported; let the run"
            " end at the step you want, by --max_train_steps."
        )
    if record["config"].get("use_ema"):
        raise UserError(
            f"{folder} was trained with --use_ema, which was removed, so its averaged weights can't"
            f" be exported: use the version {removed.TAG} in git."
        )
    steps = checkpoint.steps(folder)
    if step not in steps:
        known_steps = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {known_steps}.")
    saved = checkpoint.load(folder / checkpoint.CHECKPOINTS / f"step-{step}")
    primaries = {}
    for model, config in saved.extra["result"]["adapters"].items():
        # adapter -> PEFT's key -> tensor; "whole" has modules trained without an adapter
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
