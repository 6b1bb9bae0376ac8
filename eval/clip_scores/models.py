"""Models that score and caption, by the loaders of open_clip and transformers, from safetensors.

What those raise passes through (:data:`FAILURES`), and the command says it in one sentence. Refused
here is what they would pass over in silence: pickles, missing weights, a tokenizer without words.
The one exception to safetensors is a tag of open_clip whose hub repository holds none: open_clip
then reads the file that it ships, with torch's ``weights_only``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bilora_diffusion.errors import UserError, did_you_mean

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
FAILURES = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError),
    *(ImportError, SafetensorError),
)
"""What the two libraries raise on names and files that they cannot use."""


@dataclass(frozen=True)
class ModelEntry:
    """A scorer or a captioner: its name as shown, and what identifies it exactly.

    Args:
        name: shown beside every score.
        kind: "open_clip", "transformers", "embedded", "blip", "coca" or "retrieval".
        model: architecture, hub id or folder name.
        revision: pretrained tag, commit or digest of the weights.
        note: a sentence that has to stand beside its scores, or "".
    """

    name: str
    kind: str
    model: str
    revision: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it."""

    model: Any
    preprocess: Any
    tokenize: Any
    entry: ModelEntry


def from_open_clip(scheme: str, source: str, device: str = "cpu") -> Loaded:
    """A CLIP, CustomTextCLIP or CoCa.

    Args:
        scheme: before the colon of its name, "open_clip" or "coca".
        source: "MODEL/TAG" (a pretrained tag or a local safetensors file; a file is used with
            open_clip's default preprocessing), or a folder that open_clip saved.
    """
    import open_clip

    architecture, _, tag = source.partition("/")
    if architecture in open_clip.list_models():
        place = architecture
        entry, options = _named(scheme, architecture, tag)
    else:
        place, options = f"local-dir:{Path(source).expanduser()}", {}
        entry = _saved(scheme, source)
    loaded: Any = open_clip.create_model_from_pretrained(place, device=device, **options)
    model, preprocess = loaded
    tokenize: Any = open_clip.get_tokenizer(place)
    _require_words(entry.name, getattr(tokenize, "tokenizer", None))
    return Loaded(model.eval(), preprocess, tokenize, entry)


def _named(scheme: str, architecture: str, tag: str) -> tuple[ModelEntry, dict[str, Any]]:
    """A model of open_clip's list, and how to create it."""
    import open_clip

    if not open_clip.is_pretrained_cfg(architecture, tag):
        file = _weights_file(architecture, tag)
        name = f"{scheme}:{architecture}/{file.name}"
        return ModelEntry(name, scheme, architecture, digest(file)), {"pretrained": str(file)}
    config = open_clip.get_pretrained_cfg(architecture, tag)
    # open_clip only warns when weights trained with QuickGELU meet a model without it (all of
    # OpenAI's with their plain names), and the embeddings are then wrong.
    has_it = (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False)
    switch = bool(config.get("quick_gelu")) and not has_it
    note = "QuickGELU is on, as the weights were trained with it." if switch else ""
    file = Path(open_clip.download_pretrained(config))
    revision = f"{tag}@{_hub_commit(file) or digest(file)}"
    entry = ModelEntry(f"{scheme}:{architecture}/{tag}", scheme, architecture, revision, note)
    return entry, {"pretrained": tag, "force_quick_gelu": switch}


def _weights_file(architecture: str, name: str) -> Path:
    import open_clip

    file = Path(name).expanduser()
    if not file.is_file() or file.suffix != ".safetensors":
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(
            f'{architecture} of open_clip has no tag "{name}"{did_you_mean(name, tags)}, and it is'
            f" no safetensors file (a pickle can run code): give one of"
            f" {', '.join([*tags, 'such files'])}."
        )
    return file


def _saved(scheme: str, source: str) -> ModelEntry:
    """A folder of open_clip's; from one without safetensors it would go on with a pickle."""
    import open_clip

    folder = Path(source).expanduser()
    files = [folder / name for name in OPEN_CLIP_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(
            f'"{source}" is no model of open_clip{did_you_mean(source, open_clip.list_models())}'
            f" and no folder with {OPEN_CLIP_FILES[0]} (a pickle can run code): give MODEL/TAG as"
            " open_clip.list_pretrained() has it, such a folder, or hf:FOLDER for a CLIP of"
            " transformers."
        )
    name = folder.resolve().name
    return ModelEntry(f"{scheme}:{name}", scheme, name, digest(files[0]))


def from_transformers(
    scheme: str,
    source: str,
    model_class: Any,
    processor_class: Any,
    *,
    revision: str | None = None,
    device: str = "cpu",
) -> Loaded:
    """A model and its processor from a hub id or a folder, both from one commit."""
    import torch
    from transformers.utils.hub import cached_file

    folder = Path(source).expanduser()
    if (is_local := folder.is_dir()) and revision is not None:
        raise UserError(f'revision "{revision}" has no effect on the folder "{source}": drop it.')
    place = str(folder) if is_local else source
    config = Path(str(cached_file(place, "config.json", revision=revision)))
    _require_type(f"{scheme}:{source}", config, model_class.config_class.model_type)
    commit = _hub_commit(config)
    model, report = model_class.from_pretrained(
        place,
        revision=commit or revision,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):  # of which transformers makes random numbers
        raise UserError(
            f'"{scheme}:{source}" holds no whole {model_class.__name__} ({missing[0]} is missing):'
            " give another."
        )
    processor = processor_class.from_pretrained(
        place, revision=commit or revision, trust_remote_code=False
    )
    if is_local:
        source, commit = folder.resolve().name, digest(*sorted(folder.glob("*.safetensors")))
    entry = ModelEntry(f"{scheme}:{source}", scheme, source, commit)
    _require_words(entry.name, processor.tokenizer)
    return Loaded(model.to(device).eval(), processor.image_processor, processor.tokenizer, entry)


def _require_type(name: str, config: Path, kind: str) -> None:
    """Refuse another model, which transformers would load with random numbers for its weights."""
    other = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if other != kind:
        raise UserError(f'"{name}" is a model of type {other}, not {kind}: give another.')


def _require_words(name: str, tokenizer: Any) -> None:
    """Refuse the tokenizer that transformers makes, without a word, where its files are missing."""
    if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f'the tokenizer of "{name}" knows no words: put its files beside the weights.'
        )


def digest(*files: Path) -> str:
    """The first 12 hex digits of the SHA-256 of a file, or of the digests of several."""
    sums = []
    for path in files:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    whole = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    return whole[:12]


def _hub_commit(file: Path) -> str | None:
    """The commit of a file in the hub's cache; None for any other file."""
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(str(file), None)
