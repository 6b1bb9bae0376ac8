"""An adapter's folder: what is in it, what replaces what, and what is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.errors import TrainingError
from bilora_diffusion.export import conversion, save_adapter
from bilora_diffusion.lora_names import CONFIG, WEIGHTS
from bilora_diffusion.text.models import load_text_model
from tests.text.text_builders import save_bert, save_llama


def with_adapters(base: Path, *heads: str) -> Any:
    """A model with a primary and an auxiliary that are not zero."""
    model = load_text_model(str(base)).model
    spec = AdapterSpec(rank=2, alpha=4, modules_to_save=heads)
    adapters.inject(model, spec, PRIMARY)
    adapters.inject(model, spec, AUXILIARY)
    adapters.activate(model, (PRIMARY, AUXILIARY))
    torch.manual_seed(0)
    with torch.no_grad():
        for name in (PRIMARY, AUXILIARY):
            for value in adapters.parameters(model, name):
                value.normal_(std=0.1)
        for value in adapters.whole(model, PRIMARY).values():
            value.normal_()
    return model


@pytest.mark.parametrize(
    ("save", "kind", "heads", "layers"),
    [(save_llama, "causal", (), 14), (save_bert, "classification", ("classifier",), None)],
)
def test_the_folder_holds_the_primary_alone_and_its_head(
    save: Any, kind: str, heads: tuple[str, ...], layers: int | None, tmp_path: Path
) -> None:
    base = save(tmp_path / "base")
    model = with_adapters(base, *heads)
    report = save_adapter(tmp_path, model, base_model=str(base), kind=kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([WEIGHTS, CONFIG, "base"])
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["task_type"] == {"causal": "CAUSAL_LM", "classification": "SEQ_CLS"}[kind]
    assert config["base_model_name_or_path"] == str(base)
    assert list(config["modules_to_save"] or ()) == list(heads)
    stored = load_file(tmp_path / WEIGHTS)
    own = [key for key in stored if not key.startswith("base_model.model.classifier.")]
    assert own
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in own)
    assert report["readback_difference"] == 0.0
    assert report["layers"] == layers or heads
    assert report["whole_modules"] == [f"{h}.{end}" for h in heads for end in ("bias", "weight")]
    ids = torch.arange(12).reshape(2, 6)
    loaded: Any = PeftModel.from_pretrained(load_text_model(str(base)).model, str(tmp_path))
    with torch.no_grad():
        everything = model.eval()(input_ids=ids).logits
        with adapters.only(model, (PRIMARY,)):
            wanted = model(input_ids=ids).logits
        made = loaded.eval()(input_ids=ids).logits
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0)
    assert (made - everything).abs().max() > 1e-4


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
        (lambda stored: stored | odd, "does not hold the primary alone"),
        (lambda stored: dict(list(stored.items())[1:]), "does not hold the primary alone"),
        (lambda stored: {key: value + 1 for key, value in stored.items()}, "differs"),
    ):
        monkeypatch.setattr(conversion, "load_file", lambda path, c=change: c(load_file(path)))
        with pytest.raises(TrainingError, match=word):
            save_adapter(tmp_path, model, base_model="a", kind="causal")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
