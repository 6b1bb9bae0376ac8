"""The number of prompt tokens that a base model reads. Longer prompts are silently cut off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import read_or_refuse
from ..core.files import counted, listed
from .base_model import ANOTHER, FLAG, folder_of, read_base_model
from .families.base import Family

CLIP_TOKENS = 77  # number of tokens that CLIP reads, including the start and end tokens


@dataclass(frozen=True)
class PromptLength:
    """The maximum number of tokens that a base model reads, and a counter of a text's tokens."""

    reader: str  # name of the model, for messages
    limit: int  # maximum number of tokens
    # Returns a text's number of tokens, including the start and end tokens.
    count: Callable[[str], int]

    @classmethod
    def of_tokenizer(cls, reader: str, family: Family, tokenizer: Any) -> PromptLength:
        """Build from a tokenizer of a model family.

        Text that some families put around a prompt is not counted.
        """
        limit = min(family.max_sequence_length, tokenizer.model_max_length)
        return cls(reader, limit, lambda text: len(tokenizer(text).input_ids))

    @classmethod
    def of_pipeline(cls, pipeline: Any, family: Family) -> PromptLength:
        """Build from a loaded pipeline."""
        tokenizers = []
        for name in family.encoders:
            tokenizer = getattr(pipeline, _tokenizer_of(name))
            if tokenizer is not None:  # some pipelines lack one
                tokenizers.append(tokenizer)
        # The last encoder reads the most tokens, such as T5 after CLIP.
        return cls.of_tokenizer(pipeline.name_or_path, family, tokenizers[-1])

    @classmethod
    def of_base_model(cls, name: str) -> PromptLength:
        """Build from the name of a base model, without reading its weights.

        Raises:
            UserError: there is no such model, or its tokenizer can't be read.
        """
        from transformers import AutoTokenizer

        model = read_base_model(name)
        family = model.family
        encoders = []
        for part in family.encoders:
            # Optional parts that the pipeline lacks, such as SD3's T5, are null or [null, null].
            if part not in family.optional or (model.index.get(part) or [None])[0] is not None:
                encoders.append(part)
        subfolder = _tokenizer_of(encoders[-1])
        place = folder_of(name) or name
        tokenizer = read_or_refuse(
            f'the {subfolder} of {FLAG} "{name}"',
            f"check its files and the connection, or {ANOTHER}",
            lambda: AutoTokenizer.from_pretrained(place, subfolder=subfolder),
        )
        return cls.of_tokenizer(name, family, tokenizer)

    @classmethod
    def of_clip(cls) -> PromptLength:
        """Build for CLIP's text encoders, which Stable Diffusion XL uses."""
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer: Any = SimpleTokenizer()
        return cls("CLIP", CLIP_TOKENS, lambda text: len(tokenizer.encode(text)) + 2)

    def warning(self, captions: Mapping[str, str]) -> str | None:
        """Return a sentence about captions that are too long, or None if all are short enough.

        Args:
            captions: captions by the name of their image.
        """
        long_captions = []
        for name, text in captions.items():
            tokens = self.count(text)
            if tokens > self.limit:
                long_captions.append(f"{name} with {tokens}")
        if not long_captions:
            return None
        return (
            f"{len(long_captions)} of {counted(len(captions), 'caption')} have more than the"
            f" {self.limit} tokens that {self.reader} reads ({listed(long_captions)}): shorten"
            " them, since the rest is cut off."
        )


def _tokenizer_of(encoder: str) -> str:
    """Return the name of a text encoder's tokenizer in a pipeline."""
    return encoder.replace("text_encoder", "tokenizer")
