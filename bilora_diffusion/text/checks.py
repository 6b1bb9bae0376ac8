"""What only the text script refuses: its model, task, files and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.notes import said
from ..errors import UserError
from ..files import is_file

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def check_inputs(values: dict[str, Any], given: frozenset[str]) -> None:
    """Refuse a model, task or files that don't make a training set.

    Raises:
        UserError: one sentence with the value and the fix.
    """
    if not values["model_name_or_path"]:
        raise UserError(
            "no model is given: add --model_name_or_path with a hub id or a folder, for example"
            " google-t5/t5-base or smollm2."
        )
    _check_sources(values)
    if None not in (values["warmup_ratio"], values["lr_warmup_steps"]):
        raise UserError(
            f"{said('warmup_ratio', values)} and {said('lr_warmup_steps', values)}: give only one."
        )
    if values["packing"] and values["task_type"] in ("seq2seq", "classification"):
        raise UserError(
            f"--packing is for causal models, and --task_type is {values['task_type']}: drop it."
        )
    if values["packing"] and values["group_by_length"]:
        raise UserError(
            "--group_by_length has no effect with --packing, whose rows are all of one length:"
            " drop one of them."
        )


def _check_sources(values: dict[str, Any]) -> None:
    task, file = values["task"], values["train_file"]
    if not task and not file:
        raise UserError(
            "no text is given: add --task with the name of a task, or --train_file with a file."
        )
    if task and file:
        raise UserError(f'--task "{task}" and --train_file "{file}": give only one.')
    if task:
        from . import catalog

        catalog.get(task)
        for name in ("input_column", "target_column", "validation_file"):
            if values[name]:
                raise UserError(
                    f"{said(name, values)} has no effect on the task {task}, which knows its own:"
                    " drop it, or give --train_file."
                )
    for name in ("train_file", "validation_file"):
        if values[name]:
            _check_file(name, values[name])
    if values["input_column"] and values["input_column"] == values["target_column"]:
        raise UserError(
            f'"{values["input_column"]}" is both --input_column and --target_column: change one.'
        )


def _check_file(name: str, value: str) -> None:
    path = Path(value).expanduser()
    if path.is_dir():
        raise UserError(f'--{name} "{value}" is a folder: give a file.')
    if not path.exists():
        raise UserError(f'--{name} "{value}" does not exist: correct the path.')
    if not is_file(path):
        raise UserError(f'--{name} "{value}" is a device or a pipe: give a regular file.')
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f'--{name} "{value}" is of no known kind: give a file ending in {", ".join(SUFFIXES)}.'
        )
