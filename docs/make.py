"""Generate the pages and tables that are made from the code and from recorded results.

python -m docs.make                     # all, and the recipes' memory; run it after any change
python -m docs.make --only options.md   # enough after a change of an option, and faster
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
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
from eval.results.report import table

from . import evidence, flatness_tables, gpu, guidance_tables, memory, tables

FOLDER = Path(__file__).parent
# Marks around a generated section of a page. The last section of a page may have no end mark.
START = "<!-- {section}: made by python -m docs.make -->"
END = "<!-- end -->"
KINDS = [family_class(pipeline, pipeline) for pipeline in FAMILIES]
# Model -> its id on the Hugging Face Hub
EXAMPLES = {model: hub_id for family in KINDS for model, hub_id in family.examples.items()}
# Models in the README's table; models.md lists all of them.
README_MODELS = ("Stable Diffusion XL", "FLUX.1-dev", "FLUX.2 klein 9B", "Z-Image")


def options() -> Iterable[str]:
    """Generate options.md: all options, refused combinations, and options without effect."""
    yield from _script("train_dreambooth_bilora.py", DreamBoothConfig)
    yield from _script("train_text_bilora.py", TextConfig)
    yield "## Combinations that are refused"
    yield (
        "An option that the chosen method does not read is accepted, so runs that differ only"
        " in `--method` can share a recipe."
    )
    rows = []
    for constraint in constraints.table().constraints:
        rows.append((constraint.markdown(), constraint.reason, constraint.instead))
    yield table(("options", "why they are refused", "instead"), rows)
    yield "## Options without effect"
    yield (
        "A run prints one line about each of these options and ignores it: the result is the same"
        " as without the option."
    )
    yield table(("option", "has no effect", "instead"), _ignored_cases())
    yield from diffusers_flags()


def diffusers_flags() -> Iterable[str]:
    """Generate the tables of diffusers' flags: their defaults, ours, and the differences."""
    document = yaml.safe_load((FOLDER / "diffusers_flags.yaml").read_text(encoding="utf-8"))
    yield "## Flags of diffusers' scripts"
    yield document["intro"]
    yield "\n".join(f"- {sentence}" for sentence in document["general"])
    yield _flags(document["sdxl"])
    yield "### Flags of the scripts for other models"
    yield document["others"]
    yield _flags(document["flow"])
    yield "### Flags that are refused"
    rows = []
    for name, (reason, instead) in constraints.table().foreign["image"].items():
        rows.append((f"`--{name}`", reason, instead))
    yield table(("flag", "why it is not an option here", "instead"), rows)


