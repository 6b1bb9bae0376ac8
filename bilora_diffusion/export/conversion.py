"""LoRA files of any format from another, and from a run's checkpoint.

Each is read back and compared before it gets its name.
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

# Metadata that follows from the tensors or from the new file's name.
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

# Entries of PEFT's configuration that decide what the tensors do.
_ACTING_CONFIG = ("base_model_name_or_path", "task_type", "r", "lora_alpha")


class Export(NamedTuple):
    """A file or folder in the format that was asked for."""

    path: Path
    is_new: bool  # False where the same export was there already


def convert(source: str | Path, to: str, output: str | Path | None = None) -> Path:
    """Write a LoRA file in another format, see `export_file`; return the path of what it wrote."""
    return export_file(source, to, output).path


def export_file(source: str | Path, to: str, output: str | Path | None = None) -> Export:
    """Write a LoRA file in another format; neither it nor another file is replaced.

    Args:
        source: a LoRA file, a folder that PEFT wrote, or a run folder.
        to: "diffusers", "kohya" or "peft".
        output: a .safetensors file, or a folder for a file of the usual name in it; for PEFT, whose
            format is a folder, that folder, with one in it for each model where there are several.
            By default it lies beside the source.

    Returns:
        What was written, or the same export where it is there already.

    Raises:
        UserError: the source can't be read or has no place in the format, or the output exists and
            is something else.
        TrainingError: what was written differs from the source.
    """
    source = Path(source)
    files = lora_files(source)
    contents = [read(file) for file in files]  # several of PEFT's folders, one model each
    parts: dict[str, Part] = {}
    for file_contents in contents:
        parts |= file_contents.parts
    # Of several folders the one above them gives the name.
    file = files[0] if len(files) == 1 else source / WEIGHTS
    # A LoRA is called as its folder where its file has the name that all have.
    has_common_name = file.name in (FILE_NAME, WEIGHTS)
    stem = Path(kohya_file_name(file.parent if has_common_name else file.with_suffix(""))).stem
    if output is None:
        folder = source if source.is_dir() else source.parent
        name = f"{stem}-peft" if to == "peft" else f"{stem}-{to}.safetensors"
        if to == "kohya" and file.name == FILE_NAME:
            # As the run itself would have written it.
            name = kohya_file_name(folder)
        output = folder / name
    # Metadata of training is alike in all of them.
    merged = Contents(parts, contents[0].metadata, contents[0].base_model)
    return write(merged, to, Path(output), stem)


def write(contents: Contents, to: str, target: Path, stem: str) -> Export:
    """Write what a file is to hold; see `convert`.

    Args:
        contents: read from a file or a checkpoint.
        target: the file or folder.
        stem: what kohya's file is called in a folder.
    """
    parts = contents.parts
    metadata = {
        key: value for key, value in contents.metadata.items() if key not in _DERIVED_METADATA
    }
    for name in parts:
        if name not in COMPONENTS:
            model = "a model that PEFT names" if name == "model" else f'"{name}"'
            base = f" ({contents.base_model})" if contents.base_model else ""
            raise UserError(
                f"The adapter is for {model}{base}, and only those for models of image pipelines"
                " are converted; use it as it is."
            )
    if to == "peft":
        folders = {name: target / name if len(parts) > 1 else target for name in parts}
        if all(
            _is_same_export(folder / WEIGHTS, to, {name: parts[name]})
            for name, folder in folders.items()
        ):
            return Export(target, is_new=False)
        refuse_existing(target, *folders.values())
        for name, folder in folders.items():
            tensors, config = peft_adapter(name, parts[name], contents.base_model)
            # Beside the bytes, what a reader makes of them is compared.
            check = partial(compare, expected={name: parts[name].layers})
            write_adapter(folder, tensors, config, metadata | {COMPONENT: name}, check)
        return Export(target, is_new=True)
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
    write_file(path, parts, to, file_metadata(parts, contents.base_model, path.stem, metadata))
    return Export(path, is_new=True)


def _is_same_export(path: Path, to: str, parts: Mapping[str, Part]) -> bool:
    """Test that a file is there which holds these layers, and nothing else, in this format.

    As when a file is read back, products and DoRA's magnitudes are compared: metadata, such as the
    date, may differ.
    """
    if not path.is_file():
        return False
    try:
        file = inspect(path)
        if file.format != to or file.auxiliary or file.other_tensors:
            return False
        compare(path, {name: part.layers for name, part in parts.items()})
    except (UserError, TrainingError):  # unreadable, or other layers or values
        return False
    return True


def _is_same_text_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> bool:
    """Test that a folder of PEFT's holds these tensors, to act on this model by this scale."""
    weights_file, config_file = folder / WEIGHTS, folder / CONFIG
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

    tensors: dict[str, Tensor]  # as they act on the base that the run was started from
    config: dict[str, Any]  # PEFT's, of training
    is_doubled: bool  # an init took something out of the base, so the rank is twice training's


