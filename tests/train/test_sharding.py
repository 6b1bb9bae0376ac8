"""Launches that are refused or allowed, and loading of weights in every process."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from bilora_diffusion.config import constraints, machine
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import names
from bilora_diffusion.train.engine import read_in_every_process

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "FSDP": ({"ACCELERATE_USE_FSDP": "true"}, {}),
    "DEEPSPEED": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}),
    "PARALLELISM_CONFIG": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}),
    "image models": (FSDP, {"modality": "image"}),
    "FSDP_OFFLOAD_PARAMS": ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {}),
    "FSDP_IGNORED_MODULES": ({**FSDP, "FSDP_IGNORED_MODULES": "a.*"}, {}),
    "ACCELERATE_DYNAMO_BACKEND": ({**FSDP, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}),
    "SIZE_BASED_WRAP": ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}),
    "FSDP on CPUs": ({**FSDP, "ACCELERATE_USE_CPU": "true"}, {}),  # accelerate would use DDP
    "XLA": ({}, {}),
}
"""For each word of an error message: the launcher's variables, and facts about the run."""
USUAL = {"method": "bilora", "init_lora_weights": "default", "modality": "text"}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Simulate a machine with a GPU."""

    def device_type():
        return "cpu" if machine.is_on("ACCELERATE_USE_CPU") else "cuda"

    monkeypatch.setattr(machine, "device_type", device_type)


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_launch_is_refused(name, monkeypatch):
    """tests/config/test_constraints.py tests the constraints one by one."""
    launch, values = REFUSED[name]
    for variable, value in launch.items():
        monkeypatch.setenv(variable, value)
    # torch_xla counts as installed only in its own case.
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda package: name == "XLA")
    with pytest.raises(UserError, match=name):
        constraints.check({**USUAL, **values, **machine.launch()})


def test_fsdp2_is_allowed_for_adapters_of_text_models_and_ddp_for_everything(monkeypatch):
    for modality in ("image", "text"):
        pissa = {"method": "flat-lora", "init_lora_weights": "pissa", "modality": modality}
        constraints.check({**pissa, **machine.launch()})
    for variable, value in FSDP.items():
        monkeypatch.setenv(variable, value)
    for method in set(names()) - {"flat-lora", "full"}:
        constraints.check({**USUAL, "method": method, **machine.launch()})


def test_every_process_loads_the_weights_under_fsdp2(monkeypatch):
    """This overrides accelerate's configuration."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    engine: Any = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    read_in_every_process(engine)
    assert plugin.cpu_ram_efficient_loading is False
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
