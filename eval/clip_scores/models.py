"""Models that score and caption, by the loaders of open_clip and transformers, from safetensors.

    scorer = load("open_clip:ViT-B-32/laion2b_s34b_b79k")
    i2t = (scorer.images(images) * scorer.texts(prompts)).sum(dim=1)      # raw cosine, CLIP I2T

Names of scorers, which embed images and texts in one space: ``embedded`` (the miniature's own),
``open_clip:MODEL/TAG``, ``open_clip:FOLDER`` and ``hf:ID_OR_FOLDER`` (CLIP of transformers).

What those raise passes through, and the command translates it. Refused here is what they would pass
over in silence: pickles, missing weights, a tokenizer without words.
The one exception to safetensors is a tag of open_clip whose hub repository holds none: open_clip
then reads the file that it ships, with torch's ``weights_only``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from bilora_diffusion.errors import UserError, did_you_mean

from ..digests import of_files
from .names import SCORERS

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
SCHEMES = ("embedded", "open_clip", "hf")
NOT_THE_PAPERS = "A small model of this package: its scores cannot be set beside the paper's."

T = TypeVar("T")


@dataclass(frozen=True)
class ModelEntry:
    """A scorer or a captioner: its name as shown, and what identifies it exactly.

    Args:
        name: shown beside every score.
        kind: "open_clip", "transformers", "embedded", "blip" or "retrieval".
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
class LoadedModel:
    """A model with what belongs to it."""

    model: Any
    preprocess: Any
    tokenize: Any
    entry: ModelEntry


def from_open_clip(scheme: str, source: str, device: str = "cpu") -> LoadedModel:
    """A CLIP or CustomTextCLIP.

    Args:
        scheme: before the colon of its name.
        source: "MODEL/TAG", or a folder that open_clip saved.
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
    return LoadedModel(model.eval(), preprocess, tokenize, entry)


def _named(scheme: str, architecture: str, tag: str) -> tuple[ModelEntry, dict[str, Any]]:
    """A model of open_clip's list, and how to create it."""
    import open_clip

    if not open_clip.is_pretrained_cfg(architecture, tag):
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(
            f'{architecture} of open_clip has no tag "{tag}"{did_you_mean(tag, tags)}: give one of'
            f" {', '.join(tags)}, or a folder."
        )
    config = open_clip.get_pretrained_cfg(architecture, tag)
    # open_clip only warns when weights trained with QuickGELU meet a model without it (all of
    # OpenAI's with their plain names), and the embeddings are then wrong.
    has_it = (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False)
    switch = bool(config.get("quick_gelu")) and not has_it
    note = "QuickGELU is on, as the weights were trained with it." if switch else ""
    file = Path(open_clip.download_pretrained(config))
    revision = f"{tag}@{_hub_commit(file) or of_files(file)}"
    entry = ModelEntry(f"{scheme}:{architecture}/{tag}", scheme, architecture, revision, note)
    return entry, {"pretrained": tag, "force_quick_gelu": switch}


