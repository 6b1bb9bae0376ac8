"""Which engines and combinations are refused, what is left whole, and the mean of gradients."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers import BertForSequenceClassification

from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import names
from bilora_diffusion.train import engines, sharding
from tests.text.text_builders import bert_config


def accelerator(kind: str = "FSDP", version: int = 2, **plugin: Any) -> Any:
    """What `check` reads of an accelerator that was launched in this way."""
    settings = {
        "cpu_offload": None,
        "activation_checkpointing": False,
        "ignored_modules": None,
        "auto_wrap_policy": None,
        "cpu_ram_efficient_loading": False,
        **plugin,
    }
    dynamo = SimpleNamespace(backend=settings.pop("dynamo", DynamoBackend.NO))
    return SimpleNamespace(
        distributed_type=DistributedType[kind],
        is_fsdp2=kind == "FSDP" and version == 2,
        parallelism_config=settings.pop("parallelism_config", None),
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings), dynamo_plugin=dynamo),
    )


def config(modality: str = "text", **values: Any) -> Any:
    given = {"method": "bilora", "quantize": None, "init_lora_weights": "default", **values}
    return SimpleNamespace(to_dict=lambda: given, modality=modality)


def test_a_launch_that_would_be_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's own entries are tested with it, in tests/config/test_refusals.py."""
    parallel = accelerator("MULTI_GPU", parallelism_config=object())
    for named, engine, cfg in (
        ("FSDP", accelerator(version=1), config()),
        ("DEEPSPEED", accelerator("DEEPSPEED"), config()),
        ("a parallelism config", parallel, config()),
        ("image models", accelerator(), config("image")),
        ("FSDP_OFFLOAD_PARAMS", accelerator(cpu_offload=CPUOffloadPolicy()), config()),
        ("ACCELERATE_DYNAMO_BACKEND", accelerator(dynamo=DynamoBackend.INDUCTOR), config()),
        ("SIZE_BASED", accelerator(auto_wrap_policy=size_based_auto_wrap_policy), config()),
        ("FSDP on CPUs", accelerator("MULTI_CPU"), config()),  # accelerate would train by DDP
    ):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str(named == "FSDP on CPUs"))
        with pytest.raises(UserError, match=named):
            engines.check(cfg, engine)


def test_fsdp2_trains_adapters_of_text_models_and_ddp_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for method in set(names()) - {"flat-lora", "full"}:
        engines.check(config(method=method), accelerator())
    for kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
        for modality in ("image", "text"):
            cfg = config(modality, method="flat-lora", init_lora_weights="pissa")
            engines.check(cfg, accelerator(kind))
    # under FSDP2 every process reads the weights
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    engine = accelerator(cpu_ram_efficient_loading=True)
    engines.check(config(), engine)
    assert engine.state.fsdp_plugin.cpu_ram_efficient_loading is False
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
