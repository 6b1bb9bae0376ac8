"""A method on a small model, with an option of its adapters, ready to take steps."""

import copy
from collections.abc import Callable, Mapping
from itertools import combinations, product
from typing import Any, Self, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AdapterSpec, inits
from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.config import constraints
from bilora_diffusion.config.run import RunConfig
from bilora_diffusion.core.values import AUTO, BALLS, DIRECTIONS, RHO_NORMS, SAMPLE
from bilora_diffusion.methods import Method, MethodOptions, Target, create, for_run, names
from bilora_diffusion.train.engine import Blocks, average_gradients
from bilora_diffusion.train.initialisation import collecting
from bilora_diffusion.train.optimizers import build_scheduler
from tests.contract.models import CASES, ROWS

STEPS = 3
SPECS: dict[str, dict[str, Any]] = {
    "default": {},
    "pissa": {"init": "pissa"},
    "lora-ga": {"init": "lora-ga"},
    "dora": {"use_dora": True},
    "nf4": {},
}
"""The options of the adapter that every method is combined with, unless the table refuses it."""
MAIN_KINDS = ("unet", "t5", "llm")
CHOICES: dict[str, tuple[Any, ...]] = {
    "option": tuple(SPECS),
    "rho": (0.05, AUTO),
    "ball": BALLS,
    "rho_norm": RHO_NORMS,
    "auxiliary_direction": DIRECTIONS,
    "auxiliaries": (1, 3),
}
"""Bi-LoRA's own options, of which any two are tried together."""


def allowed(name: str, option: str, **options: Any) -> bool:
    """Test that the table of combinations lets these through."""
    facts = {{"init": "init_lora_weights"}.get(key, key): v for key, v in SPECS[option].items()}
    weights = "nf4" if option == "nf4" else "none"
    return (
        constraints.first_violated({"method": name, "quantize": weights, **facts, **options})
        is None
    )


def combos() -> list[tuple[str, str, str]]:
    """(method, option, kind of model): everything that is allowed."""
    return [
        (name, option, kind)
        for name in names()
        for option in SPECS
        for kind in (CASES if option == "default" else MAIN_KINDS)
        if allowed(name, option)
    ]


def rotation() -> list[tuple[str, str, str]]:
    """Every method once, with options of the adapters and kinds of models in turn."""
    by_method = [[case for case in combos() if case[0] == name] for name in names()]
    return [cases[16 * turn % len(cases)] for turn, cases in enumerate(by_method)]


def pairwise(name: str) -> list[dict[str, Any]]:
    """Settings in which every allowed pair of values of two options occurs at least once."""
    rows = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
    pairs = [(row, set(combinations(row.items(), 2))) for row in rows if allowed(name, **row)]
    left, chosen = set[Any]().union(*(row_pairs for _, row_pairs in pairs)), []
    while left:
        row, row_pairs = max(pairs, key=lambda pair: len(left & pair[1]))
        chosen.append(row)
        left -= row_pairs
    return chosen


