"""Which engines and combinations are refused, what is left whole, and the mean of gradients."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from bilora_diffusion.config import machine, refusals
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import names
from bilora_diffusion.train import sharding
from tests.text.text_builders import bert_config

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WRONG: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "FSDP": ({"ACCELERATE_USE_FSDP": "true"}, {}),
    "DEEPSPEED": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}),
    "PARALLELISM_CONFIG": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}),
    "image models": (FSDP, {"modality": "image"}),
    "--fit": (FSDP, {"fit": True}),
    "FSDP_OFFLOAD_PARAMS": ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {}),
    "FSDP_IGNORED_MODULES": ({**FSDP, "FSDP_IGNORED_MODULES": "a.*"}, {}),
    "ACCELERATE_DYNAMO_BACKEND": ({**FSDP, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}),
    "SIZE_BASED_WRAP": ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}),
    "FSDP on CPUs": ({**FSDP, "ACCELERATE_USE_CPU": "true"}, {}),  # accelerate would train by DDP
    "XLA": ({}, {}),
}
"""What a refusal names -> the launcher's variables, and what is trained."""
USUAL = {"method": "bilora", "init_lora_weights": "default", "modality": "text"}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_type", device_type)


def device_type() -> str:
    return "cpu" if machine.is_on("ACCELERATE_USE_CPU") else "cuda"


@pytest.mark.parametrize("name", WRONG)
def test_a_launch_that_would_be_wrong_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's own entries are tested with it, in tests/config/test_refusals.py."""
    launch, values = WRONG[name]
    for variable, value in launch.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda package: name == "XLA")
    with pytest.raises(UserError, match=name):
        refusals.check({**USUAL, **values, **machine.launch()})


def test_fsdp2_trains_adapters_of_text_models_and_ddp_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for modality in ("image", "text"):
        pissa = {"method": "flat-lora", "init_lora_weights": "pissa", "modality": modality}
        refusals.check({**pissa, **machine.launch()})
    for variable, value in FSDP.items():
        monkeypatch.setenv(variable, value)
    for method in set(names()) - {"flat-lora", "full"}:
        refusals.check({**USUAL, "method": method, **machine.launch()})
    # under FSDP2 every process reads the weights
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    engine: Any = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    sharding.read_in_every_process(engine)
    assert plugin.cpu_ram_efficient_loading is False
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_tied_parameters_and_their_owners() -> None:
    model = nn.ModuleDict({"first": nn.Embedding(4, 3), "mid": nn.Linear(3, 3)})
    model["last"] = nn.Linear(3, 4, bias=False)
    assert sharding.tied(model) == []
    model["last"].weight = model["first"].weight
    (parameter,) = sharding.tied(model)
    assert parameter is model["first"].weight
    assert sharding.owners(model, [parameter]) == [model["first"], model["last"]]


def test_blocks_do_not_hold_the_input_embedding() -> None:
    """BERT names its embeddings, which accelerate would split a second time."""
    model = BertForSequenceClassification(bert_config())
    assert "BertEmbeddings" in (model._no_split_modules or ())
    assert sharding.blocks(model) == ["BertLayer"]


class TwoProcesses:
    """The other process has gradient 3 where this one has 1, and reaches the last parameter only.

    Sums are what `Accelerator.reduce` makes of them.
    """

    num_processes = 2

    def __init__(self, is_fsdp2: bool) -> None:
        self.is_fsdp2 = is_fsdp2

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        if reduction == "sum":
            return tensor + torch.tensor([1.0, 0.0, 1.0, 0.0])
        return (tensor + torch.tensor([3.0, 3.0, 0.0, 5.0])) / 2


@pytest.mark.parametrize("is_fsdp2", [True, False], ids=["FSDP2", "parameters apart"])
def test_gradients_are_averaged_over_processes(is_fsdp2: bool) -> None:
    both, one, other, nowhere = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 1, 1))
    optimizer = torch.optim.SGD([both, one, other, nowhere], lr=0.1)
    both.grad, one.grad = torch.ones(2), torch.ones(1)
    engine: Any = TwoProcesses(is_fsdp2)
    apart = [] if is_fsdp2 else [both, one, other, nowhere]
    sharding.average_gradients(engine, optimizer, apart)
    assert both.grad.tolist() == [2.0, 2.0]
    assert one.grad.tolist() == [0.5]
    assert other.grad is not None
    assert other.grad.tolist() == [2.5]
    assert nowhere.grad is None