def _flags(flags: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the flags that diffusers' scripts and this project share."""
    our_options = options_of(DreamBoothConfig.groups)
    rows = []
    for name, flag in flags.items():
        their_default = _value(flag.get("default"))
        our_default = _value(default_of(our_options[name]))
        rows.append((f"`--{name}`", their_default, our_default, flag.get("here", "same")))
    return table(("flag", "default in diffusers", "default here", "what differs"), rows)


def readme() -> Iterable[str]:
    """Generate the README's table of models (`README_MODELS`)."""
    recipes = {model: path.stem for path, model in memory.recipe_models(EXAMPLES).items()}
    rows = []
    for family in KINDS:
        for model in family.examples:
            if model not in README_MODELS:
                continue
            sizes = []
            for weights in ("bf16", "nf4"):
                memory_parts = memory_of(model, weights)
                # The text encoders and the training step never share the device: SDXL's encoders
                # are moved to the CPU before training, those of other models are deleted.
                needed_bytes = max(memory_parts["bilora"], memory_parts["encoders"])
                sizes.append(f"{needed_bytes / 1e9:.0f} GB")
            tested_on = gpu.tested_on(model, family.tested_on)
            rows.append((model, f"`{recipes[model]}`", *sizes, tested_on))
    heads = ("model", "`--config`", "bf16", "NF4", "tested on")
    yield table(heads, rows)


def image_models() -> Iterable[str]:
    """Generate the table of image models, with the layers that are adapted by default."""
    recipes = {model: path.stem for path, model in memory.recipe_models(EXAMPLES).items()}
    rows = []
    for family in KINDS:
        for model, hub_id in family.examples.items():
            counts = memory.parameter_counts(model)
            recipe = f"`{recipes[model]}`" if model in recipes else ""
            tokens = f"{family.max_sequence_length}" if family.flow else ""
            weighting = f"`{family.weighting}`" if family.flow else ""
            rows.append(
                (
                    model,
                    f"`{hub_id}`",
                    recipe,
                    f"{counts.denoiser / 1e9:.2f} B",
                    f"{counts.layers}",
                    f"{counts.trained / 1e6:.1f} M",
                    tokens,
                    weighting,
                    gpu.tested_on(model, family.tested_on),
                )
            )
    heads = (
        "model",
        "`--pretrained_model_name_or_path`",
        "`--config`",
        "parameters",
        "adapted layers",
        f"parameters at rank {memory.RANK}",
        "`--max_sequence_length`",
        "`--weighting_scheme`",
        "tested on",
    )
    yield table(heads, rows)


def readers() -> Iterable[str]:
    """Generate the table of programs that read the LoRA files of flow-matching models."""
    rows = []
    for family in KINDS:
        if family.flow:
            loads_files = hasattr(getattr(diffusers, family.pipeline), "load_lora_weights")
            is_read = family.comfyui is not None
            rows.append((family.title, _yes_or_no(loads_files), _yes_or_no(is_read)))
    yield table(("model", "diffusers", "ComfyUI"), rows)


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def models() -> Iterable[str]:
    """Generate the memory table of the image models."""
    rows = []
    for model in EXAMPLES:
        for weights in ("bf16", "nf4"):
            memory_parts = memory_of(model, weights)
            sizes = []
            for part in ("lora", "bilora", "activations", "encoders"):
                sizes.append(f"{memory_parts[part] / 1e9:.1f} GB")
            rows.append((model, weights, *sizes))
    heads = ("model", "weights", "LoRA", "Bi-LoRA", "held by the step", "text encoders, before it")
    yield table(heads, rows)


@functools.cache
def memory_of(model: str, weights: str) -> dict[str, int]:
    """Compute a model's memory for the tables, in bytes, with gradient checkpointing."""
    return memory.step_memory(model, weights, "--gradient_checkpointing")


def python() -> Iterable[str]:
    """Generate the table of fields of `BiLoRAConfig` from its docstring."""
    doc = inspect.cleandoc(BiLoRAConfig.__doc__ or "")
    args = doc.partition("Args:\n")[2].partition("\n\n")[0]
    # The list is: text before the first name, then names and descriptions in turn.
    words = re.split(r"^ {4}(\w+): ", args, flags=re.MULTILINE)
    defaults = {field.name: field.default for field in dataclasses.fields(BiLoRAConfig)}
    rows = []
    for name, text in zip(words[1::2], words[2::2], strict=True):
        rows.append((f"`{name}`", f"`{defaults[name]!r}`", " ".join(text.split())))
    yield table(("field", "default", "description"), rows)


# Page -> section name -> function that yields the paragraphs of this section
PAGES: dict[str, dict[str, Callable[[], Iterable[str]]]] = {
    "python.md": {"fields": python},
    "../README.md": {"models": readme},
    "options.md": {"options": options},
    "../results/README.md": {"claims": evidence.page},
    "models.md": {"image models": image_models, "memory": models, "gpu": gpu.measured_tables},
    "files.md": {"readers": readers},
    "results.md": {
        "samples": tables.samples,
        "guided target": guidance_tables.guided_target,
        "without guidance": guidance_tables.guided_target_without_guidance,
        "guidance": guidance_tables.guidance,
        "strengths": guidance_tables.strengths,
        "hold weights": guidance_tables.hold_weights,
        "rules": tables.rules,
        "methods": tables.methods,
        "radii": tables.radii,
        "together": tables.together,
        "flatness": flatness_tables.flatness,
        "flat minima": flatness_tables.flat_minima,
        "texts": tables.texts,
        "step cost": tables.step_cost,
        "against diffusers": tables.against_diffusers,
    },
}


def page(name: str) -> str:
    """Return the text of a page with each generated section replaced by new content.

    Raises:
        ValueError: The page lacks the start mark of a section.
    """
    text = (FOLDER / name).read_text(encoding="utf-8")
    for section, make in PAGES[name].items():
        start = START.format(section=section)
        before, mark, tail = text.partition(start)
        if not mark:
            raise ValueError(f"{name} has no section {section}")
        # The marks stay; the text between them is replaced.
        _, end, after = tail.partition(END)
        content = "\n\n".join(make())
        text = f"{before}{start}\n\n{content}\n"
        if end:
            text += f"\n{end}{after}"
    return text


def _script(name: str, config: type[RunConfig]) -> Iterable[str]:
    """Generate the options of a script, one table per section."""
    yield f"## {name}"
    for title, groups in sections(config.groups).items():
        yield f"### {title.capitalize()}"
        rows = [_option(field) for field in options_of(groups).values()]
        yield table(("option", "default", "description"), rows)


def _option(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    """Return an option's row: names, default and help text."""
    option = option_of(field)
    default = default_of(field)
    flags = [f"--{field.name}", *option.aliases]
    if default is True:
        flags.append(f"--no_{field.name}")
    text = option.help
    if option.choices:
        choices = ", ".join(f"`{choice}`" for choice in option.choices)
        text += f" One of {choices}."
    return ", ".join(f"`{flag}`" for flag in flags), _value(default), text


def _ignored_cases() -> Iterable[tuple[str, str, str]]:
    """Return rows of (options without effect, condition, fix), one row per condition and fix."""
    # (condition, fix) -> option names; a dict keeps each name once, in order
    names_by_case: dict[tuple[str, str], dict[str, None]] = {}
    for config in (DreamBoothConfig, TextConfig):
        for name, field in options_of(config.groups).items():
            for case in option_of(field).ignored:
                names = names_by_case.setdefault((case.where, case.fix), {})
                names[f"`--{name}`"] = None
    rows = []
    for (where, fix), names in names_by_case.items():
        rows.append((", ".join(names), where, fix))
    return rows


def _value(value: Any) -> str:
    """Return a default as Markdown; "" for an option that is off or has no default."""
    if value is None or value is False or value == []:
        return ""
    return "on" if value is True else f"`{value}`"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the generated pages, and the memory figures in the head comments of recipes."""
    pages = [*PAGES, "recipes"]
    parser = argparse.ArgumentParser("docs.make")
    parser.add_argument("--only", action="append", choices=pages, help="can be given several times")
    for name in parser.parse_args(argv).only or pages:
        if name in PAGES:
            (FOLDER / name).write_text(page(name), encoding="utf-8")
        else:
            for path, model in memory.recipe_models(EXAMPLES).items():
                path.write_text(memory.updated_recipe(path, model), encoding="utf-8")


if __name__ == "__main__":
    main()
