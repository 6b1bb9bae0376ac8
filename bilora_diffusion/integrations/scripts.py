"""Command line, model and rows of the scripts in ``examples/``, whose errors are one sentence."""

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
    """A parser whose errors are one sentence, without argparse's usage of 60 lines."""

    # A command, shown to a user who leaves out a required argument.
    example: str

    def error(self, message: str) -> NoReturn:
        """Turn argparse's message into a `UserError`."""
        example = ""
        if "required" in message:
            example = f" as in `{self.example}`;"
        raise UserError(f"{message}:{example} --help lists every flag.")


def parse(
    options_class: type, args_class: type, words: Sequence[str] | None, example: str
) -> tuple[Any, Any]:
    """Read a command line to a script's own options and those of its trainer.

    Args:
        options_class: dataclass of the script's options.
        args_class: `TrainingArguments` or a subclass, each of whose fields is a flag.
        words: arguments; None for those of the process.
        example: a command, shown to a user who leaves out a required argument.

    Returns:
        An instance of each class.

    Raises:
        UserError: an argument is missing, unknown or unusable.
    """
    words = sys.argv[1:] if words is None else list(words)
    classes: Any = [options_class, args_class]
    parser = _Parser(classes)
    parser.example = example
    if not torch.accelerator.is_available():
        # TRL's default is bf16, which Transformers refuses on a CPU. Of two flags the last holds,
        # so that the user's comes second.
        words = ["--bf16", "False", *words]
    with as_user_error("the arguments of the trainer can't be used", "correct them"):
        options, args, unknown_words = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True
        )
    if unknown_words:
        flags: list[str] = []
        for action in parser._actions:
            flags += action.option_strings
        word = unknown_words[0]
        raise UserError(f"there is no flag {word}{did_you_mean(word, flags)}: --help lists all.")
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} is no folder: give a checkpoint, such as"
            f" {Path(args.output_dir) / 'checkpoint-500'}."
        )
    return options, args


def load_model(name: str, kind: str) -> tuple[Any, Any]:
    """Load a model in fp32, and its tokenizer.

    Args:
        name: hub id, folder, or "smollm2" or "minilm", which come as packages.
        kind: "causal", "seq2seq" or "classification".

    Raises:
        UserError: the model can't be found or read, or is of another kind.
    """
    source = TextSource(TextModelOptions(model_name_or_path=name))
    if source.kind != kind:
        raise UserError(f'"{name}" is a {source.kind} model, and this script trains {kind} ones.')
    loaded = source.load()
    return loaded.model, loaded.tokenizer


def load_rows(name: str) -> Any:
    """Load the rows of a JSONL file, or the training split of a set on the hub or in a folder.

    Raises:
        UserError: they can't be loaded.
    """
    import datasets

    # A folder or an id of the hub; datasets finds the format of its files.
    arguments: dict[str, Any] = {"path": name}
    if Path(name).is_file():
        arguments = {"path": "json", "data_files": name}
    fix = "give a JSONL file, a folder or a set on the hub as --data"
    with as_user_error(f'the data "{name}" can\'t be loaded', fix):
        return datasets.load_dataset(**arguments, split="train")
