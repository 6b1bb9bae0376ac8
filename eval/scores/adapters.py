"""The adapters of a comparison: what the arguments name, and their weights in a pipeline.

adapters = parse(["base", "runs/lora", "Ours=runs/bilora", "owner/name:file.safetensors"])
with applied(pipeline, adapters[1]): ...
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from bilora_diffusion import methods
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import resolve
from bilora_diffusion.run import runlog
from bilora_diffusion.train.task import precision

from ..provenance import without_paths
from .adapter_fit import require_fit
from .adapter_sources import BASE, Source, find

_NAME = "compared"


@dataclass(frozen=True)
class Adapter:
    """One adapter, the base model alone, or the models of full fine-tuning.

    Args:
        label: unique; what tables show.
        kind: "base", "run", "file" or "hub".
        source: the argument, without machine paths.
        method: of training, where known.
        digest: of the weights, 64 hexadecimal digits; "" for the base model.
        weights: LoRA file, or the folder of whole models; None for the base model.
        base_model: what it was trained on, where known.
        slug: a folder name, the same for the same weights whatever their label.
    """

    label: str
    kind: str
    source: str
    method: str | None
    digest: str
    weights: Path | None
    base_model: str | None
    slug: str


def parse(arguments: Sequence[str]) -> list[Adapter]:
    """The adapters that the arguments name, in order; each may be given as LABEL=ARGUMENT.

    Without a label it is called by its method's title, with its folder's name where two would be
    called alike.

    Raises:
        UserError: nothing is there, it holds no weights, or a label is given twice.
    """
    pairs = [_split(argument) for argument in arguments]
    given = Counter(label for label, _ in pairs if label is not None)
    if repeated := [label for label, count in given.items() if count > 1]:
        raise UserError(f'the label "{repeated[0]}" is given twice: give each adapter its own.')
    sources = [find(argument) for _, argument in pairs]
    labels = _labels([label for label, _ in pairs], sources)
    return [
        Adapter(
            label=label,
            kind=source.kind,
            source=without_paths(argument),
            method=source.method,
            digest=source.digest,
            weights=source.weights,
            base_model=source.base_model,
            slug=slug(_family(source), source.digest),
        )
        for label, (_, argument), source in zip(labels, pairs, sources, strict=True)
    ]


def slug(text: str, digest: str = "") -> str:
    """A folder or file name for ``text``: letters, digits and dashes, and the digest's start."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-")
    return "-".join(part for part in (plain or "x", digest[:8]) if part)


def _split(argument: str) -> tuple[str | None, str]:
    label, equals, rest = argument.partition("=")
    if not equals or "/" in label or Path(argument).expanduser().exists():
        return None, argument
    label, rest = " ".join(label.split()), rest.strip()
    if not label or not rest:
        raise UserError(f'"{argument}" lacks a label or an adapter: write LABEL=ADAPTER.')
    return label, rest


def _labels(given: Sequence[str | None], sources: Sequence[Source]) -> list[str]:
    titles = [label or _title(source) for label, source in zip(given, sources, strict=True)]
    shared = Counter(titles)
    named = [
        title if label or shared[title] == 1 or title == source.name else f"{title} ({source.name})"
        for label, title, source in zip(given, titles, sources, strict=True)
    ]
    taken = {label for label in given if label}
    unique = []
    for label, name in zip(given, named, strict=True):
        number, free = 1, name
        while label is None and free in taken:
            number += 1
            free = f"{name} {number}"
        taken.add(free)
        unique.append(free)
    return unique


def _title(source: Source) -> str:
    if source.method is None:
        return source.name
    known = source.method in methods.names()
    return methods.get(source.method).title if known else source.method


def _family(source: Source) -> str:
    """What the weights are, whatever they are called: a name may change and its images stay."""
    return _title(source) if source.method or source.kind == BASE else source.kind


