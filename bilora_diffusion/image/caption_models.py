"""Models that write captions of images, loaded with transformers.

    captioner = load_captioner("florence-community/Florence-2-large", device="cuda")
    texts = captioner.captions(images)

Three kinds: BLIP, Florence-2, and chat models that see images, such as Qwen2.5-VL. Nothing is
sampled, so an image gets the same caption each time. Captions can still depend on the batch size in
16 bits, where sums are rounded differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image, Resampling

from ..core.errors import UserError
from ..core.files import quoted
from ..train.soundness import require_words
from .hub_models import HubModel, find_model, load_processor, load_weights

BLIP, FLORENCE, CHAT = "blip", "florence2", "chat"
# BLIP's authors caption with these beams and this shortest length, start and end included. Three
# beams are also Florence-2's.
BEAMS = 3
MIN_TOKENS = 5
# Maximum tokens of a caption. BLIP's are those of its authors, 30 with the start; it was trained on
# single sentences and repeats itself after them.
MAX_TOKENS = {BLIP: 29, FLORENCE: 256, CHAT: 256}
# Prompts of the models. Florence-2 has fixed words for its tasks, BLIP begins with the prompt.
PROMPTS = {
    FLORENCE: "<DETAILED_CAPTION>",
    CHAT: "Describe this image in one or two sentences: the subject, what it does, what is around"
    " it, and the light. Answer with the description alone.",
}
FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
# A chat model gets no larger images: one of 12 megapixels would be 16,000 tokens of Qwen2.5-VL.
MAX_SIDE = 1024
SUGGESTION = (
    "give BLIP, Florence-2 or a chat model that sees images, such as"
    " florence-community/Florence-2-base or Qwen/Qwen2.5-VL-3B-Instruct"
)
# Generates a caption for each image of a batch.
Generate = Callable[[Sequence[Image]], list[str]]


@dataclass(frozen=True)
class ImageCaptioner:
    """Writes captions, which depend on the image only."""

    model: HubModel
    kind: str  # BLIP, FLORENCE or CHAT
    _generate: Generate

    @torch.inference_mode()
    def captions(self, images: Sequence[Image]) -> list[str]:
        """One caption for each image, as one line; "" where the model writes nothing.

        Args:
            images: RGB, of any size, computed as one batch.
        """
        return [" ".join(text.split()) for text in self._generate(images)]


def load_captioner(
    source: str,
    *,
    label: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ImageCaptioner:
    """Load a captioner.

    Args:
        source: hub id, or a folder with weights in safetensors.
        label: name in messages; by default the source in quotes.
        prompt: what to ask for, see `PROMPTS`; the default is that of the model's kind.
        max_new_tokens: length of a caption at most, see `MAX_TOKENS`.
        device: device of the model.
        dtype: of the weights and the computation.

    Raises:
        UserError: the model writes no captions or none of this length, or the prompt is none of its
            tasks.
        Exception: any error of a library that can't load it.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    label = label or quoted(source)
    if source.lower().startswith("microsoft/florence-2"):
        raise UserError(
            f"{label} needs code of its repository, which is not run: give the same weights for"
            f" transformers, florence-community/{source.rpartition('/')[2]}."
        )
    model = find_model(source, label)
    kind = _kind_of(model)
    if prompt is None:
        prompt = PROMPTS.get(kind)
    max_new_tokens = max_new_tokens or MAX_TOKENS[kind]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_new_tokens >= positions:
        raise UserError(
            f"{label} has no place for {max_new_tokens} new tokens: give fewer than {positions}."
        )
    processor = load_processor(model, AutoProcessor)
    fix = "put its files beside the weights"
    require_words(f"the tokenizer of {label}", processor.tokenizer, None, fix)
    _check_prompt(kind, label, prompt, processor)
    network = load_weights(model, AutoModelForImageTextToText, dtype).to(device)
    builders = {BLIP: _blip, FLORENCE: _florence, CHAT: _chat}
    generate = builders[kind](network, processor, prompt, max_new_tokens)
    return ImageCaptioner(model, kind, generate)


def _kind_of(model: HubModel) -> str:
    """The kind of a captioner.

    Raises:
        UserError: it is none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = model.config.model_type
    if model_type in (BLIP, FLORENCE):
        return model_type
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return CHAT
    raise UserError(
        f"{model.label} is a model of the kind {model_type}, which writes no captions:"
        f" {SUGGESTION}."
    )


def _check_prompt(kind: str, label: str, prompt: str | None, processor: Any) -> None:
    """Refuse a prompt that the model does not understand.

    Raises:
        UserError: it is not a task of Florence-2, or the chat model has no template for it.
    """
    if kind == FLORENCE and prompt not in FLORENCE_TASKS:
        raise UserError(
            f"the prompt {quoted(str(prompt))} is not a task of Florence-2: give"
            f" {', '.join(FLORENCE_TASKS[:-1])} or {FLORENCE_TASKS[-1]}, or a chat model, which"
            " reads any prompt."
        )
    if kind == CHAT and not processor.chat_template:
        raise UserError(
            f"{label} has no chat template, so it can't be asked for a caption: {SUGGESTION}."
        )


def _blip(network: Any, processor: Any, prompt: str | None, max_new_tokens: int) -> Generate:
    """BLIP by beam search; a prompt is the beginning of every caption."""
    from transformers import GenerationConfig

    # These replace the checkpoint's settings, since captions of two models must be comparable.
    network.text_decoder.generation_config = GenerationConfig(
        do_sample=False, num_beams=BEAMS, min_length=MIN_TOKENS, max_new_tokens=max_new_tokens
    )

    def generate(images: Sequence[Image]) -> list[str]:
        inputs = processor.image_processor(images=list(images), return_tensors="pt")
        if prompt:
            inputs.update(processor.tokenizer([prompt] * len(images), return_tensors="pt"))
            inputs.pop("token_type_ids", None)
        tokens = network.generate(**inputs.to(network.device, network.dtype))  # (n, length)
        # Without the first token, the start: some BLIP tokenizers don't know it as a special one.
        return processor.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)

    return generate


def _florence(network: Any, processor: Any, prompt: str | None, max_new_tokens: int) -> Generate:
    """Florence-2 by beam search; the prompt is one of its tasks."""

    def generate(images: Sequence[Image]) -> list[str]:
        texts = [prompt] * len(images)
        inputs = processor(images=list(images), text=texts, return_tensors="pt", padding=True)
        tokens = network.generate(
            **inputs.to(network.device, network.dtype),
            do_sample=False,
            num_beams=BEAMS,
            max_new_tokens=max_new_tokens,
        )
        return processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return generate


def _chat(network: Any, processor: Any, prompt: str | None, max_new_tokens: int) -> Generate:
    """A chat model that sees images, with its own template; the prompt is the user's message."""
    # The answers of a batch begin in one column.
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    # Settings of sampling, of which transformers would warn.
    for name in ("temperature", "top_p", "top_k"):
        setattr(network.generation_config, name, None)

    def generate(images: Sequence[Image]) -> list[str]:
        conversations = []
        for image in images:
            content = [
                {"type": "image", "image": _shrink(image)},
                {"type": "text", "text": prompt},
            ]
            conversations.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        tokens = network.generate(
            **inputs.to(network.device, network.dtype),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )  # (n, prompt and answer)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)

    return generate


def _shrink(image: Image) -> Image:
    """The image, or a smaller copy of at most ``MAX_SIDE`` pixels on its longer side."""
    if max(image.size) <= MAX_SIDE:
        return image
    copy = image.copy()
    copy.thumbnail((MAX_SIDE, MAX_SIDE), Resampling.LANCZOS)
    return copy
