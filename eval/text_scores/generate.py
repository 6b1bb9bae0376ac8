"""Answers of a model to prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bilora_diffusion.errors import UserError
from bilora_diffusion.seeds import seed_of
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.tokenizing import generation_prompt

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


@dataclass(frozen=True)
class Prompt:
    """A question under a key of its own, and which draw of it this is."""

    key: str
    text: str
    draw: int = 0


def answers(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    template: str,
    batch_size: int,
    kept: Kept,
) -> dict[str, str]:
    """Key of a prompt -> the model's answer; what is kept already is not generated again.

    Args:
        template: around each prompt; "none" for the bare text. T5 and its kin have none.

    Raises:
        UserError: a prompt that is too long for the model, or that the template can't show.
    """
    missing = [prompt for prompt in prompts if kept.get(prompt.key) is None]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        rows = [_tokens(loaded, prompt.text, template) for prompt in batch]
        for prompt, text in zip(batch, _generate(loaded, batch, rows, decoding), strict=True):
            kept.put(prompt.key, _cut(text, decoding.stops))
    return {prompt.key: kept.get(prompt.key) for prompt in prompts}


def _tokens(loaded: Loaded, text: str, template: str) -> list[int]:
    if loaded.shown(template) != NONE:
        return generation_prompt(Example(text, ""), loaded.tokenizer, template)
    ids = list(loaded.tokenizer(text, verbose=False)["input_ids"])
    causal_end = loaded.kind == "causal" and ids[-1:] == [loaded.tokenizer.eos_token_id]
    return ids[:-1] if causal_end else ids


def _generate(
    loaded: Loaded, batch: Sequence[Prompt], rows: Sequence[list[int]], decoding: Decoding
) -> list[str]:
    tokenizer, longest = loaded.tokenizer, max(map(len, rows))
    room = decoding.max_new_tokens
    if loaded.max_tokens is not None and loaded.kind == "causal":
        room = min(room, loaded.max_tokens - longest)
    if room < 1:
        raise UserError(
            f'the prompt of "{batch[0].key}" or one beside it has {longest} tokens, and the model'
            f" takes {loaded.max_tokens}: leave this benchmark out."
        )
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    drawing = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if decoding.temperature > 0:
        drawing |= {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": 0,
        }
    if decoding.stops:
        drawing |= {"stop_strings": list(decoding.stops), "tokenizer": tokenizer}
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(decoding.seed, *(f"{p.key}#{p.draw}" for p in batch)))
        found = loaded.model.generate(
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            max_new_tokens=room,
            pad_token_id=pad,
            **drawing,
        )
    skipped = longest if loaded.kind == "causal" else 0
    return tokenizer.batch_decode(found[:, skipped:], skip_special_tokens=True)


def _cut(text: str, stops: Sequence[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