def export_checkpoint(
    folder: str | Path, step: int, to: str | None = None, output: str | Path | None = None
) -> list[Path]:
    """Write the adapter of a run's checkpoint, see `export_step`; return the paths."""
    return [export.path for export in export_step(folder, step, to, output)]


def export_step(
    folder: str | Path, step: int, to: str | None = None, output: str | Path | None = None
) -> list[Export]:
    """Write the adapter of a run's checkpoint, or its averages where it has them, as `export_file`.

    No model is loaded: a checkpoint holds the tensors, and what PEFT must know of them. By default
    it is written as the run does at its end, to the run's folder `exports/step-N`.
    """
    folder = Path(folder)
    record = runlog.read_run(folder)
    config, target = record["config"], Path(output or folder / EXPORTS / f"step-{step}")
    if get(record["method"]).exports_weights:
        raise UserError(
            f"{folder} trains whole models, and checkpoints of these are not exported; let the run"
            " end at the step you want, by --max_train_steps."
        )
    steps = checkpoint.steps(folder)
    if step not in steps:
        known_steps = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {known_steps}.")
    primaries = _primaries(checkpoint.load(folder / checkpoint.CHECKPOINTS / f"step-{step}"))
    if "model_name_or_path" in config:
        if to not in (None, "peft"):
            raise UserError(
                f"{folder} is a run on text, whose adapters have no place in {to}'s format; use"
                " --to peft."
            )
        (primary,) = primaries.values()  # a text run trains one model
        peft_config = primary.config
        if primary.is_doubled:
            peft_config = adapters.twice_the_rank(peft_config)
        base_model = str(config["model_name_or_path"])
        peft_config = text_config(peft_config, base_model, config["task_type"])
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


def _primaries(saved: checkpoint.Checkpoint) -> dict[str, Primary]:
    """The primaries by model."""
    notes, tensors = saved.extra["result"], dict(saved.tensors)
    if saved.extra["average"] is not None:
        # An average takes the place of the weights that it is of, as at the end of a run.
        for number, key in enumerate(notes["averaged"]):
            tensors[key] = tensors[f"average/{number}"]
    primaries = {}
    for model, config in notes["adapters"].items():
        # adapter -> PEFT's key -> tensor; "whole" are modules that are trained as they are
        of_adapter: dict[str, dict[str, Tensor]] = {PRIMARY: {}, INITIAL: {}, "whole": {}}
        for adapter, of_key in of_adapter.items():
            start = f"{model}/{adapter}/"
            for key, value in tensors.items():
                if key.startswith(start):
                    of_key[peft_key(key.removeprefix(start))] = value
        initial = of_adapter[INITIAL]
        acting = adapters.portable(of_adapter[PRIMARY], initial) | of_adapter["whole"]
        primaries[model] = Primary(acting, config, bool(initial))
    return primaries