def _saved(scheme: str, source: str) -> ModelEntry:
    """A folder of open_clip's; from one without safetensors it would go on with a pickle."""
    import open_clip

    folder = Path(source).expanduser()
    files = [folder / name for name in OPEN_CLIP_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(
            f'"{source}" is not a model of open_clip{did_you_mean(source, open_clip.list_models())}'
            f" and no folder with {OPEN_CLIP_FILES[0]} (a pickle can run code): give MODEL/TAG as"
            " open_clip.list_pretrained() has it, such a folder, or hf:FOLDER for a CLIP of"
            " transformers."
        )
    name = folder.resolve().name
    return ModelEntry(f"{scheme}:{name}", scheme, name, of_files(files[0]))


def from_transformers(
    scheme: str,
    source: str,
    model_class: Any,
    processor_class: Any,
    *,
    revision: str | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """A model and its processor from a hub id or a folder, both from one commit."""
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
        source, commit = folder.resolve().name, of_files(*sorted(folder.glob("*.safetensors")))
    entry = ModelEntry(f"{scheme}:{source}", scheme, source, commit)
    _require_words(entry.name, processor.tokenizer)
    return LoadedModel(
        model.to(device).eval(), processor.image_processor, processor.tokenizer, entry
    )


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


def _hub_commit(file: Path) -> str | None:
    """The commit of a file in the hub's cache; None for any other file."""
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(str(file), None)


class Scorer:
    """Embeds images and texts: (n, d), float32, of unit length, on the CPU.

    Embeddings do not depend on the batch size beyond 1e-6; each text is encoded once.
    """

    def __init__(
        self,
        entry: ModelEntry,
        embed_images: Callable[[Sequence[Image]], Tensor],
        embed_texts: Callable[[Sequence[str]], Tensor],
        is_cut: Callable[[str], bool],
        batch: int = 32,
    ) -> None:
        self.entry, self.is_cut = entry, is_cut
        self._embed_images, self._embed_texts, self._batch = embed_images, embed_texts, batch
        self._known: dict[str, Tensor] = {}

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embeddings of images of any size and mode, (n, d); at least one."""
        parts = in_batches([image.convert("RGB") for image in images], self._batch)
        return torch.cat([self._unit(self._embed_images, part) for part in parts])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, (n, d); at least one."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for part in in_batches(new, self._batch):
            self._known.update(zip(part, self._unit(self._embed_texts, part), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def _unit(self, embed: Callable[[Sequence[T]], Tensor], part: Sequence[T]) -> Tensor:
        # TF32 in convolutions is cudnn's default, and would show the batch size.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            unit = normalize(embed(part).float(), dim=-1).cpu()
        if not unit.isfinite().all():
            raise UserError(
                f'scorer "{self.entry.name}" gives embeddings that are not finite: its weights are'
                " damaged, give another."
            )
        return unit


def load(name: str, *, revision: str | None = None, device: str = "cpu", batch: int = 32) -> Scorer:
    """The scorer called ``name`` (see above).

    Raises:
        UserError: an unknown name, or a model that would score wrongly; it says what to give.
        Exception: of the library that can't load it.
    """
    scheme, colon, source = name.partition(":")
    if scheme not in SCHEMES or (scheme == "embedded") == bool(colon):
        hint = "" if scheme in SCHEMES else did_you_mean(scheme, SCHEMES)
        raise UserError(f'scorer "{name}" is unknown{hint}: give {SCORERS}.')
    if scheme == "hf":
        return _transformers_clip(source, revision, device, batch)
    if revision is not None:
        raise UserError(
            f'revision "{revision}" has no effect on "{name}": drop it, or give hf:ID, whose'
            " revisions are the hub's."
        )
    if scheme == "open_clip":
        return _open_clip(from_open_clip(scheme, source, device), device, batch)
    from bilora_diffusion.mini import scorer as mini

    loaded = from_open_clip(scheme, str(mini.scorer_dir()), device)
    entry = replace(loaded.entry, name=mini.NAME, model=mini.NAME, note=NOT_THE_PAPERS)
    return _open_clip(replace(loaded, entry=entry), device, batch)


def _open_clip(loaded: LoadedModel, device: str, batch: int) -> Scorer:
    model, preprocess, tokenize = loaded.model, loaded.preprocess, loaded.tokenize
    # The empty text's tokens mark a text's ends and its padding; not every model has the length.
    marks = tokenize([""])[0].tolist()

    def embed_images(images: Sequence[Image]) -> Tensor:
        return model.encode_image(torch.stack([preprocess(i) for i in images]).to(device))

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(texts)).to(device))

    def words(text: str, room: int) -> int:
        row = tokenize([text], context_length=room)[0]
        return sum(token not in marks for token in row.tolist())

    def is_cut(text: str) -> bool:
        return words(text, len(marks)) < words(text, 2 * len(marks))

    return Scorer(loaded.entry, embed_images, embed_texts, is_cut, batch)


def _transformers_clip(source: str, revision: str | None, device: str, batch: int) -> Scorer:
    from transformers import CLIPModel, CLIPProcessor

    loaded = from_transformers(
        "hf", source, CLIPModel, CLIPProcessor, revision=revision, device=device
    )
    model, process, tokenize = loaded.model, loaded.preprocess, loaded.tokenize
    length = model.config.text_config.max_position_embeddings

    def embed_images(images: Sequence[Image]) -> Tensor:
        pixels = process(images=list(images), return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixels.to(device)).pooler_output

    def embed_texts(texts: Sequence[str]) -> Tensor:
        # padded to the full length: the same for a text whatever stands beside it in the batch
        tokens = tokenize(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(device)
        features = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return features.pooler_output

    def is_cut(text: str) -> bool:
        return len(tokenize(text, verbose=False)["input_ids"]) > length

    entry = replace(loaded.entry, kind="transformers")
    return Scorer(entry, embed_images, embed_texts, is_cut, batch)


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``items`` in order, ``size`` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
