"""Models of open_clip for scorers and captioners, by name or from a folder.

Weights are read as safetensors. The one exception is a pretrained tag whose hub repository holds
none: open_clip then reads the file that it ships, with torch's ``weights_only``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from bilora_diffusion.errors import UserError, did_you_mean

from . import pretrained

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")

UNFIT = (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError)
"""What open_clip raises on files that it cannot use."""


@dataclass(frozen=True)
class OpenClipParts:
    """A model of open_clip with what belongs to it.

    Args:
        model: CLIP, CustomTextCLIP or CoCa; float32, eval mode.
        preprocess: image -> (3, h, w), the model's own, without augmentation.
        tokenize: texts -> (n, context), long.
        source: "MODEL/TAG" or the folder's name, for tables.
        architecture: open_clip's name of the model, or the folder's name.
        revision: the tag with the hub's commit or the digest of the file; a digest for local files.
        note: what was changed on loading, or "".
    """

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]
    source: str
    architecture: str
    revision: str
    note: str = ""


def load(scheme: str, source: str, device: str = "cpu") -> OpenClipParts:
    """The model that ``source`` names.

    Args:
        scheme: "open_clip" or "coca"; for messages.
        source: "MODEL/TAG" (a pretrained tag or a local safetensors file; a file is used with
            open_clip's default preprocessing), or a folder with ``open_clip_config.json`` and
            ``open_clip_model.safetensors``.

    Raises:
        UserError: no such model, tag, file or folder, a pickle, or weights that do not fit.
    """
    open_clip = _library(f"{scheme}:{source}")
    architecture, _, tag = source.partition("/")
    if architecture in open_clip.list_models():
        return _by_name(scheme, architecture, tag, device)
    name = f"{scheme}:{source}"
    if source.startswith((".", "/", "~")) or (source and Path(source).is_dir()):
        folder = pretrained.existing_folder(name, source)
        if folder is not None:
            return _by_folder(name, folder, device)
    raise UserError(
        f'"{name}": open_clip has no model "{architecture}"'
        f"{did_you_mean(architecture, open_clip.list_models())} and there is no such folder: "
        "give MODEL/TAG as open_clip.list_pretrained() has it, or a folder."
    )


def _by_name(scheme: str, architecture: str, tag: str, device: str) -> OpenClipParts:
    import open_clip

    name = f"{scheme}:{architecture}/{tag}"
    if open_clip.is_pretrained_cfg(architecture, tag):
        config = open_clip.get_pretrained_cfg(architecture, tag)
        # open_clip only warns when weights trained with QuickGELU meet a model without it (all of
        # OpenAI's with their plain names), and the embeddings are then wrong.
        ours = (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False)
        switch = bool(config.get("quick_gelu")) and not ours
        model, preprocess = _create(name, architecture, tag, device, force_quick_gelu=switch)
        weights = Path(open_clip.download_pretrained(config))  # cached by the line before
        revision = f"{tag}@{pretrained.hub_commit(weights) or pretrained.digest(weights)}"
        note = "QuickGELU is on, as the weights were trained with it." if switch else ""
        source = f"{architecture}/{tag}"
    else:
        weights = _weights_file(name, architecture, tag)
        model, preprocess = _create(name, architecture, str(weights), device)
        revision, note, source = pretrained.digest(weights), "", f"{architecture}/{weights.name}"
    tokenize = _tokenizer(name, architecture)
    return OpenClipParts(model, preprocess, tokenize, source, architecture, revision, note)


def _weights_file(name: str, architecture: str, tag: str) -> Path:
    import open_clip

    path = Path(tag).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = f"one of its tags ({', '.join(tags)}) or " if tags else ""
    if not tag:
        raise UserError(
            f'"{name}" names no weights: add {known}a safetensors file after the slash.'
        )
    if not path.is_file():
        raise UserError(
            f'"{name}": {architecture} has no tag "{tag}"{did_you_mean(tag, tags)} and there is no'
            f" such file: give {known}a safetensors file."
        )
    if path.suffix != ".safetensors":
        raise UserError(
            f'"{name}": {path.name} may be a pickle, which can run code when it is read: convert it'
            " to safetensors."
        )
    return path


def _by_folder(name: str, folder: Path, device: str) -> OpenClipParts:
    if not (folder / CONFIG).is_file():
        raise UserError(
            f'"{name}": the folder has no {CONFIG}: give one that open_clip saved, or'
            " hf:FOLDER for a CLIP of transformers."
        )
    # open_clip itself would go on with a pickle here, and with random weights when there are none.
    weights = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    if not weights:
        raise UserError(f'"{name}": the folder has no {WEIGHTS[0]}{pretrained.pickle_hint(folder)}')
    model, preprocess = _create(name, f"local-dir:{folder}", None, device)
    tokenize = _tokenizer(name, f"local-dir:{folder}")
    label = folder.resolve().name
    return OpenClipParts(model, preprocess, tokenize, label, label, pretrained.digest(weights[0]))


def _create(name: str, model: str, weights: str | None, device: str, **options: Any) -> Any:
    import open_clip
    from safetensors import SafetensorError

    try:
        created: Any = open_clip.create_model_from_pretrained(
            model, pretrained=weights, device=device, **options
        )
    except (*UNFIT, SafetensorError) as error:
        raise UserError(
            f'"{name}" cannot be loaded as a CLIP of open_clip ({pretrained.reason(error)}): check'
            " its name, its files and the connection to the hub."
        ) from error
    created[0].eval()
    return created


def _tokenizer(name: str, model: str) -> Any:
    import open_clip

    try:
        tokenize: Any = open_clip.get_tokenizer(model)
    except UNFIT as error:
        raise UserError(
            f'the tokenizer of "{name}" cannot be loaded ({pretrained.reason(error)}): put its'
            " files beside the weights, or check the connection to the hub."
        ) from error
    if hasattr(tokenize, "tokenizer"):  # one of transformers inside
        pretrained.check_vocabulary(name, tokenize.tokenizer)
    return tokenize


def token_count(tokenize: Any, text: str) -> int:
    """Tokens of a text before truncation, with start and end.

    Raises:
        TypeError: not a tokenizer of open_clip.
    """
    from open_clip.tokenizer import (
        HFTokenizer,
        SigLipTokenizer,
        SimpleTokenizer,
        basic_clean,
        canonicalize_text,
    )

    if isinstance(tokenize, SimpleTokenizer):
        return len(tokenize.encode(text)) + 2
    if isinstance(tokenize, SigLipTokenizer):
        clean = canonicalize_text(basic_clean(text))
        return len(tokenize.tokenizer(clean, verbose=False)["input_ids"])
    if isinstance(tokenize, HFTokenizer):
        clean = tokenize.clean_fn(text)
        if tokenize.tokenizer_mode == "clips":  # adds start, end and class tokens by itself
            bare = tokenize.tokenizer(clean, add_special_tokens=False, verbose=False)
            return len(bare["input_ids"]) + 3
        return len(tokenize.tokenizer(clean, verbose=False)["input_ids"])
    raise TypeError(f"{type(tokenize).__name__} is no tokenizer of open_clip")


def _library(name: str) -> Any:
    """The library ``open_clip``, imported late because that takes seconds.

    Raises:
        UserError: it is not installed; ``name`` is what needs it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f'"{name}" needs open_clip, which is not installed: pip install open_clip_torch'
        ) from error
    return open_clip
