"""Which engines and combinations are refused, what is left whole, and the ball over two shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers import BertForSequenceClassification

from bilora_diffusion.config.launches import LAUNCHES as REFUSED
from bilora_diffusion.errors import UserError
from bilora_diffusion.train import engines, sharding
from tests.text.text_builders import bert_config

ROOT = Path(__file__).resolve().parents[2]


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


WRONG: dict[str, tuple[Any, Any, str]] = {
    "FSDP1": (accelerator(version=1), config(), "fsdp_version to 2"),
    "DeepSpeed": (accelerator("DEEPSPEED"), config(), "fsdp_version to 2"),
    "Megatron-LM": (accelerator("MEGATRON_LM"), config("image"), "--multi_gpu"),
    "XLA": (accelerator("XLA"), config(), "--multi_gpu"),
    "a parallelism config": (
        accelerator("MULTI_GPU", parallelism_config=object()),
        config(),
        "ACCELERATE_USE_PARALLELISM_CONFIG",
    ),
    "image models": (accelerator(), config("image"), "--quantize nf4"),
    "--method full": (accelerator(), config(method="full"), "--method bilora"),
    "--method flat-lora": (accelerator(), config(method="flat-lora"), "lora-sam"),
    "--init_lora_weights lora-ga": (accelerator(), config(init_lora_weights="lora-ga"), "gaussian"),
    "--quantize nf4": (accelerator(), config(quantize="nf4"), "--multi_gpu"),
    "--mixed_precision fp16": (accelerator(), config(mixed_precision="fp16"), "bf16 or no"),
    "FSDP_OFFLOAD_PARAMS": (accelerator(cpu_offload=CPUOffloadPolicy()), config(), "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        accelerator(activation_checkpointing=True),
        config(),
        "--gradient_checkpointing",
    ),
    "FSDP_IGNORED_MODULES": (accelerator(ignored_modules="a.*"), config(), "unset it"),
    "a dynamo backend": (accelerator(dynamo=DynamoBackend.INDUCTOR), config(), "to no"),
    "SIZE_BASED_WRAP": (
        accelerator(auto_wrap_policy=size_based_auto_wrap_policy),
        config(),
        "TRANSFORMER_BASED_WRAP",
    ),
}
"""What a refusal names -> the launch, what is trained, and the fix."""


@pytest.mark.parametrize("name", WRONG)
def test_a_launch_that_would_be_wrong_is_refused(name: str) -> None:
    engine, cfg, fix = WRONG[name]
    with pytest.raises(UserError) as caught:
        engines.check(cfg, engine)
    assert name in str(caught.value)
    assert fix in str(caught.value)


def test_fsdp_on_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would train by DDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"FSDP with CPUs .*--use_fsdp"):
        engines.check(config(), accelerator("MULTI_CPU"))


def test_every_engine_that_is_refused_has_a_test() -> None:
    values = [
        value for e in REFUSED for name, c in e.when if name == "engine" for value in c.values
    ]
    others = [e for e in REFUSED if "parallelism_config" in dict(e.when)]
    assert len(values) + len(others) == len([*WRONG, "FSDP on CPUs"])


@pytest.mark.parametrize("method", ["lora", "bilora", "lora-sam", "lora-obar", "lora-nbar"])
def test_fsdp2_trains_adapters_of_text_models(method: str) -> None:
    engines.check(config(method=method), accelerator())


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_ddp_trains_everything(kind: str, modality: str) -> None:
    cfg = config(modality, method="flat-lora", init_lora_weights="pissa")
    engines.check(cfg, accelerator(kind))


def test_every_process_reads_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
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

    is_fsdp2 = True

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "mean"
        other = torch.tensor([3.0, 3.0, 0.0, 5.0, 0.0, 1.0, 0.0, 1.0, 0.0])
        return (tensor + other) / 2


def test_gradients_are_averaged_over_processes() -> None:
    both, one, other, nowhere = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 1, 1))
    optimizer = torch.optim.SGD([both, one, other, nowhere], lr=0.1)
    both.grad, one.grad = torch.ones(2), torch.ones(1)
    sharding.average_gradients(TwoProcesses(), optimizer)  # pyright: ignore[reportArgumentType]
    assert both.grad.tolist() == [2.0, 2.0]
    assert one.grad.tolist() == [0.5]
    assert other.grad is not None
    assert other.grad.tolist() == [2.5]
    assert nowhere.grad is None


@pytest.mark.slow
def test_the_ball_over_two_processes(tmp_path: Path) -> None:
    """Split factors have the norm of the whole, and all shards shrink by the same number."""
    script = ROOT / "tests" / "train" / "two_shards.py"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", str(script), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key])
    assert float(first["norm"]) == pytest.approx(float(first["whole_norm"]), rel=1e-12)
    assert float(first["before"]) == pytest.approx(float(first["whole_norm"]), rel=1e-12)
    assert float(first["after"]) == pytest.approx(0.05, rel=1e-6)
    assert first["shares"].tolist() == [[3, 2], [4, 3]]  # uneven shares of A's 5 and B's 7 rows
    torch.testing.assert_close(first["A"], first["whole_A"], rtol=0, atol=0)
    torch.testing.assert_close(first["B"], first["whole_B"], rtol=0, atol=0)
