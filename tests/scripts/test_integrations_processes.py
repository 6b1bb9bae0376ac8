"""A Trainer with Bi-LoRA in two processes takes the steps that it takes in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from tests.integrations.trainers import tiny_llm
from tests.scripts.conftest import ROOT
from tests.scripts.test_integrations_examples import SENTENCE, save, write

STEPS = 4


def start(folder: Path, processes: int, *argv: str) -> dict[str, dict[str, Tensor]]:
    """The files of the last checkpoint."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    done = subprocess.run(
        [
            *(sys.executable, *launch, str(ROOT / "examples" / "trainer_bilora.py"), *argv),
            *("--output_dir", str(folder), "--use_cpu", "True", "--report_to", "none"),
            *("--per_device_train_batch_size", str(4 // processes), "--max_steps", str(STEPS)),
            # not AdamW, which amplifies rounding where gradients are small
            *("--optim", "sgd", "--learning_rate", "1.0", "--max_grad_norm", "0.1"),
            *("--train_sampling_strategy", "sequential", "--save_steps", "2"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    last = folder / f"checkpoint-{STEPS}"
    return {
        name: load_file(last / name)
        for name in ("adapter_model.safetensors", "bilora_state.safetensors")
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    model = save(tmp_path / "model", tiny_llm())
    data = write(tmp_path / "data.jsonl", {"text": SENTENCE})
    common = ("--model", model, "--data", data)
    one = start(tmp_path / "one", 1, *common)
    two = start(tmp_path / "two", 2, *common)
    for name, tensors in one.items():
        worst = max((two[name][key] - value).abs().max().item() for key, value in tensors.items())
        assert worst < 1e-5, name
    resume = ("--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-2"))
    again = start(tmp_path / "two", 2, *common, *resume)
    for name, tensors in two.items():
        worst = max((again[name][key] - value).abs().max().item() for key, value in tensors.items())
        assert worst == 0, name
    state = two["bilora_state.safetensors"]
    for adapter in (PRIMARY, AUXILIARY):
        ends = [value for key, value in state.items() if adapter in key and "lora_B" in key]
        assert max(value.abs().max().item() for value in ends) > 1e-4, adapter
