"""The primary of a checkpoint, as the run itself would have exported it at that step.

No model is loaded: a checkpoint holds the tensors, and what PEFT must know of them.
"""

from __future__ import annotations

from pathlib import Path

from .. import adapters
from ..adapters import INITIAL, PRIMARY, peft_key
from ..core.errors import UserError
from ..core.lora_names import kohya_file_name
from ..methods import get
from ..run import checkpoint, runlog
from ..run.folder import EXPORTS
from .conversion import described, place_adapter, refuse_existing, write
from .layers import part_of
from .reader import Contents
from .writer import training_facts


def export_checkpoint(
    folder: str | Path, step: int, to: str | None = None, output: str | Path | None = None
) -> list[Path]:
    """Write the adapter of a run's checkpoint, or its averages where it has them; see `convert`.

    By default it is written as the run does at its end, to the run's folder `exports/step-N`.
    """
    folder = Path(folder)
    record = runlog.read_run(folder)
    config, place = record["config"], Path(output or folder / EXPORTS / f"step-{step}")
    if get(record["method"]).exports_weights:
        raise UserError(
            f"{folder} trains whole models, and checkpoints of these are not exported; let the run"
            " end at the step you want, by --max_train_steps."
        )
    steps = checkpoint.steps(folder)
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {there}.")
    primaries = _primaries(checkpoint.load(folder / checkpoint.CHECKPOINTS / f"step-{step}"))
    if "model_name_or_path" in config:
        if to not in (None, "peft"):
            raise UserError(
                f"{folder} is a run on text, whose adapters have no place in {to}'s format; use"
                " --to peft."
            )
        ((tensors, peft, doubled),) = primaries.values()
        refuse_existing(place)
        peft = adapters.twice_the_rank(peft) if doubled else peft
        base = str(config["model_name_or_path"])
        place_adapter(place, tensors, described(peft, base, config["task_type"]))
        return [place]
    if to is None and place.suffix == ".safetensors":
        raise UserError(f"{place} is one file; say which by --to diffusers or --to kohya.")
    parts = {
        target: part_of(target, tensors, peft, peft["lora_alpha"] / peft["r"])
        for target, (tensors, peft, _) in primaries.items()
    }
    base = config["pretrained_model_name_or_path"]
    contents = Contents(parts, training_facts(config, step), base)
    formats = [to] if to else ["diffusers", *(["kohya"] if config["output_kohya_format"] else [])]
    stem = Path(kohya_file_name(folder, step)).stem
    return [write(contents, kind, place, stem) for kind in formats]


def _primaries(saved: checkpoint.Checkpoint) -> dict[str, tuple[dict, dict, bool]]:
    """By target: the tensors as they act on the base that the run was started from, PEFT's
    configuration of training, and whether something was taken out of the base.
    """
    notes, tensors = saved.extra["result"], dict(saved.tensors)
    if saved.extra["average"] is not None:
        tensors |= {key: tensors[f"average/{n}"] for n, key in enumerate(notes["averaged"])}
    made = {}
    for target, config in notes["adapters"].items():
        primary, initial, whole = (
            {
                peft_key(key.removeprefix(start)): value
                for key, value in tensors.items()
                if key.startswith(start)
            }
            for start in (f"{target}/{adapter}/" for adapter in (PRIMARY, INITIAL, "whole"))
        )
        made[target] = adapters.portable(primary, initial) | whole, config, bool(initial)
    return made
