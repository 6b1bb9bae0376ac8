"""Answers of a model to prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bilora_diffusion.errors import UserError
from bilora_diffusion.seeds import seed_of
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.tokenizing import context_rows, generation_prompt

from ..kept import Kept
from .benchmarks import NONE
from .models import Loaded

Keeper = Callable[[Mapping[str, Any]], Kept]
"""What is kept of a subject and a benchmark under further circumstances."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        top_p: probability of the tokens drawn from; only where there is a temperature.
        seed: of the draws.
        stops: an answer ends before the first of these strings.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """For settings."""
        return asdict(self) | {"stops": list(self.stops)}


def answers(
    loaded: Loaded,
    prompts: Mapping[str, str],
    decoding: Decoding,
    template: str,
    batch_size: int,
    kept: Kept,
) -> dict[str, str]:
    """Key of a prompt -> the model's answer; what is kept already is not generated again.

    Args:
        prompts: by key; keys also seed what is drawn.
        template: around each prompt; "none" for the bare text. T5 and its kin have none.

    Raises:
        UserError: a prompt that is too long for the model, or that the template can't show.
    """
    missing = [key for key in prompts if key not in kept]
    for start in range(0, len(missing), batch_size):
        keys = missing[start : start + batch_size]
        rows = [_tokens(loaded, prompts[key], template) for key in keys]
        for key, text in zip(keys, _generate(loaded, keys, rows, decoding), strict=True):
            kept.put(key, _cut(text, decoding.stops))
    return {key: kept.get(key) for key in prompts}


def _tokens(loaded: Loaded, text: str, template: str) -> list[int]:
    if loaded.kind == "seq2seq":
        return list(loaded.tokenizer(text, verbose=False)["input_ids"])
    if template == NONE:
        return context_rows([text], loaded.tokenizer, template)[0]
    return generation_prompt(Example(text, ""), loaded.tokenizer, template)


def _generate(
    loaded: Loaded, keys: Sequence[str], rows: Sequence[list[int]], decoding: Decoding
) -> list[str]:
    tokenizer, device = loaded.tokenizer, loaded.model.device
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    longest, room = inputs["input_ids"].shape[1], decoding.max_new_tokens
    if loaded.max_tokens is not None and loaded.kind == "causal":
        room = min(room, loaded.max_tokens - longest)
    if room < 1:
        raise UserError(
            f'the prompt of "{keys[0]}" or one beside it has {longest} tokens, and the model takes'
            f" {loaded.max_tokens}: leave this benchmark out."
        )
    options: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if decoding.temperature > 0:
        drawn = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p}
        options = {**drawn, "top_k": 0}
    if decoding.stops:
        options |= {"stop_strings": list(decoding.stops), "tokenizer": tokenizer}
    with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(decoding.seed, *keys))
        tokens = loaded.model.generate(
            **inputs.to(device),
            max_new_tokens=room,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    skipped = longest if loaded.kind == "causal" else 0
    return tokenizer.batch_decode(tokens[:, skipped:], skip_special_tokens=True)


def _cut(text: str, stops: Sequence[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