def require_one_base(adapters: Sequence[Adapter], given: str | None = None) -> str:
    """The base model that all adapters belong to.

    Args:
        given: the user's own word; it says where the adapters do not, and may name a local copy
            of the hub's model that they name.

    Raises:
        UserError: two belong to different models, or nobody says which.
    """
    said: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.base_model is not None:
            said.setdefault(_same(adapter.base_model), adapter)
    if len(said) > 1:
        one, other = list(said.values())[:2]
        raise UserError(
            f'"{one.label}" was trained on {one.base_model} and "{other.label}" on'
            f" {other.base_model}: compare adapters of one base model."
        )
    if given is None:
        if not said:
            raise UserError("no adapter says which base model it belongs to: give --base_model.")
        return str(next(iter(said.values())).base_model)
    for name, adapter in said.items():
        is_copy = Path(given).is_dir() and "/" in name and not Path(name).is_dir()
        if name != _same(given) and not is_copy:
            raise UserError(
                f'"{adapter.label}" was trained on {adapter.base_model}, not on {given}: drop'
                " --base_model, or give that."
            )
    return given


def _same(base_model: str) -> str:
    where = Path(resolve(base_model)).expanduser()
    return str(where.resolve()) if where.is_dir() else base_model


@contextmanager
def applied(pipeline: Any, adapter: Adapter, scale: float = 1.0) -> Iterator[None]:
    """Within the context the pipeline has the adapter's weights; afterwards, its own exactly.

    Args:
        pipeline: an SDXL pipeline without an adapter.
        scale: factor of the adapter's change of the weights.

    Raises:
        UserError: the file does not fit the pipeline, or holds an auxiliary.
    """
    if adapter.weights is None:
        yield
    elif adapter.weights.is_dir():
        with _models(pipeline, adapter, adapter.weights, scale):
            yield
    else:
        with _lora(pipeline, adapter.weights, scale):
            yield


@contextmanager
def _lora(pipeline: Any, file: Path, scale: float) -> Iterator[None]:
    if any(pipeline.get_list_adapters().values()):
        raise RuntimeError("the pipeline has an adapter already, which would be lost")
    require_fit(pipeline, file)
    verbosity = diffusers_logging.get_verbosity()
    try:
        try:
            diffusers_logging.set_verbosity_error()  # it warns of each model without an adapter
            pipeline.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=_NAME,
                use_safetensors=True,
                local_files_only=True,
            )
            pipeline.set_adapters([_NAME], [scale])
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} can't be loaded into the base model ({reason}).") from error
        finally:
            diffusers_logging.set_verbosity(verbosity)
        for model in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
            model.eval()  # diffusers adds layers in training mode, in which a dropout acts
            model.requires_grad_(False)
        yield
    finally:
        pipeline.unload_lora_weights()


@contextmanager
def _models(pipeline: Any, adapter: Adapter, folder: Path, scale: float) -> Iterator[None]:
    if scale != 1.0:
        raise UserError(
            f'"{adapter.label}" holds whole models, which have no scale: leave the scale at 1,'
            f" not {scale:g}."
        )
    own = {
        name: (getattr(pipeline, name), getattr(pipeline, name).device)
        for name in runlog.WHOLE_MODELS
        if (folder / name).is_dir()
    }
    try:
        for name, (model, device) in own.items():
            trained = _load(type(model), folder / name, precision(model))
            _require_same_shapes(adapter, name, model, trained)
            model.to("cpu")  # two of SDXL's UNets need not share a device's memory
            setattr(pipeline, name, trained.to(device))
        yield
    finally:
        for name, (model, device) in own.items():
            setattr(pipeline, name, model.to(device))


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    try:
        model = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} can't be loaded ({reason}): train again.") from error
    return model.eval().requires_grad_(False)


def _require_same_shapes(adapter: Adapter, name: str, model: Any, trained: Any) -> None:
    shapes, found = (
        {key: tuple(value.shape) for key, value in one.state_dict().items()}
        for one in (model, trained)
    )
    if shapes != found:
        key = next(iter(sorted(set(shapes.items()) ^ set(found.items()))))[0]
        raise UserError(
            f'the {name} of "{adapter.label}" does not fit the base model, as in {key}: give the'
            " base model that it was trained on."
        )


__all__ = ["BASE", "Adapter", "applied", "parse", "require_one_base", "slug"]
