"""Command-line parsing and loading of models and data for the trainer scripts in ``examples/``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from ..core.errors import UserError, as_user_error, did_you_mean
from ..text.models import TextSource
from ..text.options import TextModelOptions


class _Parser(HfArgumentParser):
    """A parser that raises a `UserError` instead of printing 60 lines of usage."""

    # Example command for the message about a missing required argument.
    example: str

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a `UserError`."""
        example = ""
        if "required" in message:
            example = f" as in `{self.example}`;"
        raise UserError(f"{message}:{example} --help lists all flags.")


def parse(
    options_class: type, args_class: type, words: Sequence[str] | None, example: str
) -> tuple[Any, Any]:
    """Parse a command line into a script's options and its trainer's arguments.

    Args:
        options_class: dataclass of the script's options.
        args_class: `TrainingArguments` or a subclass; each field is a flag.
        words: command-line arguments; None uses those of the process.
        example: example command for the message about a missing required argument.

    Returns:
        An instance of each class.

    Raises:
        UserError: an argument is missing, unknown or invalid.
    """
    words = sys.argv[1:] if words is None else list(words)
    classes: Any = [options_class, args_class]
    parser = _Parser(classes)
    parser.example = example
    if not torch.accelerator.is_available():
        # TRL's default is bf16, which Transformers refuses on a CPU. If a flag is repeated, the
        # last one counts, so the user can still set it.
        words = ["--bf16", "False", *words]
    with as_user_error("the arguments of the trainer are invalid", "correct them"):
        options, args, unknown_words = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True
        )
    if unknown_words:
        flags: list[str] = []
        for action in parser._actions:
            flags += action.option_strings
        word = unknown_words[0]
        hint = did_you_mean(word, flags)
        raise UserError(f"there is no flag {word}{hint}: --help lists all flags.")
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} is not a folder: give a checkpoint, such as"
            f" {Path(args.output_dir) / 'checkpoint-500'}."
        )
    return options, args


def load_model(name: str, kind: str) -> tuple[Any, Any]:
    """Load a model in fp32 and its tokenizer.

    Args:
        name: hub id, folder, or a model from a Python package: "smollm2" or "minilm".
        kind: "causal", "seq2seq" or "classification".

    Raises:
        UserError: the model can't be found or read, or is another kind of model.
    """
    source = TextSource(TextModelOptions(model_name_or_path=name))
    if source.kind != kind:
        raise UserError(f'"{name}" is a {source.kind} model, but this script trains {kind} models.')
    text_model = source.load()
    return text_model.model, text_model.tokenizer


def load_rows(name: str) -> Any:
    """Load the rows of a JSONL file, or the training split of a dataset on the hub or in a folder.

    Raises:
        UserError: the data can't be loaded.
    """
    import datasets

    # A folder or a hub id; datasets detects the format of the files.
    arguments: dict[str, Any] = {"path": name}
    if Path(name).is_file():
        arguments = {"path": "json", "data_files": name}
    fix = "give a JSONL file, a folder or a dataset on the hub as --data"
    with as_user_error(f'the data "{name}" can\'t be loaded', fix):
        return datasets.load_dataset(**arguments, split="train")
