"""Models under test: a base model with its adapter on, the proof that it acts, and its answers to
prompts, in batches.

with Models(device, dtype).ready(subject, base) as loaded: ...
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

from ..cache import Cache
from ..digests import PEFT_FILE
from ..load import put_peft
from ..subjects import Subject
from .bases import Base
from .benchmarks import NONE

WHOLE_MODEL = "model"
"""Folder of a run that trained all weights."""
PROBE = "What is 2 + 3? Say why the sky is blue, and count to five."


@dataclass(frozen=True)
class Loaded(TextModel):
    """A model in evaluation mode on its device, with the adapter on, if there is one.

    ``effect`` is the largest change of a probe's logits by the adapter; None without one.
    """

    effect: float | None = None

    def template_used(self, template: str) -> str:
        """The template that is really used: T5 and its kin get the bare prompt, as in training."""
        return template if self.kind == "causal" else NONE


class Models:
    """Loads base models, one at a time, and puts adapters on and off."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._key: Base | None = None
        self._base: Loaded | None = None

    @contextmanager
    def ready(self, subject: Subject, spec: Base) -> Iterator[Loaded]:
        """A subject's model; the base model is bare again afterwards."""
        adapter = subject.weights
        if adapter is not None and not (adapter / PEFT_FILE).is_file():  # trained whole
            place = str(adapter / WHOLE_MODEL)
            spec, adapter = replace(spec, name=place, revision=None, quantize="none"), None
        base = self._load(spec)
        if base.kind == "classification":
            raise UserError(
                f"{subject.source} is a classifier, which writes no text: use --benchmarks heldout."
            )
        if adapter is None:
            yield base
            return
        adapted = put_peft(base, adapter)
        try:
            yield replace(base, model=adapted, effect=_effect(adapted, base, subject))
        finally:
            base.model.zero_grad()
            adapted.unload()

    def _load(self, spec: Base) -> Loaded:
        key = replace(spec, template="")
        if self._base is None or self._key != key:
            self._base = None  # never two at a time
            self._base, self._key = load_base(spec, self._device, self._dtype), key
        return self._base


def load_base(spec: Base, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A base model on its device, in 4 bits where training had it so."""
    options = asdict(spec)
    name, quantized = options.pop("name"), options.pop("quantize") != "none"
    del options["template"]
    base = load_text_model(name, options.pop("task_type"), dtype=dtype, **options)
    if quantized:
        quantize(base.model, dtype, skip=base.whole_modules, device=device)
    base.model.to(device)
    return Loaded(**vars(base))


def _effect(adapted: Any, base: TextModel, subject: Subject) -> float:
    """Largest difference of the probe's logits with the adapter and without."""
    from peft import get_peft_model_state_dict

    device = base.model.device
    inputs = {"input_ids": torch.tensor([base.tokenizer(PROBE)["input_ids"]], device=device)}
    if base.kind == "seq2seq":
        start = base.model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start]], device=device)
    with torch.inference_mode():
        with_it = adapted(**inputs).logits
        with adapted.disable_adapter():
            without = adapted(**inputs).logits
    effect = float((with_it.float() - without.float()).abs().max())
    ups = [v for k, v in get_peft_model_state_dict(adapted).items() if "lora_B" in k]
    if effect == 0 and any(bool(up.any()) for up in ups):
        raise UserError(
            f"the adapter of {subject.source} changes nothing in the model although its weights are"
            " not zero: check that it belongs to this model."
        )
    return effect


CacheOf = Callable[[Mapping[str, Any]], Cache]
"""Further circumstances -> the cache of a subject and a benchmark under them."""


@dataclass(frozen=True)
class Decoding:
    """Choice of the next token.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def answers(
    loaded: Loaded,
    prompts: Mapping[str, str],
    decoding: Decoding,
    template: str,
    batch_size: int,
    cache: Cache,
) -> dict[str, str]:
    """Key of a prompt -> the model's answer; what is cached already is not generated again."""
    missing = [key for key in prompts if key not in cache]
    for start in range(0, len(missing), batch_size):
        keys = missing[start : start + batch_size]
        rows = [_tokens(loaded, prompts[key], template) for key in keys]
        for key, text in zip(keys, _generate(loaded, keys, rows, decoding), strict=True):
            cache.put(key, text)
    return {key: cache.get(key) for key in prompts}


def _tokens(loaded: Loaded, text: str, template: str) -> list[int]:
    if loaded.kind == "seq2seq":
        return list(loaded.tokenizer(text, verbose=False)["input_ids"])
    return generation_prompt(Example(text, ""), loaded.tokenizer, template)


def _generate(
    loaded: Loaded, keys: Sequence[str], rows: Sequence[list[int]], decoding: Decoding
) -> list[str]:
    longest, room = max(map(len, rows)), decoding.max_new_tokens
    if loaded.max_tokens is not None and loaded.kind == "causal":
        room = min(room, loaded.max_tokens - longest)
    if room < 1:
        raise UserError(
            f'the prompt of "{keys[0]}" or one beside it has {longest} tokens, and the model takes'
            f" {loaded.max_tokens}: leave this benchmark out."
        )
    # not the model's own settings
    sampling: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
    if decoding.temperature > 0:
        sampling = {"temperature": decoding.temperature, "top_p": 1.0, "top_k": 0}
        sampling["do_sample"] = True
    device = loaded.model.device
    with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(decoding.seed, *keys))
        return generate(loaded, rows, room, **sampling)
