"""Make the pages, and the tables in pages, that are made from the code and from results.

python -m docs.make                     # writes all; run it after any change
python -m docs.make --only options.md   # of an option; what measures the models takes longer
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bilora_diffusion.api import BiLoRAConfig
from bilora_diffusion.config import constraints
from bilora_diffusion.config.run import RunConfig
from bilora_diffusion.core.fields import (
    default_of,
    option_of,
    options_of,
    sections,
)
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.image.families import FAMILIES, family_class
from bilora_diffusion.text.config import TextConfig
from eval.report import table

from . import evidence, memory

FOLDER = Path(__file__).parent
START = "<!-- made by python -m docs.make -->"
END = "<!-- end -->"


def options() -> Iterable[str]:
    """Every option of both training scripts, and what does not go together."""
    yield from _script("train_dreambooth_bilora.py", DreamBoothConfig)
    yield from _script("train_text_bilora.py", TextConfig)
    yield "## Combinations that are refused"
    yield (
        "An option that the chosen method does not read stands without complaint, so that runs that"
        " differ only in `--method` can share a recipe."
    )
    body = [
        (entry.markdown(), entry.reason, entry.instead) for entry in constraints.table().constraints
    ]
    yield table(("together", "why they are refused", "instead"), body)
    yield "## Options without effect"
    yield (
        "They are named in one line and ignored: the run is that of the command line without them."
    )
    yield table(("option", "has no effect", "instead"), _ignored_cases())


def diffusers() -> Iterable[str]:
    """Every flag of diffusers' scripts, and what differs."""
    document = yaml.safe_load((FOLDER / "diffusers_flags.yaml").read_text(encoding="utf-8"))
    yield document["intro"]
    yield "\n".join(f"- {sentence}" for sentence in document["beside"])
    yield _flags(document["sdxl"])
    yield "## Its scripts for other models"
    yield document["others"]
    yield _flags(document["flow"])
    yield document["apart"]
    foreign = constraints.table().foreign["image"].items()
    body = [(f"`--{name}`", *sentence) for name, sentence in foreign]
    yield table(("flag", "why it is no option here", "instead"), body)


def _flags(flags: Mapping[str, Mapping[str, Any]]) -> str:
    our_options = options_of(DreamBoothConfig.groups)
    body = []
    for name, flag in flags.items():
        defaults = _value(flag.get("default")), _value(default_of(our_options[name]))
        body.append((f"`--{name}`", *defaults, flag.get("here", "same")))
    return table(("flag", "default there", "default here", "what differs"), body)


KINDS = [family_class(pipeline, pipeline) for pipeline in FAMILIES]
EXAMPLES = {model: hub_id for family in KINDS for model, hub_id in family.examples.items()}
"""Model -> its id on the hub."""


def readme() -> Iterable[str]:
    """The table of models."""
    body = []
    for family in KINDS:
        for model, hub_id in family.examples.items():
            rows = [memory_of(model, weights) for weights in ("bf16", "nf4")]
            # SDXL's encoders only visit the device; those of the others are gone before the step.
            needed = [f"{max(row['bilora'], row['encoders']) / 1e9:.0f} GB" for row in rows]
            body.append((model, f"`{hub_id}`", *needed, family.tested_on))
    heads = ("model", "`--pretrained_model_name_or_path`", "bf16", "NF4", "tested on")
    yield table(heads, body)


def models() -> Iterable[str]:
    """The table of memory."""
    heads = ("model", "weights", "LoRA", "Bi-LoRA", "held by the step", "text encoders, before it")
    columns = ("lora", "bilora", "activations", "encoders")
    body = [
        (model, weights, *(f"{memory_of(model, weights)[c] / 1e9:.1f} GB" for c in columns))
        for model in EXAMPLES
        for weights in ("bf16", "nf4")
    ]
    yield table(heads, body)


memory_of = functools.cache(
    lambda model, weights: memory.row(model, weights, "--gradient_checkpointing")
)


def python() -> Iterable[str]:
    """The table of `BiLoRAConfig`."""
    doc = inspect.cleandoc(BiLoRAConfig.__doc__ or "")
    args = doc.partition("Args:\n")[2].partition("\n\n")[0]
    names, texts = (re.split(r"^ {4}(\w+): ", args, flags=re.MULTILINE)[i::2] for i in (1, 2))
    defaults = {field.name: field.default for field in dataclasses.fields(BiLoRAConfig)}
    body = [
        (f"`{name}`", f"`{defaults[name]!r}`", " ".join(text.split()))
        for name, text in zip(names, texts, strict=True)
    ]
    yield table(("field", "default", "what it is"), body)


PAGES = {
    "python.md": python,
    "../README.md": readme,
    "options.md": options,
    "diffusers.md": diffusers,
    "evidence.md": evidence.page,
    "models.md": models,
}


def page(name: str) -> str:
    """A page with what stands after its mark, or between its two, made anew."""
    before, _, tail = (FOLDER / name).read_text(encoding="utf-8").partition(START)
    _, end, after = tail.partition(END)
    content = "\n\n".join(PAGES[name]())
    return f"{before}{START}\n\n{content}\n" + (f"\n{end}{after}" if end else "")


def _script(name: str, config: type[RunConfig]) -> Iterable[str]:
    yield f"## {name}"
    for title, groups in sections(config.groups).items():
        yield f"### {title.capitalize()}"
        fields = options_of(groups).values()
        yield table(("option", "default", "what it does"), map(_option, fields))


def _option(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    option, default = option_of(field), default_of(field)
    off = [f"--no_{field.name}"] if default is True else []
    names = ", ".join(f"`{name}`" for name in (f"--{field.name}", *option.aliases, *off))
    choices = ", ".join(f"`{choice}`" for choice in option.choices or ())
    return names, _value(default), option.help + (f" One of {choices}." if choices else "")


def _ignored_cases() -> Iterable[tuple[str, str, str]]:
    """Options that have no effect under one condition, where, and what to do."""
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for config in (DreamBoothConfig, TextConfig):
        for name, field in options_of(config.groups).items():
            for case in option_of(field).ignored:
                rows.setdefault((case.where, case.fix), {})[f"`--{name}`"] = None
    return [(", ".join(names), where, fix) for (where, fix), names in rows.items()]


def _value(value: Any) -> str:
    if value is None or value is False or value == []:
        return ""
    return "on" if value is True else f"`{value}`"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages and the heads of recipes."""
    parser, pages = argparse.ArgumentParser("docs.make"), [*PAGES, "recipes"]
    parser.add_argument("--only", action="append", choices=pages, help="can be given several times")
    for name in parser.parse_args(argv).only or pages:
        if name in PAGES:
            (FOLDER / name).write_text(page(name), encoding="utf-8")
        else:
            for path, model in memory.models(EXAMPLES).items():
                path.write_text(memory.page(path, model), encoding="utf-8")


if __name__ == "__main__":
    main()
