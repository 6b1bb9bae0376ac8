"""Make the pages that are made from the code: options.md and diffusers.md.

python -m docs.make            # writes both; run it after any change of an option
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bilora_diffusion.config import combinations
from bilora_diffusion.config.differences import BESIDE_FLAGS, DIFFERENCES
from bilora_diffusion.config.notes import IDLE
from bilora_diffusion.image import options as dreambooth
from bilora_diffusion.text import options as text
from tests.references.diffusers_flags import DEFAULTS

FOLDER = Path(__file__).parent
MADE = "<!-- made by python -m docs.make -->"


def options() -> str:
    """Every option of both training scripts, and what does not go together."""
    parts = [
        "# Options",
        MADE,
        "Every option of `train_dreambooth_bilora.py` and `train_text_bilora.py`, as `--help` shows"
        " it. In a recipe (`--config FILE.yaml`) an option has the same name without its dashes;"
        " the command line wins over the recipe. How they compare with diffusers' script stands in"
        " [diffusers.md](diffusers.md).",
        *_script("train_dreambooth_bilora.py", dreambooth.GROUPS),
        *_script("train_text_bilora.py", text.GROUPS),
        "## Combinations that are refused",
        "An option that the chosen method does not read stands without complaint, so that runs that"
        " differ only in `--method` can share a recipe.",
        _table(("options together", "why they are refused", "instead"), combinations.rows()),
        "## Options without effect",
        "They are named in one line and set aside: the run is that of the command line without"
        " them.",
        _table(("option", "has no effect", "instead"), _idle()),
    ]
    return "\n\n".join(parts) + "\n"


def diffusers() -> str:
    """Every flag of diffusers' script, and what differs."""
    here = {
        field.name: field.default
        for group in dreambooth.GROUPS
        for field in dataclasses.fields(group)
    }
    notes = {entry.flag: entry.here for entry in DIFFERENCES}
    body = [
        (f"`--{name}`", _value(there), _value(here[name]), notes.get(name, "same"))
        for name, there in DEFAULTS.items()
    ]
    parts = [
        "# Coming from diffusers",
        MADE,
        "`train_dreambooth_bilora.py` takes every flag of diffusers'"
        " `train_dreambooth_lora_sdxl.py` (0.42) under its name and in its meaning: what a command"
        " line gives is what happens. Where nothing is given, the paper's Table A8 holds. To train"
        " plain LoRA as that script does, move its command line over and add `--method lora"
        " --init_lora_weights gaussian`, `--lora_alpha` with the rank, and whatever of its defaults"
        " it relied on.",
        "Beside single flags:",
        "\n".join(f"- {sentence}" for sentence in BESIDE_FLAGS),
        _table(("flag", "default there", "default here", "what differs"), body),
    ]
    return "\n\n".join(parts) + "\n"


PAGES = {"options.md": options, "diffusers.md": diffusers}


def _script(name: str, groups: Sequence[Any]) -> Iterable[str]:
    yield f"## {name}"
    for group in groups:
        yield f"### {group._argument_group_name.capitalize()}"
        yield _table(
            ("option", "default", "what it does"),
            [_option(field) for field in dataclasses.fields(group)],
        )


def _option(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    names = [f"--{field.name}", *field.metadata.get("aliases", ())]
    if field.default is True:
        names.append(f"--no_{field.name}")
    sentences = field.metadata["help"].replace("%%", "%")
    if choices := field.metadata.get("choices"):
        sentences += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    default = field.default if field.default_factory is dataclasses.MISSING else None
    return ", ".join(f"`{name}`" for name in names), _value(default), sentences


def _idle() -> Iterable[tuple[str, str, str]]:
    for entry in IDLE:
        yield ", ".join(f"`--{name}`" for name in entry.options), entry.where, entry.fix


def _value(value: Any) -> str:
    if value is None or value is False:
        return ""
    return "on" if value is True else f"`{value}`"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
