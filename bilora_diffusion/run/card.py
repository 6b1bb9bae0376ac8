"""``README.md`` of a run folder: a model card with the front matter of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCardData

from .. import methods
from ..durable import write_text
from ..lora_names import FILE_NAME
from ..mini import pipeline_dir

MINI = "mini"
# Read in the sources: ComfyUI's weight_decompose (comfy/weight_adapter/base.py; the axis since its
# pull request 7727 of April 2025, the norm still so when pull request 15458 of August 2026 proposed
# to change it), Forge's copy of both (pull request 2856) and, beside it, A1111's
# apply_weight_decompose.
DORA = """\
These weights are DoRA's, whose scales programs read differently:

- diffusers reads {diffusers} as it was trained; of {kohya} it leaves out the scales.
- ComfyUI from 0.3.30 (April 2025) and Forge from May 2025 come close: they divide by the norms of
  the base weights instead of the changed ones.
- A1111, and ComfyUI and Forge before, take the scales along the wrong axis, which spoils the
  images: use another program, or train without `--use_dora`."""
Value = str | int | float | bool | None


def write_card(
    folder: Path,
    *,
    base_model: str,
    method: str,
    dataset: str | None,
    prompts: Sequence[str],
    images: Sequence[Path],
    instance_prompt: str | None = None,
    settings: Mapping[str, Value] | None = None,
    results: Mapping[str, Value] | None = None,
    license: str | None = None,
    vae: str | None = None,
    repo_id: str | None = None,
    weight_name: str = FILE_NAME,
    kohya_name: str | None = None,
    dora: bool = False,
    whole_models: Sequence[str] = (),
) -> Path:
    """Write ``folder/README.md``; only what is given is said.

    Args:
        folder: the run folder.
        base_model: hub id, local folder or "mini". Local paths are not written, only their name.
        method: name of the method, also a tag.
        dataset: hub id, local folder or "mini"; None leaves it out.
        prompts: prompt of each image.
        images: image files inside ``folder``, as many as ``prompts``.
        instance_prompt: what triggers the style or subject.
        settings: rows of the method's table, e.g. ``{"rank": 4, "alpha": 8, "rho": 0.05}``.
        results: rows of the results' table, e.g. ``{"held-out loss": 0.08}``.
        license: identifier the hub knows, e.g. "openrail++".
        vae: hub id of the VAE to load with the pipeline.
        repo_id: hub repository the folder goes to.
        weight_name: file of the LoRA weights for diffusers.
        kohya_name: that for ComfyUI and web UIs, None where there is none.
        dora: whether the weights are DoRA's.
        whole_models: names of the folder's whole models, where it holds these and no adapter.

    Raises:
        ValueError: when an image lies outside ``folder``, or there are not as many as prompts.
    """
    folder = Path(folder)
    base, data = source(base_model), source(dataset) if dataset else None
    gallery = [
        (prompt, quote(path.resolve().relative_to(folder.resolve()).as_posix()))
        for prompt, path in zip(prompts, map(Path, images), strict=True)
    ]
    trained = methods.get(method)
    title = trained.title
    kind = ["full-fine-tuning"] if whole_models else ["lora", "template:sd-lora"]
    meta = _front_matter(base, data, [*kind, method], gallery, instance_prompt, license)
    body = [
        f"# {_name(base)} fine-tuned with {title}",
        f"{title} weights for {code(_name(base))}"
        + (f", trained on {code(_name(data))}." if data else "."),
        trained.summary,
        *_trigger(instance_prompt),
        "## Use",
        _snippet(base, instance_prompt, gallery, vae, _use(repo_id, weight_name, whole_models)),
        *([] if whole_models else _other_programs(base, weight_name, kohya_name, dora)),
        *table("## Method", {"method": title} | dict(settings or {}) | {"method": title}),
        *table("## Results", results or {}),
        *(["## Images"] if gallery else []),
        *(f"![{_escape(prompt)}]({url})\n\n{code(prompt)}" for prompt, url in gallery),
    ]
    text = f"---\n{meta.to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"
    path = folder / "README.md"
    write_text(path, text)
    return path


def source(name: str) -> str:
    """What may be published of a model's or data set's name: not where it lies on this machine."""
    if name == MINI or Path(name).resolve() == pipeline_dir():
        return MINI
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Whether a name can be one on the hub and is no folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _name(source: str) -> str:
    return "bilora_diffusion's miniature" if source == MINI else source


def _front_matter(
    base: str,
    data: str | None,
    kinds: Sequence[str],
    gallery: Sequence[tuple[str, str]],
    instance_prompt: str | None,
    license: str | None,
) -> ModelCardData:
    tags = ["text-to-image", "diffusers", *kinds[:-1]]
    if base != MINI:  # the miniature has SDXL's architecture, but its weights fit nothing else
        tags += ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        base_model=base if is_hub_id(base) else None,
        datasets=[data] if data and is_hub_id(data) else None,
        tags=list(dict.fromkeys([*tags, *kinds])),
        instance_prompt=instance_prompt,
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in gallery] or None,
    )


def _trigger(instance_prompt: str | None) -> list[str]:
    if not instance_prompt:
        return []
    return ["## Trigger words", f"Use {code(instance_prompt)} in the prompt."]


def _snippet(
    base: str,
    instance_prompt: str | None,
    gallery: Sequence[tuple[str, str]],
    vae: str | None,
    use: Sequence[str],
) -> str:
    """Python that makes an image with the weights."""
    prompt = gallery[0][0] if gallery else instance_prompt or "a photo"
    if base == MINI:
        imports = [
            "import torch",
            "from bilora_diffusion.mini import pipeline_dir",
            "from diffusers import DiffusionPipeline",
        ]
        # Its files are in half precision, in which Transformers would load the text encoders and
        # diffusers not the UNet.
        load = ["pipeline = DiffusionPipeline.from_pretrained(pipeline_dir(), dtype=torch.float32)"]
    else:
        name = base if is_hub_id(base) else f"path/to/{base}"
        kinds = "AutoencoderKL, DiffusionPipeline" if vae else "DiffusionPipeline"
        imports = ["import torch", f"from diffusers import {kinds}"]
        load = ["pipeline = DiffusionPipeline.from_pretrained("]
        if vae:
            shown = source(vae)
            shown = shown if is_hub_id(shown) else f"path/to/{shown}"
            call = f"vae = AutoencoderKL.from_pretrained({shown!r}, dtype=torch.float16)"
            load = [call, *load]
        extra = ", vae=vae" if vae else ""
        load += [f"    {name!r}, dtype=torch.float16{extra}", ').to("cuda")']
    use = [
        *use,
        f"image = pipeline({prompt!r}).images[0]",
        'image.save("image.png")',
    ]
    return python_block([*imports, "", *load, *use])


def _other_programs(base: str, weight_name: str, kohya_name: str | None, dora: bool) -> list[str]:
    """Where to put which file in ComfyUI and web UIs, and how strong it acts."""
    if base == MINI:
        file = f"; {code(kohya_name)} shows what a file for them looks like" if kohya_name else ""
        return [f"ComfyUI and A1111 don't know the miniature{file}."]
    if kohya_name is None:
        return [
            f"ComfyUI and A1111 find nothing in {code(weight_name)}; `python -m"
            " bilora_diffusion.export . --to kohya`, in this folder, writes the file for them."
        ]
    name = Path(kohya_name).stem
    text = [
        f"In **ComfyUI**, put {code(kohya_name)} into `models/loras`, and choose it in a *Load"
        " LoRA* node, with a strength of 1.0 for model and clip.",
        f"In **A1111** or **Forge**, put {code(kohya_name)} into `models/Lora`, and write"
        f" {code(f'<lora:{name}:1>')} into the prompt.",
        f"A strength of 1 is what was trained; less, such as 0.7, leaves more of the base model."
        f" {code(weight_name)} is for diffusers: the other programs find nothing in it.",
    ]
    return ["\n".join(f"- {line}" for line in text)] + (
        [DORA.format(diffusers=code(weight_name), kohya=code(kohya_name))] if dora else []
    )


def _use(repo_id: str | None, weight_name: str, whole_models: Sequence[str]) -> list[str]:
    """Python that puts the weights into a loaded pipeline."""
    here, note = repo_id or ".", "" if repo_id else "  # this folder"
    if not whole_models:
        return [f"pipeline.load_lora_weights({here!r}, weight_name={weight_name!r}){note}"]
    return [
        f"pipeline.{name} = type(pipeline.{name}).from_pretrained({here!r}, subfolder={name!r})"
        f".to(pipeline.device, pipeline.dtype){note}"
        for name in whole_models
    ]


def table(heading: str, rows: Mapping[str, Value]) -> list[str]:
    """A heading and a table of two columns; [] where there is nothing to say."""
    given = {key: value for key, value in rows.items() if value is not None}
    if not given:
        return []
    lines = [f"| {_escape(key)} | {_escape(_text(value))} |" for key, value in given.items()]
    return [heading, "\n".join(["| | |", "|---|---|", *lines])]


def _text(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """One line of text as inline code, whatever backticks it has."""
    line = " ".join(text.split())
    marks = fence(line, 1)
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{marks}{pad}{line}{pad}{marks}"


def python_block(lines: Sequence[str]) -> str:
    """Lines of Python as a block, whatever backticks they have."""
    text = "\n".join(lines)
    marks = fence(text, 3)
    return f"{marks}python\n{text}\n{marks}"


def fence(text: str, least: int) -> str:
    """Backticks that the text does not hold, at least so many."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
