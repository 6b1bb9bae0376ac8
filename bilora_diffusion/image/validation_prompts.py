"""Settings of single validation prompts, from mappings of a recipe or in kohya's form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config.command_line import CommandLine
from ..config.options import StepOptions
from ..core.errors import UserError, placed
from ..core.fields import (
    check,
    like,
    option,
    options_of,
)
from ..core.files import quoted
from ..core.values import (
    GUIDANCES,
    SAMPLER_STEPS,
    SIDES,
    STRENGTHS,
)

FOREIGN: dict[str, tuple[str, str]] = dict.fromkeys(
    ("g", "ss", "cn", "i", "ctr", "rcfg", "fs"),
    ("of kohya's settings it is left out", "write `--l` for guidance, or drop it"),
)
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class PromptOptions:
    """Settings of a validation prompt; the run's where they are None."""

    section: ClassVar[str] = "a validation prompt"

    negative_prompt: str | None = option(None, "What guidance leads away from.", aliases=("--n",))
    seed: int | None = like(StepOptions, "seed", default=None, aliases=("--d",))
    width: int | None = option(None, "In pixels.", range=SIDES, aliases=("--w",))
    height: int | None = option(None, "In pixels.", range=SIDES, aliases=("--h",))
    guidance: float | None = option(None, "Guidance.", range=GUIDANCES, aliases=("--l",))
    steps: int | None = option(None, "Of the sampler.", range=SAMPLER_STEPS, aliases=("--s",))
    strength: float | None = option(None, "Of the adapter.", range=STRENGTHS, aliases=("--am",))


def read_prompts(
    given: Sequence[str | dict[str, Any]],
) -> tuple[list[str], list[dict[str, Any]]]:
    """The text of each prompt, and the settings that it has, by the names of `PromptOptions`.

    Args:
        given: mappings of a recipe, and texts in the form of kohya's sd-scripts
            (``line_to_prompt_dict``), such as ``a dog --n blurry --w 832``.

    Raises:
        UserError: a setting that is unknown, malformed or out of its range, or no prompt.
    """
    parser, prompts, settings = CommandLine([PromptOptions], "", "", FOREIGN), [], []
    for number, item in enumerate(given, start=1):
        with placed(f"in number {number} of --validation_prompts, "):
            prompt, words = _split(item)
            settings.append(parser.explicit(words))
            if len(settings[-1]) < len(words):
                raise UserError("a setting stands twice: keep one.")
            check(options_of([PromptOptions]), {**parser.defaults(), **settings[-1]})
        prompts.append(prompt)
    return prompts, settings


def _split(item: str | dict[str, Any]) -> tuple[str, list[str]]:
    """A prompt and the words of its settings."""
    if isinstance(item, str):
        text, *flags = _FLAG.split(item)
        prompt = text.strip() if flags else text
        given = [(n.lower(), v) for n, v in ((*f.split(None, 1), "")[:2] for f in flags)]
    else:
        prompt = item.get("prompt")
        given = [(n, v) for n, v in item.items() if v is not None and n != "prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("there is no prompt: put one text before its settings.")
    for name, value in given:
        if not isinstance(value, str):
            raise UserError(f"{quoted(name)} is {quoted(value)}: give a single value.")
    return prompt, [f"--{name}={value}" for name, value in given]
