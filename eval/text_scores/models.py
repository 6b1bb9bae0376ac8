"""What is scored, ready to be asked: a base model with its adapter on, and the proof that it acts.

with Models(device, dtype).ready(subject, base) as loaded: ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.errors import UserError
from bilora_diffusion.text.models import TextModel, load_text_model

from ..digests import PEFT_FILE
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

    def shown(self, template: str) -> str:
        """The template that is really used: T5 and its kin get the bare prompt, as in training."""
        return template if self.kind == "causal" else NONE


class Models:
    """Loads base models, one at a time, and puts adapters on and off.

    Args:
        device: where they compute.
        dtype: of the weights.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._key: Base | None = None
        self._base: Loaded | None = None

    @contextmanager
    def ready(self, subject: Subject, wanted: Base) -> Iterator[Loaded]:
        """A subject's model; the base model is bare again afterwards.

        Raises:
            UserError: something can't be loaded, does not fit, or has no effect.
        """
        adapter = subject.weights
        if adapter is not None and not (adapter / PEFT_FILE).is_file():  # trained whole
            place = str(adapter / WHOLE_MODEL)
            wanted, adapter = replace(wanted, name=place, revision=None, quantize="none"), None
        base = self._load(wanted)
        if base.kind == "classification":
            raise UserError(
                f"{subject.source} is a classifier, which writes no text: use --benchmarks heldout."
            )
        if adapter is None:
            yield base
            return
        adapted = put_on(base, adapter)
        try:
            yield replace(base, model=adapted, effect=_effect(adapted, base, subject))
        finally:
            base.model.zero_grad()
            adapted.unload()

    def _load(self, wanted: Base) -> Loaded:
        key = replace(wanted, template="")
        if self._base is None or self._key != key:
            self._base = None  # never two at a time
            self._base, self._key = load_base(wanted, self._device, self._dtype), key
        return self._base


def load_base(wanted: Base, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A base model on its device, in 4 bits where training had it so.

    Raises:
        UserError: it can't be loaded.
    """
    options = asdict(wanted)
    name, quantized = options.pop("name"), options.pop("quantize") != "none"
    del options["template"]
    base = load_text_model(name, options.pop("task_type"), dtype=dtype, **options)
    if quantized:
        quantize(base.model, dtype, skip=base.whole_modules, device=device)
    base.model.to(device)
    return Loaded(**vars(base))


def put_on(base: TextModel, folder: Path) -> Any:
    """The base model with a PEFT adapter, which has arrived whole.

    Raises:
        UserError: it is damaged, or belongs to another model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        written = load_file(folder / PEFT_FILE)
        adapted = PeftModel.from_pretrained(base.model, str(folder))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(
            f"the adapter in {folder} can't be put on its base model ({reason}): give the model it"
            " was trained on by --model_name_or_path."
        ) from error
    held = get_peft_model_state_dict(adapted)
    astray = [
        name
        for name, tensor in written.items()
        if name not in held or not torch.equal(held[name].cpu().to(tensor.dtype), tensor)
    ]
    if astray or len(held) != len(written):
        raise UserError(
            f"the adapter in {folder} does not fit the model: {len(astray)} of its {len(written)}"
            f" tensors found no place ({', '.join(astray[:2]) or 'and others are missing'}): give"
            " the model it was trained on by --model_name_or_path."
        )
    return adapted.eval()


def _effect(adapted: Any, base: TextModel, subject: Subject) -> float:
    """Largest difference of the probe's logits with the adapter and without.

    Raises:
        UserError: there is none although the adapter is not zero.
    """
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
