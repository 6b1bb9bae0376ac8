"""Whether what is given as text is text, and what is given as a place can be one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import is_text, quoted

PLACES = (
    *("dataset_name", "instance_data_dir", "class_data_dir", "validation_dataset"),
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"),
    *("model_name_or_path", "tokenizer_name", "train_file", "validation_file"),
    *("config", "output_dir", "cache_dir", "resume_from_checkpoint"),
)
"""Options that may name a file or a folder."""


def check_texts(values: Mapping[str, Any]) -> None:
    """Refuse bytes of a command line that are not UTF-8, and names that no file can have.

    They would pass every other check, and fail where they are tokenized, written or opened.

    Raises:
        UserError: it names the option and its value.
    """
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and ("\0" in text or not is_text(text)):
                raise UserError(
                    f"--{name} {quoted(text)} is no text, it has a NUL or bytes that are not"
                    " UTF-8: write it anew."
                )
    for name in PLACES:
        if isinstance(values.get(name), str):
            _check_place(name, values[name])


def _check_place(name: str, value: str) -> None:
    try:
        Path(value).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "there is no such user"
        raise UserError(
            f"--{name} {quoted(value)} can't be opened ({reason}): correct it, or its permissions."
        ) from error
