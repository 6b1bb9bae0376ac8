"""The primary of a checkpoint, as the run itself would have exported it at that step.

No model is loaded: a checkpoint holds the tensors, and what PEFT must know of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import adapters
from ..adapters import INITIAL, PRIMARY, peft_key
from ..errors import UserError
from ..lora_names import kohya_file_name
from ..methods import get
from ..run import checkpoint, runlog
from ..run.folder import EXPORTS
from .conversion import write
from .layers import part_of
from .metadata import run_facts
from .peft_folder import described, place_adapter, refuse_existing
from .reader import Contents


def export_checkpoint(
    folder: str | Path, step: int, to: str | None = None, output: str | Path | None = None
) -> list[Path]:
    """Write the adapter of a run's checkpoint; with averages, where the run keeps them.

    Args:
        folder: the run folder.
        step: of the checkpoint.
        to: "diffusers", "kohya" or "peft"; by default what the run writes at its end.
        output: see `convert`; by default the folder `exports/step-N` of the run.

    Returns:
        The files, or PEFT's folder.

    Raises:
        UserError: no such run or checkpoint, one of whole models or of an earlier version, or the
            output exists.
        TrainingError: what was written differs from the checkpoint.
    """
    folder = Path(folder)
    record = runlog.read_run(folder)
    saved = _load(folder, step, record)
    config, place = record["config"], Path(output or folder / EXPORTS / f"step-{step}")
    if "model_name_or_path" in config:
        if to not in (None, "peft"):
            raise UserError(
                f"{folder} is a run on text, whose adapters have no place in {to}'s format; use"
                " --to peft."
            )
        return [_text(saved, config, place)]
    contents = _contents(saved, config, step)
    wanted = [to] if to else ["diffusers", *(["kohya"] if config["output_kohya_format"] else [])]
    if to is None and place.suffix == ".safetensors":
        raise UserError(f"{place} is one file; say which by --to diffusers or --to kohya.")
    stem = Path(kohya_file_name(folder, step)).stem
    return [write(contents, kind, place, stem) for kind in wanted]


def _load(folder: Path, step: int, record: Mapping[str, Any]) -> checkpoint.Checkpoint:
    if get(record["method"]).exports_weights:
        raise UserError(
            f"{folder} trains whole models, and checkpoints of these are not exported; let the run"
            " end at the step you want, by --max_train_steps."
        )
    kept = checkpoint.steps(folder)
    if step not in kept:
        there = ", ".join(map(str, kept)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {there}.")
    found = checkpoint.resolve(folder, f"step-{step}")
    assert found is not None
    saved = checkpoint.load(found)
    if not saved.extra.get("result"):
        raise UserError(
            f"{found} was written by a version whose checkpoints can't be exported; go on with it"
            " by --resume_from_checkpoint, and export a later one."
        )
    return saved


def _primaries(saved: checkpoint.Checkpoint) -> dict[str, tuple[dict[str, Tensor], dict, bool]]:
    """By target: the tensors as they act on the base that the run was started from, PEFT's
    configuration of training, and whether something was taken out of the base.
    """
    notes, tensors = saved.extra["result"], dict(saved.tensors)
    if saved.extra["average"] is not None:
        for number, key in enumerate(notes["averaged"]):
            tensors[key] = tensors[f"average/{number}"]

    def of(target: str, adapter: str) -> dict[str, Tensor]:
        start = f"{target}/{adapter}/"
        found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        return {peft_key(key): value for key, value in found.items()}

    return {
        target: (
            {**adapters.portable(of(target, PRIMARY), of(target, INITIAL)), **of(target, "whole")},
            config,
            bool(of(target, INITIAL)),
        )
        for target, config in notes["adapters"].items()
    }


def _contents(saved: checkpoint.Checkpoint, config: Mapping[str, Any], step: int) -> Contents:
    parts = {}
    for target, (tensors, peft, _) in _primaries(saved).items():
        scale = peft["lora_alpha"] / peft["r"]
        if not isinstance(peft["target_modules"], list):
            names = [k.removesuffix(".lora_A.weight") for k in tensors if ".lora_A." in k]
            peft = {**peft, "target_modules": names}
        parts[target] = part_of(target, tensors, peft, scale)
    return Contents(parts, run_facts(config, step), config["pretrained_model_name_or_path"])


def _text(saved: checkpoint.Checkpoint, config: Mapping[str, Any], place: Path) -> Path:
    ((tensors, peft, doubled),) = _primaries(saved).values()
    refuse_existing(place)
    peft = adapters.twice_the_rank(peft) if doubled else peft
    base = str(config["model_name_or_path"])
    place_adapter(place, tensors, described(peft, base, config["task_type"]))
    return place
