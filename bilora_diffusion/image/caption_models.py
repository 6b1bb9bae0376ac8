"""Models that write captions of images, loaded with transformers.

    captioner = load_captioner("florence-community/Florence-2-large", device="cuda")
    texts = captioner.captions(images)

There are three kinds: BLIP, Florence-2, and vision chat models such as Qwen2.5-VL. Decoding is
deterministic, so an image gets the same caption each time. In half precision, the caption can still
depend on the batch size, which changes how sums are rounded.
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
# Number of beams of BLIP and Florence-2, and minimum number of tokens of BLIP's captions, including
# the start token and the prompt but not the end token. Both are from BLIP's COCO configuration;
# Florence-2's authors use three beams too.
BEAMS = 3
MIN_TOKENS = 5
# Maximum number of new tokens of a caption. BLIP's limit is the default of its authors' `generate`,
# 30 with the start token. BLIP was trained on single sentences and repeats itself in longer texts.
MAX_TOKENS = {BLIP: 29, FLORENCE: 256, CHAT: 256}
# Default prompts. Florence-2 has a fixed word for each of its tasks. BLIP's captions begin with the
# prompt, so there is none by default.
PROMPTS = {
    FLORENCE: "<DETAILED_CAPTION>",
    CHAT: "Describe this image in one or two sentences: the subject, what it does, what is around"
    " it, and the light. Answer with the description alone.",
}
FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
# Maximum side in pixels of a chat model's images. For Qwen2.5-VL, an image of 12 megapixels would
# be about 15,500 tokens.
MAX_SIDE = 1024
SUGGESTION = (
    "give BLIP, Florence-2 or a vision chat model, such as"
    " florence-community/Florence-2-base or Qwen/Qwen2.5-VL-3B-Instruct"
)
# A function that generates a caption for each image of a batch.
Generate = Callable[[Sequence[Image]], list[str]]


@dataclass(frozen=True)
class ImageCaptioner:
    """A model that writes captions with deterministic decoding."""

    model: HubModel
    kind: str  # BLIP, FLORENCE or CHAT
    _generate: Generate

    @torch.inference_mode()
    def captions(self, images: Sequence[Image]) -> list[str]:
        """Return a one-line caption for each image, "" if the model writes nothing.

        Args:
            images: RGB images of any size, which are captioned as one batch.
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
        label: the model's name in messages; by default the source in quotes.
        prompt: prompt for the model; the default of the model's kind is in `PROMPTS`.
        max_new_tokens: maximum length of a caption; the default is in `MAX_TOKENS`.
        device: device of the model.
        dtype: dtype of the weights and of the computation.

    Raises:
        UserError: the model is not a captioner that can be used here, its weights are pickles or
            incomplete, its tokenizer has no words, its captions can't be this long, or it does not
            understand the prompt.
        Exception: any error of a library that can't load the model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    label = label or quoted(source)
    if source.lower().startswith("microsoft/florence-2"):
        raise UserError(
            f"{label} needs code from its repository, which is not run: give the same weights in"
            f" transformers' format, florence-community/{source.rpartition('/')[2]}."
        )
    model = find_model(source, label)
    kind = _kind_of(model)
    if prompt is None:
        prompt = PROMPTS.get(kind)
    max_new_tokens = max_new_tokens or MAX_TOKENS[kind]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_new_tokens >= positions:
        raise UserError(
            f"{label} can't write {max_new_tokens} new tokens: give fewer than {positions}."
        )
    processor = load_processor(model, AutoProcessor)
    fix = "put its files next to the weights"
    require_words(f"the tokenizer of {label}", processor.tokenizer, None, fix)
    _check_prompt(kind, label, prompt, processor)
    network = load_weights(model, AutoModelForImageTextToText, dtype).to(device)
    builders = {BLIP: _blip, FLORENCE: _florence, CHAT: _chat}
    generate = builders[kind](network, processor, prompt, max_new_tokens)
    return ImageCaptioner(model, kind, generate)


def _kind_of(model: HubModel) -> str:
    """Return the kind of a captioner: BLIP, FLORENCE or CHAT.

    Raises:
        UserError: the model is not a captioner.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = model.config.model_type
    if model_type in (BLIP, FLORENCE):
        return model_type
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return CHAT
    raise UserError(
        f"{model.label} is a model of type {model_type}, which writes no captions: {SUGGESTION}."
    )


def _check_prompt(kind: str, label: str, prompt: str | None, processor: Any) -> None:
    """Check that a model understands its prompt.

    Raises:
        UserError: the prompt is not a task of Florence-2, or the chat model has no chat template.
    """
    if kind == FLORENCE and prompt not in FLORENCE_TASKS:
        raise UserError(
            f"the prompt {quoted(str(prompt))} is not a task of Florence-2: give"
            f" {', '.join(FLORENCE_TASKS[:-1])} or {FLORENCE_TASKS[-1]}, or a chat model, which"
            " reads any prompt."
        )
    if kind == CHAT and not processor.chat_template:
        raise UserError(f"{label} has no chat template, so it can't take a prompt: {SUGGESTION}.")


def _blip(network: Any, processor: Any, prompt: str | None, max_new_tokens: int) -> Generate:
    """Return a function that captions images with BLIP, by beam search.

    Captions begin with the prompt, if there is one.
    """
    from transformers import GenerationConfig

    # Replace the checkpoint's settings, so that the captions of two models are comparable.
    network.text_decoder.generation_config = GenerationConfig(
        do_sample=False, num_beams=BEAMS, min_length=MIN_TOKENS, max_new_tokens=max_new_tokens
    )

    def generate(images: Sequence[Image]) -> list[str]:
        inputs = processor.image_processor(images=list(images), return_tensors="pt")
        if prompt:
            inputs.update(processor.tokenizer([prompt] * len(images), return_tensors="pt"))
            inputs.pop("token_type_ids", None)
        tokens = network.generate(**inputs.to(network.device, network.dtype))  # (n, length)
        # Drop the start token, which some BLIP tokenizers don't treat as a special token.
        return processor.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)

    return generate


def _florence(network: Any, processor: Any, prompt: str | None, max_new_tokens: int) -> Generate:
    """Return a function that captions images with Florence-2, by beam search.

    The prompt is one of the model's tasks.
    """

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
    """Return a function that captions images with a vision chat model and its chat template.

    The prompt is the user's message.
    """
    # With padding on the left, all answers of a batch begin in the same column.
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    # Sampling settings, which are not used here; transformers would warn about them.
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
        )  # (n, tokens of prompt and answer)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)

    return generate


def _shrink(image: Image) -> Image:
    """Return the image, or a smaller copy if its longer side has more than ``MAX_SIDE`` pixels."""
    if max(image.size) <= MAX_SIDE:
        return image
    copy = image.copy()
    copy.thumbnail((MAX_SIDE, MAX_SIDE), Resampling.LANCZOS)
    return copy
