"""Make the pages, and the tables in pages, that are made from the code and from results.

python -m docs.make            # writes all; run it after any change of an option or a result
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bilora_diffusion.api import BiLoRAConfig
from bilora_diffusion.config.fields import default_of, option_of, options_of, sections
from bilora_diffusion.config.foreign import FOREIGN
from bilora_diffusion.config.refusals import REFUSED
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.methods import own_options
from bilora_diffusion.run.config import RunConfig
from bilora_diffusion.text.config import TextConfig

from .diffusers_flags import BESIDE_FLAGS, FLAGS, Flag
from .diffusers_flow_flags import FLOW_FLAGS
from .evidence import page as claims_page
from .evidence import table
from .memory import row

FOLDER = Path(__file__).parent
MADE = "<!-- made by python -m docs.make -->"
END = "<!-- end -->"


def options() -> str:
    """Every option of both training scripts, and what does not go together."""
    parts = [
        "# Options",
        MADE,
        "Every option of `train_dreambooth_bilora.py` and `train_text_bilora.py`, as `--help` shows"
        " it. In a recipe (`--config FILE.yaml`) an option has the same name without its dashes;"
        " the command line wins over the recipe. How they compare with diffusers' script stands in"
        " [diffusers.md](diffusers.md).",
        *_script("train_dreambooth_bilora.py", DreamBoothConfig),
        *_script("train_text_bilora.py", TextConfig),
        "## Combinations that are refused",
        "An option that the chosen method does not read stands without complaint, so that runs that"
        " differ only in `--method` can share a recipe.",
        table(
            ("together", "why they are refused", "instead"),
            [(entry.shown(), entry.reason, entry.instead) for entry in REFUSED],
        ),
        "## Options without effect",
        "They are named in one line and set aside: the run is that of the command line without"
        " them.",
        table(("option", "has no effect", "instead"), _idle()),
    ]
    return "\n\n".join(parts) + "\n"


def diffusers() -> str:
    """Every flag of diffusers' script, and what differs."""
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
        _flags(FLAGS),
        "## Its scripts for other models",
        "The scripts for SD3, FLUX.1, FLUX.2, Z-Image, Qwen-Image, Krea 2 and Lumina 2 (of August"
        " 2026) have most of those flags too, some with other defaults, which do not hold here:"
        " 512 pixels, for Krea 2 rank and alpha 32. Beside those they have these:",
        _flags(FLOW_FLAGS),
        "Lumina 2 is trained at the noise levels that its pipeline goes through, with a shift of 6"
        " at 0.77 of noise in the mean. Its script turns the path round and the shift not, so that"
        " there the mean is 0.23; no flag gives these levels here.",
        "These are refused with one sentence, which says what to use instead:",
        table(
            ("flag", "why it is no option here", "instead"),
            [(f"`--{name}`", *sentence) for name, sentence in FOREIGN.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _flags(flags: Iterable[Flag]) -> str:
    here = options_of(DreamBoothConfig.groups)
    body = [
        (
            f"`--{flag.name}`",
            _value(flag.default),
            _value(default_of(here[flag.name])),
            flag.here or "same",
        )
        for flag in flags
    ]
    return table(("flag", "default there", "default here", "what differs"), body)


def evidence() -> str:
    """Each claim of the paper and what was measured of it."""
    parts = [
        "# What is proven",
        MADE,
        "Each claim of the paper, tested on what runs without a GPU: the miniature of SDXL, MiniLM"
        " and SmolLM2. A claim holds where the whole 95 % interval (bootstrap over seeds, paired"
        " with the control; over prompts for CLIP scores) lies where the paper has it, does not"
        " hold where all of it lies elsewhere, and is undecided otherwise. Figures are read from"
        " `results/`; claims and where to look stand in [claims.yaml](claims.yaml).",
        *claims_page(),
    ]
    return "\n\n".join(parts) + "\n"


EXAMPLES = {
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
    "Stable Diffusion 3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
    "Stable Diffusion 3.5 large": "stabilityai/stable-diffusion-3.5-large",
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.2 klein 9B": "black-forest-labs/FLUX.2-klein-base-9B",
    "Z-Image": "Tongyi-MAI/Z-Image",
    "Qwen-Image": "Qwen/Qwen-Image",
    "Krea 2": "krea/Krea-2-Raw",
    "Lumina 2": "Alpha-VLLM/Lumina-Image-2.0",
}
"""Model -> what names it on the hub."""


def readme() -> str:
    """The README, whose table of models is made."""
    body = []
    for model, name in EXAMPLES.items():
        needed = []
        for weights in ("bf16", "nf4"):
            one = memory_of(model, weights)
            # SDXL's encoders only visit the device; those of the others are gone before the step.
            needed.append(f"{max(one['bilora'], one['encoders']) / 1e9:.0f} GB")
        tested = "full size, random weights" if model == "Stable Diffusion XL" else "tiny weights"
        body.append((model, f"`{name}`", *needed, tested))
    heads = ("model", "`--pretrained_model_name_or_path`", "bf16", "NF4", "tested on")
    return _with_table(FOLDER.parent / "README.md", table(heads, body))


def models() -> str:
    """The page of image models, whose table of memory is made."""
    heads = ("model", "weights", "LoRA", "Bi-LoRA", "held by the step", "text encoders, before it")
    columns = ("lora", "bilora", "activations", "encoders")
    body = [
        (model, weights, *(f"{memory_of(model, weights)[c] / 1e9:.1f} GB" for c in columns))
        for model in EXAMPLES
        for weights in ("bf16", "nf4")
    ]
    return _with_table(FOLDER / "models.md", table(heads, body))


@functools.cache
def memory_of(model: str, weights: str) -> dict[str, int]:
    """What the tables say of a model."""
    return row(model, weights, "--gradient_checkpointing")


def _with_table(page: Path, made: str) -> str:
    """A page with what stands between its two marks made anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MADE)
    _, _, after = rest.partition(END)
    return f"{before}{MADE}\n\n{made}\n\n{END}{after}"


def python() -> str:
    """The page of the Python interface, whose table of `BiLoRAConfig` is made."""
    doc = inspect.cleandoc(BiLoRAConfig.__doc__ or "")
    told = doc.partition("Args:\n")[2].partition("\n\n")[0]
    names, texts = (re.split(r"^ {4}(\w+): ", told, flags=re.MULTILINE)[i::2] for i in (1, 2))
    defaults = {field.name: field.default for field in dataclasses.fields(BiLoRAConfig)}
    body = [
        (f"`{name}`", f"`{defaults[name]!r}`", " ".join(text.split()))
        for name, text in zip(names, texts, strict=True)
    ]
    return _with_table(FOLDER / "python.md", table(("field", "default", "what it is"), body))


PAGES = {
    "python.md": python,
    "../README.md": readme,
    "options.md": options,
    "diffusers.md": diffusers,
    "evidence.md": evidence,
    "models.md": models,
}


def _script(name: str, config: type[RunConfig]) -> Iterable[str]:
    yield f"## {name}"
    for title, groups in sections((*config.groups, *own_options())).items():
        yield f"### {title.capitalize()}"
        fields = options_of(groups).values()
        yield table(("option", "default", "what it does"), map(_option, fields))


def _option(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    option, default = option_of(field), default_of(field)
    names = [
        f"--{field.name}",
        *option.aliases,
        *([f"--no_{field.name}"] if default is True else []),
    ]
    sentences = option.help
    if option.choices:
        sentences += f" One of {', '.join(f'`{choice}`' for choice in option.choices)}."
    return ", ".join(f"`{name}`" for name in names), _value(default), sentences


def _idle() -> Iterable[tuple[str, str, str]]:
    """Options that have no effect under one condition, where, and what to do."""
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for config in (DreamBoothConfig, TextConfig):
        for name, field in options_of(config.groups).items():
            for idle in option_of(field).idle:
                rows.setdefault((idle.where, idle.fix), {})[f"`--{name}`"] = None
    return [(", ".join(names), where, fix) for (where, fix), names in rows.items()]


def _value(value: Any) -> str:
    if value is None or value is False or value == []:
        return ""
    return "on" if value is True else f"`{value}`"


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
