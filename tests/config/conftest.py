"""A simulated machine, on which the tests of this folder resolve command lines."""

from collections.abc import Callable, Collection

import pytest

from bilora_diffusion.config import machine as module


@pytest.fixture(autouse=True)
def machine(hub: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulate a CPU with every package and model, and no launcher.

    The fixture's value is a function: `machine(kind, ...)` simulates another device.
    """

    def pretend(kind: str, *, bf16: bool = True, missing: Collection[str] = ()) -> None:
        monkeypatch.setattr(module, "device_type", lambda: kind)
        monkeypatch.setattr(module, "is_installed", lambda name: name not in missing)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: bf16)

    for name in (
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_CPU",
        "LOCAL_RANK",
        "RANK",
        "WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    pretend("cpu")
    return pretend
