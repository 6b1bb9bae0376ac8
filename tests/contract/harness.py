"""A method on a small model, with one form of its adapters, ready to take steps."""

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
"""Forms of the adapters that every method is combined with, unless the table refuses it."""
MAIN_KINDS = ("unet", "t5", "llm")


def allowed(name: str, adapter_form: str) -> bool:
    """Test that the table of combinations lets a method and a form of the adapters through."""
    facts = {"method": name, "quantize": "nf4" if adapter_form == "nf4" else "none"}
    for key, value in SPECS[adapter_form].items():
        # The table has the names of the command line.
        facts["init_lora_weights" if key == "init" else key] = value
    return constraints.first_violated(facts) is None


def combos() -> list[tuple[str, str, str]]:
    """(method, form of the adapters, kind of model): everything that is allowed."""
    cases = []
    for name in names():
        for adapter_form in SPECS:
            if allowed(name, adapter_form):
                kinds = CASES if adapter_form == "default" else MAIN_KINDS
                cases += [(name, adapter_form, kind) for kind in kinds]
    return cases


def rotation() -> list[tuple[str, str, str]]:
    """Every method once, with forms of the adapters and kinds of models in turn."""
    chosen = []
    for turn, name in enumerate(names()):
        cases = [case for case in combos() if case[0] == name]
        # By these numbers the methods together meet every form and kind of model; a test holds it.
        chosen.append(cases[(6 * turn + 10) % len(cases)])
    return chosen


class Run:
    """A method on a model with its optimizer; the batch of each step is the same.

    Args:
        options: of the method.
        optimizer: one of torch by its name, or a function of the parameter groups.
        micro_batches: micro-batches of a step.
        overflow: steps (from 0) whose gradient overflows; then a gradient scaler is at work.
        compiled: True to compile the model's repeated blocks, by `engine.BACKEND`.
        config: configuration of a script. Its method, learning rate and schedule over `steps`
            replace the other arguments.
        frozen: adapters that are active with the trained ones.
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
        torch.manual_seed(3)  # of the adapters' first values
        groups = self.method.setup([Target("model", self.model, spec, lr, 0.01, frozen)])
        self.spec = spec
        self.optimizer: torch.optim.Optimizer
        if optimizer == "SGD":
            self.optimizer = torch.optim.SGD(groups, momentum=0.5)  # which some methods read
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
        self.forward_model = DistributedDataParallel(self.model)
        self.rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        return self

    def optimized_ids(self) -> set[int]:
        """Identities of the parameters that the optimizer has."""
        ids = set[int]()
        for group in self.optimizer.param_groups:
            ids.update(id(parameter) for parameter in group["params"])
        return ids

    def train(self, steps: int = STEPS) -> list[float]:
        """Take steps; the loss of each."""
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
        """All micro-batches of a step, as the training loop takes them; the mean loss."""
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
        if torch.distributed.is_initialized():  # the loss is that of all processes, as the loop's
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.method.tensors().items()}

    def base_weights(self) -> dict[str, Tensor]:
        """Everything in the model that is not an adapter's, under the names of a plain model."""
        weights = {}
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name:
                weights[name.replace("base_layer.", "")] = parameter.detach().clone()
        return weights


def sgd_run(name: str, adapter_form: str, kind: str, **settings: Any) -> Run:
    """A run by SGD, since Adam's first steps turn the rounding of a small gradient into a whole
    step.
    """
    return Run(name, adapter_form, kind, lr=0.1, optimizer="SGD", **settings).initialise()
