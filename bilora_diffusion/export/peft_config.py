"""Read and check PEFT's adapter configuration, without importing torch."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError

from ..core.errors import UserError, as_user_error
from ..core.lora_names import ADAPTER_METADATA, CONFIG, WEIGHTS

# Matches expressions with a repeated group or at least four quantifiers: matching them can take
# exponential time.
_COSTLY = re.compile(r"\)[*+{]|([*+{].*){4}", re.DOTALL)


def _pattern(text: object) -> re.Pattern[str]:
    """Compile a regular expression that PEFT matches against the end of a layer's name."""
    # pydantic converts a ValueError to a validation error.
    if not isinstance(text, str) or _COSTLY.search(text):
        raise ValueError("this is not a layer name, or it is an expression with too many repeats")
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"this is not a regular expression: {error}") from error


Pattern = Annotated[re.Pattern[str], BeforeValidator(_pattern)]


class PeftConfig(BaseModel):
    """The fields of an adapter's configuration that are checked, with PEFT's defaults."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: PositiveInt = 8
    lora_alpha: float = 8
    rank_pattern: dict[Pattern, PositiveInt] | None = None
    alpha_pattern: dict[Pattern, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def rank(self, layer: str) -> int:
        """Return a layer's rank."""
        return _first_match(self.rank_pattern, layer, self.r)

    def alpha(self, layer: str) -> float:
        """Return a layer's alpha."""
        return _first_match(self.alpha_pattern, layer, self.lora_alpha)

    def scale(self, layer: str, rank: int) -> float:
        """Return the scale of a layer's B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        if self.use_rslora:
            return self.alpha(layer) / math.sqrt(rank)
        return self.alpha(layer) / rank


def _first_match(patterns: Mapping[re.Pattern[str], Any] | None, layer: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a layer's name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if pattern.match(layer):
            return value
    return default


def read_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json and check the fields of `PeftConfig`."""
    with _explain_config_errors(path):
        fields = json.loads(path.read_text(encoding="utf-8"))
        # Raises an error for lone surrogates, which can't be written.
        json.dumps(fields, ensure_ascii=False).encode()
        _validate(fields)
    return fields


def adapter_config(path: Path, metadata: Mapping[str, str], format: str) -> dict[str, PeftConfig]:
    """Read the configuration of each model from a file's metadata and from PEFT's file next to it.

    Args:
        path: the LoRA file.
        metadata: the file's metadata.
        format: the file's format.

    Raises:
        UserError: the configuration can't be read, is invalid or not for LoRA, or a file in PEFT's
            format has none.
    """
    fields: dict[str, Any] = {}
    config_file = path.with_name(CONFIG)
    is_peft_file = format == "peft" or path.name.startswith(Path(WEIGHTS).stem)
    if is_peft_file and config_file.is_file():
        fields["model"] = read_config(config_file)
    with _explain_config_errors(path):
        entries = json.loads(metadata.get(ADAPTER_METADATA, "{}")).items()
    for key, value in entries:  # such as "unet.r": 4
        model, dot, name = key.rpartition(".")
        fields.setdefault(model if dot else "model", {})[name] = value
    if format == "peft" and "model" not in fields:
        raise UserError(
            f"{path} has PEFT's keys, which do not include alpha, but there is no {CONFIG} next to"
            " it; put the adapter's configuration there."
        )
    with _explain_config_errors(path):
        config = {model: _validate(values) for model, values in fields.items()}
    for model_config in config.values():
        kind = model_config.peft_type
        if kind != "LORA":
            raise UserError(f'{path} is an adapter of type "{kind}"; give a LoRA.')
    return config


def _validate(fields: object) -> PeftConfig:
    """Check the fields of a configuration; raise a ValueError that describes the first error."""
    try:
        return PeftConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step)[:40] for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        reason = f"{place}: {message}, not {reprlib.repr(first['input'])}".removeprefix(": ")
        raise ValueError(reason) from error


def _explain_config_errors(path: Path) -> AbstractContextManager[None]:
    """Return a context manager that converts errors to a `UserError` about the configuration."""
    sentence = f"The adapter configuration of {path} can't be read"
    return as_user_error(sentence, "correct it or write the file again")