class Run:
    """A method on a model with its optimizer; the batch of each step is the same.

    Args:
        micro_batches: micro-batches of a step.
        overflow: steps (from 0) whose gradient overflows; then a gradient scaler is at work.
        compiled: its repeated blocks are, by `engine.BACKEND`.
        config: of a script, whose method, learning rate and schedule over `steps` hold instead.
    """

    def __init__(
        self,
        name: str,
        option: str,
        kind: str,
        *,
        options: Mapping[str, Any] | None = None,
        lr: float = 1e-2,
        optimizer: str | Callable[..., torch.optim.Optimizer] = "AdamW",
        micro_batches: int = 1,
        overflow: tuple[int, ...] | None = None,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
        config: RunConfig | None = None,
        steps: int = 10,
    ) -> None:
        self.case, self.micro_batches, self.overflow = CASES[kind], micro_batches, overflow
        self.model = self.case.make().train().to(dtype)
        self.original = copy.deepcopy(self.model)
        if option == "nf4":
            quantize(self.model, torch.float32, skip=())
        if config is None:
            self.method: Method = create(name, MethodOptions(num_steps=steps, **(options or {})))
        else:
            self.method = for_run(vars(config), steps, [f"sample {row}" for row in range(ROWS)])
            lr = config.learning_rate
        spec = AdapterSpec(rank=4, alpha=6, target_modules=self.case.targets, **SPECS[option])
        torch.manual_seed(3)
        groups = self.method.setup([Target("model", self.model, spec, lr, 0.01)])
        self.spec = spec
        # There are methods that read the momentum.
        settings = {"momentum": 0.5} if optimizer == "SGD" else {}
        make = getattr(torch.optim, optimizer) if isinstance(optimizer, str) else optimizer
        self.optimizer: torch.optim.Optimizer = make(groups, **settings)
        self.method.bind(self.optimizer)
        self.scheduler = None if config is None else build_scheduler(config, self.optimizer, steps)
        self.forward_model: nn.Module = self.model
        self.accelerator: Accelerator | None = None
        self.rows = slice(0, ROWS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if overflow else None
        self.steps_taken = 0
        self.blocks = Blocks([self.model] if compiled else [])

    def initialise(self) -> Self:
        """Do the work before the first step of a fresh run."""
        if self.spec.changes_base and not self.method.exports_weights:
            with collecting(self.model) as gradients:
                self._loss(self.rows).backward()
            inits.compute(self.model, self.spec, gradients)
            adapters.start_from_initial(self.model)
        return self

    def resume(self, saved: dict[str, Any]) -> Self:
        """Do the work before the first step of a run that goes on."""
        for key, tensor in self.method.tensors().items():
            tensor.copy_(saved["tensors"][key])
        adapters.subtract_initial(self.model)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.method.load_state_dict(saved["method"])
        self.steps_taken = saved["steps_taken"]
        return self

    def checkpoint(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "tensors": self.method.tensors(),
                "optimizer": self.optimizer.state_dict(),
                "method": self.method.state_dict(),
                "steps_taken": self.steps_taken,
            }
        )

    def share(self) -> Self:
        """Let DDP average the gradients of two processes, each with half of the rows."""
        rank = torch.distributed.get_rank()
        self.accelerator = Accelerator(cpu=True)
        optimized_ids = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        cast(Any, self.model)._ddp_params_and_buffers_to_ignore = [
            name for name, p in self.model.named_parameters() if id(p) not in optimized_ids
        ]
        self.forward_model = DistributedDataParallel(self.model)
        self.rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        return self

    def train(self, steps: int = STEPS) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(float(self.method.step(self._forward_backward, self)))
            self.steps_taken += 1
        return losses

    def step(self) -> None:
        """Clip what the method wants clipped, then update; called by the method."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.method.result_parameters(), 1.0)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, rows: slice) -> Tensor:
        return (self.case.output(self.forward_model, rows) - 1).square().mean()

    def _forward_backward(self) -> Tensor:
        first, count = self.rows.start, (self.rows.stop - self.rows.start) // self.micro_batches
        total = torch.zeros(())
        for number in range(self.micro_batches):
            start = first + number * count
            with self.method.around_batch(range(start, start + count)):
                loss = self._loss(slice(start, start + count)) / self.micro_batches
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += loss.detach()
        if self.overflow and self.steps_taken in self.overflow:
            for parameter in self.method.result_parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        if self.accelerator is not None:
            average_gradients(self.accelerator, self.optimizer, self.method.loose_parameters)
        if torch.distributed.is_initialized():  # the loss is that of all processes, as the loop's
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.method.tensors().items()}

    def base_weights(self) -> dict[str, Tensor]:
        """Everything in the model that is not an adapter's, under the names of a plain model."""
        return {
            name.replace("base_layer.", ""): parameter.detach().clone()
            for name, parameter in self.model.named_parameters()
            if "lora_" not in name
        }


def compared(name: str, option: str, kind: str) -> Run:
    """A run that one process and two take alike; the option "auto" is a radius that sets itself,
    "sample" an auxiliary for each row beside it, in float64.
    """
    auxiliary_options = {AUTO: {}, SAMPLE: {"auxiliaries": ROWS}}.get(option)
    settings: dict[str, Any] = {"lr": 0.1, "optimizer": "SGD"}
    if auxiliary_options is not None:
        settings["options"] = {"rho": AUTO, "loss_rise": 0.3, **auxiliary_options}
        settings["dtype"] = torch.float64 if auxiliary_options else torch.float32
    return Run(
        name, option if auxiliary_options is None else "default", kind, **settings
    ).initialise()


SHARED = [*rotation(), ("bilora", AUTO, "unet"), ("bilora", SAMPLE, "llm")]
"""Cases in which two processes are compared with one."""
