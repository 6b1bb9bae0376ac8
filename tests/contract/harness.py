"""Runs for the contract tests: a method on a small model, with one form of its adapters."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AdapterSpec, FrozenAdapter, inits
from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.config import constraints
from bilora_diffusion.config.run import RunConfig
from bilora_diffusion.methods import Method, MethodOptions, Target, create, for_run, names
from bilora_diffusion.train.engine import Blocks
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
"""Adapter forms: every method is tested with each of them, unless the constraints refuse it."""
MAIN_KINDS = ("unet", "t5", "llm")


def allowed(name: str, adapter_form: str) -> bool:
    """Return whether the constraints allow a method with this form of its adapters."""
    facts = {"method": name, "quantize": "nf4" if adapter_form == "nf4" else "none"}
    for key, value in SPECS[adapter_form].items():
        # The constraints use the names of the command line.
        facts["init_lora_weights" if key == "init" else key] = value
    return constraints.first_violated(facts) is None


def combos() -> list[tuple[str, str, str]]:
    """Return every allowed triple (method, adapter form, kind of model)."""
    cases = []
    for name in names():
        for adapter_form in SPECS:
            if allowed(name, adapter_form):
                kinds = CASES if adapter_form == "default" else MAIN_KINDS
                cases += [(name, adapter_form, kind) for kind in kinds]
    return cases


def rotation() -> list[tuple[str, str, str]]:
    """Return one triple for each method; together they cover all adapter forms and kinds."""
    chosen = []
    for turn, name in enumerate(names()):
        cases = [case for case in combos() if case[0] == name]
        # With these numbers, the triples cover every form and kind of model, as a test checks.
        chosen.append(cases[(6 * turn + 10) % len(cases)])
    return chosen


class Run:
    """A method on a model, with its optimizer. Every step uses the same batch.

    Args:
        options: options of the method.
        optimizer: name of an optimizer of torch, or a function that takes the parameter groups.
        micro_batches: number of micro-batches per step.
        overflow: steps, counted from 0, with an overflowing gradient; None for no gradient scaler.
        compiled: whether to compile the model's repeated blocks with `engine.BACKEND`.
        config: a script's configuration. Its method, learning rate and schedule (over `steps`)
            replace the other arguments.
        frozen: frozen adapters that are active together with the trained ones.
    """

    def __init__(
        self,
        name: str,
        adapter_form: str,
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
        frozen: tuple[FrozenAdapter, ...] = (),
    ) -> None:
        self.case = CASES[kind]
        self.micro_batches = micro_batches
        self.overflow = overflow
        self.model = self.case.make().train().to(dtype)
        self.original = copy.deepcopy(self.model)
        if adapter_form == "nf4":
            quantize(self.model, torch.float32, skip=())
        if config is None:
            self.method: Method = create(name, MethodOptions(num_steps=steps, **(options or {})))
        else:
            self.method = for_run(vars(config), steps)
            lr = config.learning_rate
        spec = AdapterSpec(rank=4, alpha=6, target_modules=self.case.targets, **SPECS[adapter_form])
        torch.manual_seed(3)  # seeds the adapters' initial values
        groups = self.method.setup([Target("model", self.model, spec, lr, 0.01, frozen)])
        self.spec = spec
        self.optimizer: torch.optim.Optimizer
        if optimizer == "SGD":
            self.optimizer = torch.optim.SGD(groups, momentum=0.5)
        elif isinstance(optimizer, str):
            self.optimizer = getattr(torch.optim, optimizer)(groups)
        else:
            self.optimizer = optimizer(groups)
        self.method.bind(self.optimizer)
        self.scheduler = None if config is None else build_scheduler(config, self.optimizer, steps)
        self.forward_model: nn.Module = self.model
        self.accelerator: Accelerator | None = None
        self.rows = slice(0, ROWS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if overflow else None
        self.steps_taken = 0
        self.blocks = Blocks([self.model] if compiled else [])

    def initialise(self) -> Self:
        """Prepare the first step of a new run and return the run."""
        if self.spec.changes_base and not self.method.exports_weights:
            with collecting(self.model) as gradients:
                self._loss(self.rows).backward()
            inits.compute(self.model, self.spec, gradients)
            adapters.start_from_initial(self.model)
        return self

    def resume(self, saved: dict[str, Any]) -> Self:
        """Restore the state of a checkpoint and return the run."""
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
        """Give each of two processes half of the rows, and let DDP average their gradients."""
        rank = torch.distributed.get_rank()
        self.accelerator = Accelerator(cpu=True)
        self.forward_model = DistributedDataParallel(self.model)
        self.rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        return self

    def optimized_ids(self) -> set[int]:
        """Return the `id` of each parameter that the optimizer updates."""
        ids = set[int]()
        for group in self.optimizer.param_groups:
            ids.update(id(parameter) for parameter in group["params"])
        return ids

    def train(self, steps: int = STEPS) -> list[float]:
        """Take this number of steps and return the loss of each."""
        losses = []
        for _ in range(steps):
            losses.append(float(self.method.step(self._forward_backward, self)))
            self.steps_taken += 1
        return losses

    def step(self) -> None:
        """Clip the gradients of the method's result and update; the method calls this."""
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
        """Run a step's micro-batches as the training loop does, and return the mean loss."""
        count = (self.rows.stop - self.rows.start) // self.micro_batches
        total = torch.zeros(())
        for start in range(self.rows.start, self.rows.stop, count):
            loss = self._loss(slice(start, start + count)) / self.micro_batches
            scaled_loss = loss if self.scaler is None else self.scaler.scale(loss)
            scaled_loss.backward()
            total += loss.detach()
        if self.overflow and self.steps_taken in self.overflow:
            for parameter in self.method.result_parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        if torch.distributed.is_initialized():  # average over all processes, as the loop does
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.method.tensors().items()}

    def base_weights(self) -> dict[str, Tensor]:
        """Return all weights but the adapters', under their names in a model without adapters."""
        weights = {}
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name:
                weights[name.replace("base_layer.", "")] = parameter.detach().clone()
        return weights


def sgd_run(name: str, adapter_form: str, kind: str, **settings: Any) -> Run:
    """Return an initialized run with SGD.

    Adam's first steps would turn the rounding error of a small gradient into a full step.
    """
    return Run(name, adapter_form, kind, lr=0.1, optimizer="SGD", **settings).initialise()
