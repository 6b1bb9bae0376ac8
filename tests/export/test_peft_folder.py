"""An adapter's folder: what is in it, what replaces what, and what is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.errors import TrainingError
from bilora_diffusion.export import conversion, save_adapter
from bilora_diffusion.lora_names import CONFIG, WEIGHTS
from bilora_diffusion.text.models import load_text_model
from tests.export.export_models import add_adapters
from tests.text.text_builders import save_llama


def with_adapters(base: Path) -> Any:
    """A model with a primary and an auxiliary that are not zero."""
    return add_adapters(load_text_model(str(base)).model, AdapterSpec(rank=2, alpha=4))


def test_a_second_export_replaces_the_first_unless_it_is_not_finite(tmp_path: Path) -> None:
    model = with_adapters(save_llama(tmp_path / "base"))
    value = adapters.parameters(model, PRIMARY)[0]
    (tmp_path / ".adapter.partial").mkdir()  # of a run that was killed while it exported
    (tmp_path / ".adapter.partial" / "left").write_text("")
    save_adapter(tmp_path, model, base_model="a", kind="causal")
    with torch.no_grad():
        value.add_(1)
    save_adapter(tmp_path, model, base_model="b", kind="causal")
    assert any(torch.equal(value, stored) for stored in load_file(tmp_path / WEIGHTS).values())
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "b"
    assert not (tmp_path / ".adapter.partial").exists()
    before = (tmp_path / WEIGHTS).read_bytes()
    for broken in (float("nan"), float("inf")):
        with torch.no_grad():
            value[0, 0] = broken
        with pytest.raises(TrainingError, match=r"lora_A\.weight is not finite"):
            save_adapter(tmp_path, model, base_model="a", kind="causal")
        assert (tmp_path / WEIGHTS).read_bytes() == before


def test_a_file_that_holds_something_else_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapters(save_llama(tmp_path / "base"))
    odd = {"base_model.model.auxiliary.lora_A.weight": torch.zeros(2)}
    for change, word in (
        (lambda stored: stored | odd, "does not hold what was trained alone"),
        (lambda stored: dict(list(stored.items())[1:]), "does not hold what was trained alone"),
        (lambda stored: {key: value + 1 for key, value in stored.items()}, "differs"),
    ):
        monkeypatch.setattr(conversion, "load_file", lambda path, c=change: c(load_file(path)))
        with pytest.raises(TrainingError, match=word):
            save_adapter(tmp_path, model, base_model="a", kind="causal")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
