"""Whether this machine has what the options ask for."""

from __future__ import annotations

import os
from typing import Any

from ..errors import UserError, did_you_mean
from .resolve import device_type, is_installed

TRACKERS = (
    "tensorboard",
    "wandb",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "mlflow",
    "swanlab",
    "trackio",
)


def check_environment(values: dict[str, Any]) -> None:
    """Refuse packages that are not installed and precisions that the device lacks.

    Raises:
        UserError: it names the option and what to install or to use instead.
    """
    _check_tracker(values)
    if values["use_8bit_adam"]:
        _require_package("bitsandbytes", "--use_8bit_adam")
    if values["quantize"] == "nf4":
        # older versions quantize on CUDA only
        _require_package("bitsandbytes", "--quantize nf4", 'pip install "bitsandbytes>=0.50"')
    if values["optimizer"] == "prodigy":
        _require_package("prodigyopt", "--optimizer prodigy")
    _check_device(values)
    if values["push_to_hub"] and values["hub_token"] is None:
        from huggingface_hub import get_token

        if get_token() is None:
            raise UserError("--push_to_hub needs a token: run `hf auth login` or add --hub_token.")
    if values["local_rank"] > 0 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"--local_rank {values['local_rank']} comes without the variable LOCAL_RANK: start"
            " several processes with accelerate launch or torchrun."
        )


def _check_tracker(values: dict[str, Any]) -> None:
    tracker = values["report_to"]
    choices = (*TRACKERS, "all", "none")
    if tracker not in choices:
        raise UserError(
            f'--report_to is "{tracker}"{did_you_mean(tracker, choices)}:'
            f" use one of {', '.join(choices)}."
        )
    if tracker in ("wandb", "all") and values["hub_token"] is not None:
        raise UserError(
            f"--hub_token could leak to the tracker of --report_to {tracker}: drop it and run"
            " `hf auth login`."
        )
    if tracker in TRACKERS:
        _require_package(tracker, f"--report_to {tracker}")


def _check_device(values: dict[str, Any]) -> None:
    precision, device = values["mixed_precision"], device_type()
    if precision == "bf16" and device == "mps":
        raise UserError("--mixed_precision bf16 does not work on MPS: use fp16 or no.")
    if precision == "fp16" and device == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU, and this is a CPU: use bf16 or no.")
    if values.get("enable_xformers_memory_efficient_attention"):
        flag = "--enable_xformers_memory_efficient_attention"
        _require_package("xformers", flag)
        if device != "cuda":
            raise UserError(f"{flag} needs CUDA, and the device is {device}: drop it.")


def _require_package(package: str, flag: str, install: str | None = None) -> None:
    if not is_installed(package):
        command = install or f"pip install {package}"
        raise UserError(f"{flag} needs a package that is missing: run `{command}`.")
