"""Models under test: base models with adapters, a check that the adapter has an effect, and answers
to prompts in batches.

with Models(device, dtype).load(subject, base_model) as model: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.seeds import seed_of
from bilora_diffusion.text.evaluation import generate
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.models import TextModel, load_text_model
from bilora_diffusion.text.tokenizing import generation_prompt

from ..cache import PEFT_FILE, Cache
from ..load import put_peft
from ..subjects import Subject
from .base_models import NO_TEMPLATE, BaseModel

# Subfolder with the weights of a run that trained all weights
WHOLE_MODEL = "model"
# Prompt on which the effect of an adapter is measured
PROBE = "What is 2 + 3? Say why the sky is blue, and count to five."

# Returns a benchmark's cache for one subject and the given settings
CacheFor = Callable[[Mapping[str, Any]], Cache]


@dataclass(frozen=True)
class LoadedModel(TextModel):
    """A model in evaluation mode on its device, with its adapter applied if there is one.

    ``effect`` is the adapter's largest change of the probe's logits; None if there is no adapter.
    """

    effect: float | None = None

    def effective_template(self, template: str) -> str:
        """Return the template to use: encoder-decoders get the bare prompt, as in training."""
        if self.kind == "causal":
            return template
        return NO_TEMPLATE


class Models:
    """Loads base models, one at a time, and adds and removes adapters."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._spec: BaseModel | None = None
        self._base: LoadedModel | None = None

    @contextmanager
    def load(self, subject: Subject, spec: BaseModel) -> Iterator[LoadedModel]:
        """Load a subject's model for the context; the adapter is removed afterwards.

        Raises:
            UserError: the model is a classifier, the adapter does not fit it, or a trained adapter
                has no effect on it.
        """
        adapter = subject.weights
        if adapter is not None and not (adapter / PEFT_FILE).is_file():
            # The run trained all weights and saved a complete model.
            place = str(adapter / WHOLE_MODEL)
            spec = replace(spec, name=place, revision=None, quantize="none")
            adapter = None
        base = self._load_base(spec)
        if base.kind == "classification":
            raise UserError(
                f"{subject.source} is a classifier and can't generate text: use"
                " --benchmarks heldout."
            )
        if adapter is None:
            yield base
            return
        # The adapter's layers are inserted into the base model itself, and removed below.
        adapted = put_peft(base, adapter)
        try:
            yield replace(base, model=adapted, effect=_effect(adapted, base, subject))
        finally:
            base.model.zero_grad()
            adapted.unload()

    def _load_base(self, spec: BaseModel) -> LoadedModel:
        # The template changes the prompts, not the weights.
        spec = replace(spec, template="")
        # Consecutive subjects with the same base model share it.
        if self._base is None or self._spec != spec:
            self._base = None  # frees the memory of the previous model
            self._base = load_base(spec, self._device, self._dtype)
            self._spec = spec
        return self._base


def load_base(spec: BaseModel, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a base model onto its device, in 4 bits if the spec is quantized."""
    options = asdict(spec)
    name, is_quantized = options.pop("name"), options.pop("quantize") != "none"
    del options["template"]  # only affects the prompts
    base = load_text_model(name, options.pop("task_type"), dtype=dtype, **options)
    if is_quantized:
        quantize(base.model, dtype, skip=base.whole_modules, device=device)
    base.model.to(device)
    return LoadedModel(**vars(base))


def _effect(adapted: Any, base: TextModel, subject: Subject) -> float:
    """Return the adapter's largest change of the probe's logits.

    Raises:
        UserError: the adapter is trained but changes nothing.
    """
    from peft import get_peft_model_state_dict

    device = base.model.device
    inputs = {"input_ids": torch.tensor([base.tokenizer(PROBE)["input_ids"]], device=device)}
    # An encoder-decoder also needs the first token of an answer.
    if base.kind == "seq2seq":
        start = base.model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start]], device=device)
    with torch.inference_mode():
        adapted_logits = adapted(**inputs).logits  # (1, tokens, vocabulary)
        with adapted.disable_adapter():
            base_logits = adapted(**inputs).logits
    effect = float((adapted_logits.float() - base_logits.float()).abs().max())

    # An untrained adapter has only zeros in B, and may have no effect.
    weights = get_peft_model_state_dict(adapted)
    is_trained = any(bool(weights[name].any()) for name in weights if "lora_B" in name)
    if effect == 0 and is_trained:
        raise UserError(
            f"the adapter of {subject.source} does not change the model's output, although its"
            " weights are not zero: check that it belongs to this model."
        )
    return effect


@dataclass(frozen=True)
class Decoding:
    """Settings for generating answers."""

    max_new_tokens: int
    # Sampling temperature; 0 for greedy decoding
    temperature: float = 0.0
    seed: int = 0


def answers(
    model: LoadedModel,
    prompts: Mapping[str, str],
    decoding: Decoding,
    template: str,
    batch_size: int,
    cache: Cache,
) -> dict[str, str]:
    """Return the model's answers by the keys of the prompts; cached answers are reused.

    Args:
        model: the model under test.
        prompts: key -> prompt.
        decoding: settings of the generation.
        template: name of the template around the prompts.
        batch_size: number of prompts per batch.
        cache: cache of the answers, by the prompts' keys.
    """
    # Each batch of answers is written to disk before the next one is generated.
    missing = [key for key in prompts if key not in cache]
    for start in range(0, len(missing), batch_size):
        keys = missing[start : start + batch_size]
        token_rows = [_tokens(model, prompts[key], template) for key in keys]
        texts = _generate(model, keys, token_rows, decoding)
        for key, text in zip(keys, texts, strict=True):
            cache.put(key, text)
    return {key: cache.get(key) for key in prompts}


def _tokens(model: LoadedModel, text: str, template: str) -> list[int]:
    if model.kind == "seq2seq":
        return list(model.tokenizer(text, verbose=False)["input_ids"])
    return generation_prompt(Example(text, ""), model.tokenizer, template)


def _generate(
    model: LoadedModel, keys: Sequence[str], token_rows: Sequence[list[int]], decoding: Decoding
) -> list[str]:
    """Generate answers to a batch of tokenized prompts."""
    longest = max(map(len, token_rows))
    max_new_tokens = decoding.max_new_tokens
    # In a causal model, the prompt and the answer share the context length.
    if model.max_tokens is not None and model.kind == "causal":
        max_new_tokens = min(max_new_tokens, model.max_tokens - longest)
    if max_new_tokens < 1:
        raise UserError(
            f'a prompt in the batch of "{keys[0]}" has {longest} tokens, but the model takes at'
            f" most {model.max_tokens} with the answer: leave this benchmark out."
        )
    # Set every option, because generation_config.json would supply the missing ones.
    sampling: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
    if decoding.temperature > 0:
        sampling = {"temperature": decoding.temperature, "top_p": 1.0, "top_k": 0}
        sampling["do_sample"] = True
    device = model.model.device
    gpus = [device] if device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(gpus):
        # An answer does not depend on the batches before it.
        torch.manual_seed(seed_of(decoding.seed, *keys))
        return generate(model, token_rows, max_new_tokens, **sampling)
