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

from bilora_diffusion.config import engines
from bilora_diffusion.errors import UserError
from bilora_diffusion.train import sharding
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


def config(**values: Any) -> Any:
    given = {"method": "bilora", "quantize": None, "init_lora_weights": "default", **values}
    return SimpleNamespace(to_dict=lambda: given)


LAUNCHES: dict[str, tuple[Any, Any, bool, str]] = {
    "FSDP1": (accelerator(version=1), config(), False, "the auxiliary's norm"),
    "DeepSpeed": (accelerator("DEEPSPEED"), config(), False, "fsdp_version to 2"),
    "Megatron-LM": (accelerator("MEGATRON_LM"), config(), True, "--multi_gpu"),
    "XLA": (accelerator("XLA"), config(), False, "before which they are clipped"),
    "a parallelism config": (
        accelerator("MULTI_GPU", parallelism_config=object()),
        config(),
        False,
        "different rows",
    ),
    "FSDP2 for an image model": (accelerator(), config(), True, "--quantize nf4"),
    "--method full": (accelerator(), config(method="full"), False, "all of the model"),
    "--method flat-lora": (accelerator(), config(method="flat-lora"), False, "norms"),
    "--init_lora_weights pissa": (
        accelerator(),
        config(init_lora_weights="lora-ga"),
        False,
        "default or gaussian",
    ),
    "--quantize nf4": (accelerator(), config(quantize="nf4"), False, "nothing would be split"),
    "--mixed_precision fp16": (accelerator(), config(mixed_precision="fp16"), False, "bf16 or no"),
    "FSDP_OFFLOAD_PARAMS": (accelerator(cpu_offload=CPUOffloadPolicy()), config(), False, "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        accelerator(activation_checkpointing=True),
        config(),
        False,
        "--gradient_checkpointing",
    ),
    "FSDP_IGNORED_MODULES": (accelerator(ignored_modules="a.*"), config(), False, "unset it"),
    "a dynamo backend": (accelerator(dynamo=DynamoBackend.INDUCTOR), config(), False, "to no"),
    "SIZE_BASED_WRAP": (
        accelerator(auto_wrap_policy=size_based_auto_wrap_policy),
        config(),
        False,
        "TRANSFORMER_BASED_WRAP",
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_that_would_be_wrong_is_refused(name: str) -> None:
    engine, cfg, images, part = LAUNCHES[name]
    with pytest.raises(UserError) as caught:
        engines.check(cfg, engine, images=images)
    sentence = str(caught.value)
    assert sentence.startswith(name)
    assert " is refused, since " in sentence
    assert part in sentence


def test_fsdp_on_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would train by DDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP on CPUs is refused, since accelerate would split no"):
        engines.check(config(), accelerator("MULTI_CPU"), images=False)


def test_every_entry_has_a_test() -> None:
    tested = [*LAUNCHES, "FSDP on CPUs"]
    assert len(tested) == len(engines.REFUSED)
    assert all(any(entry.what.startswith(name) for name in tested) for entry in engines.REFUSED)


@pytest.mark.parametrize("method", ["lora", "bilora", "lora-sam", "lora-obar", "lora-nbar"])
def test_fsdp2_trains_adapters_of_text_models(method: str) -> None:
    engines.check(config(method=method), accelerator(), images=False)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_ddp_trains_everything(kind: str, images: bool) -> None:
    cfg = config(method="flat-lora", init_lora_weights="pissa")
    engines.check(cfg, accelerator(kind), images=images)


def test_every_process_reads_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    engine = accelerator(cpu_ram_efficient_loading=True)
    engines.check(config(), engine, images=False)
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
