"""The configuration of a run: read, completed and checked once, by `RunConfig.resolve`."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from .. import methods
from ..core import fields
from ..core.choices import OPTIMIZERS
from ..core.errors import UserError, is_main_process
from ..core.values import check_choice
from ..methods.options import AdapterOptions, MethodFlags
from . import machine, refusals
from .command_line import CommandLine
from .options import OptimizerOptions, OutputOptions, StepOptions, StoppingOptions
from .refusals import said

Values = dict[str, Any]
SAMPLES_OF_A_STEP = 10**6
LOW_FOR_PRODIGY = 0.1
HELDOUT_OPTIONS = frozenset(
    {"validation_dataset", "validation_file", "validation_part", "max_eval_samples"}
)
"""Options that say which samples are held out."""
TRACKERS = (
    *("tensorboard", "wandb", "comet_ml", "aim", "clearml", "dvclive", "mlflow", "swanlab"),
    "trackio",
)
logger = logging.getLogger(__name__)


class RunConfig(
    AdapterOptions, MethodFlags, StepOptions, StoppingOptions, OptimizerOptions, OutputOptions
):
    """Base of both scripts' configurations: flat frozen dataclasses, made of groups of options."""

    modality: ClassVar[str]  # image or text
    groups: ClassVar[tuple[Any, ...]]  # the option dataclasses, in the order of ``--help``
    alternatives: ClassVar[tuple[tuple[str, str], ...]]  # as `CommandLine.read` takes them
    description: ClassVar[str]
    usage: ClassVar[str]
    without_influence: ClassVar[frozenset[str]]  # see `free_options`
    without_samples: ClassVar[Mapping[str, Any]]  # with which no images or answers are made
    # fills in what was not given, of what only this script has, and what the model's files say
    complete: ClassVar[Callable[[Values, frozenset[str]], Values]]
    check_inputs: ClassVar[Callable[[Values], None]]  # of what only this script can be given

    # what only one script has as an option, or in another form
    train_text_encoder: bool = False
    compile: bool = False
    eval_on_start: bool = False
    skip_final_inference: bool = False
    resolution: int = 0
    validation_epochs: int | None
    validation_loss_steps: int

    @classmethod
    def resolve(cls, argv: Sequence[str] | None = None) -> Self:
        """Make the configuration of a command line, the recipe and the small files of the models
        that it names, and the launch.

        No weights and no data are downloaded or loaded. ``--help`` prints and exits.

        Args:
            argv: arguments without the program's name; None for those of the process.

        Raises:
            UserError: a value or a combination that can't be honoured; it names the fix.
        """
        kind = cls.with_own_options()
        values, given = cls.parser().read(argv, cls.alternatives, _of_another_method)
        values = cls.complete(_completed(values, given, cls.modality), given)
        values["validation_loss_steps"] = _measured_every(values, given)
        values, notes = without_idle(fields.options_of(kind.groups), values, given)
        notes += _remarks(values, given)
        about = {"device": machine.device_type(), "modality": cls.modality, **machine.launch()}
        refusals.check({**values, **about})
        cls.check_inputs(values)
        _check_packages(values)
        for note in notes if is_main_process() else ():
            logger.warning("%s", note)
        return kind(**{**values, **_scaled_rates(values, machine.processes())})

    @classmethod
    def parser(cls) -> CommandLine:
        """The parser of this script's command lines."""
        groups = cls.with_own_options().groups
        return CommandLine(
            groups, cls.description, cls.usage, refusals.table().foreign[cls.modality]
        )

    @classmethod
    def with_own_options(cls) -> type[Self]:
        """This class with the options that single methods have."""
        own = methods.own_options()
        return _extended(cls, own) if own and not hasattr(cls, "_extends") else cls

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers that read images send it along, and pickle finds no class that was made here.
        cls, own = getattr(type(self), "_extends", (type(self), ()))
        return _again, (cls, own, vars(self))

    @property
    def leaves_unused(self) -> bool:
        """A step may leave trained parameters without a gradient, which DDP must know."""
        return False

    @property
    def base_model(self) -> str:
        """The model that is trained, as the user gave it."""
        raise NotImplementedError

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in their order; none for text."""
        return []

    def warmup_steps(self, num_steps: int) -> int:
        """Steps in which the learning rate rises from 0, of ``num_steps`` in all."""
        return self.lr_warmup_steps or 0

    def to_dict(self) -> Values:
        """All options as JSON values; the hub token is left out."""
        values = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        return {
            name: values[name] for name in fields.options_of(self.groups) if name != "hub_token"
        }

    def fingerprint(self) -> Values:
        """The options that decide what is learned: a resumed run must have the same."""
        return {k: v for k, v in self.to_dict().items() if k not in self.without_influence}

    def resume_settings(self) -> Values:
        """`fingerprint` with the held-out options; a resumed run may change `free_options`."""
        heldout = {k: v for k, v in self.to_dict().items() if k in HELDOUT_OPTIONS}
        return {**self.fingerprint(), **heldout}

    @property
    def depends_on_heldout(self) -> bool:
        """The held-out loss decides what the run leaves."""
        return _goes_by_the_loss(vars(self))

    @property
    def free_options(self) -> frozenset[str]:
        """The options that a resumed run may change."""
        if self.depends_on_heldout:
            return self.without_influence - HELDOUT_OPTIONS
        return self.without_influence


@functools.cache
def _extended(cls: Any, own: tuple[Any, ...]) -> Any:
    """A configuration's class with further groups of options, the same one at each call."""
    declared = [
        (name, field.type, fields.like(group, name))
        for group in own
        for name, field in fields.options_of([group]).items()
    ]
    kind: Any = dataclasses.make_dataclass(cls.__name__, declared, bases=(cls,), frozen=True)
    kind.groups, kind._extends = (*cls.groups, *own), (cls, own)
    return kind


def _again(cls: Any, own: tuple[Any, ...], values: Values) -> Any:
    """A configuration out of a pickle."""
    return (_extended(cls, own) if own else cls)(**values)


def without_influence(groups: Sequence[Any]) -> frozenset[str]:
    """The options that do not touch what is learned: of a group that is ``free``, or themselves."""
    return frozenset(
        name
        for group in groups
        for name, field in fields.options_of([group]).items()
        if getattr(group, "free", False) or fields.option_of(field).free
    )


def _of_another_method(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> frozenset[str]:
    """The options that a recipe sets for its method, where the command line takes another one.

    A radius is a different quantity in each method, so the default of the new method holds.
    """
    before = recipe.get("method", AdapterOptions.method)
    method = flags.get("method", before)
    if method == before or not {before, method} <= set(methods.names()):
        return frozenset()
    shared = methods.reads(before) & methods.reads(method) & (recipe.keys() - flags.keys())
    for name in sorted(shared) if is_main_process() else ():
        logger.warning(
            "the recipe's %s %s is for %s, so %s takes its default: change it by --%s.",
            name,
            recipe[name],
            before,
            method,
            name,
        )
    return frozenset(shared)


def _completed(values: Values, given: frozenset[str], modality: str) -> Values:
    """Fill in what every script has: the adapter's scale, radius, rates, optimizer, precision."""
    values = {**values, "optimizer": values["optimizer"].lower()}
    for name, choices in (("method", methods.names()), ("optimizer", OPTIMIZERS)):
        check_choice(f"--{name}", values[name], choices)
    if values["lora_alpha"] is None:
        values["lora_alpha"] = 2.0 * values["rank"]
    methods.check_rho(values["method"], values["rho"])
    if values["rho"] is None:
        values["rho"] = methods.default_rho(values["method"], modality)
    if values["optimizer"] in ("adamw", "adamw8bit") and values["use_8bit_adam"]:
        values |= {"optimizer": "adamw8bit", "use_8bit_adam": False}
    if values["optimizer"] == "prodigy" and "learning_rate" not in given:
        values["learning_rate"] = 1.0  # Prodigy estimates the rate; this is a factor on it
    several = values["method"] == "bilora" and values["auxiliaries"] != 1 and modality == "image"
    if several and values["auxiliary_learning_rate"] is None:
        # Auxiliaries that move once an epoch point less well uphill at the primary's rate.
        values["auxiliary_learning_rate"] = float(f"{3 * values['learning_rate']:.9g}")
    values["mixed_precision"] = values["mixed_precision"] or machine.default_precision()
    if "report_to" not in given and not machine.is_installed(values["report_to"]):
        values["report_to"] = "none"
    return values


def without_idle(
    options: Mapping[str, dataclasses.Field[Any]], values: Values, given: frozenset[str]
) -> tuple[Values, list[str]]:
    """Take back the options that have no effect, so that the run's record does not claim them.

    An option that has no effect beside others is warned of, as diffusers' script does it or passes
    over it; refused is only what would give a wrong result.

    Returns:
        The values that hold, and a sentence for each option that was taken back.
    """
    kept, notes = dict(values), list[str]()
    for name, field in options.items():
        default = fields.default_of(field)
        if name not in given or values[name] == default:
            continue
        idle = next((idle for idle in fields.option_of(field).idle if idle.when(values)), None)
        if idle is not None:
            kept[name] = values[idle.becomes] if idle.becomes else default
            fix = idle.fix.replace("`", "")
            notes.append(f"{said(name, values[name])} has no effect {idle.where}: {fix}.")
    return kept, notes


def _scaled_rates(values: Mapping[str, Any], processes: int) -> Values:
    """The learning rates that ``--scale_lr`` asks for.

    The auxiliary's own rate keeps its ratio to the primary's; that of text encoders stays.
    """
    factor = values["gradient_accumulation_steps"] * values["train_batch_size"] * processes
    names = ("learning_rate", "auxiliary_learning_rate") if values["scale_lr"] else ()
    return {name: values[name] * factor for name in names if values[name] is not None}


def _measured_every(values: Values, given: frozenset[str]) -> int:
    """Steps from one held-out loss to the next: twenty in a run that goes by it, unless given."""
    every, steps = values["validation_loss_steps"], values["max_train_steps"]
    chosen = "validation_loss_steps" not in given and steps and _goes_by_the_loss(values)
    return twentieth(steps) if chosen else every


def twentieth(steps: int) -> int:
    """Steps from one measurement to the next, of twenty in a run."""
    return max(1, steps // 20)


def _goes_by_the_loss(values: Mapping[str, Any]) -> bool:
    return any(values[name] for name in ("fit", "keep_best", "early_stopping_patience"))


def _remarks(values: Mapping[str, Any], given: frozenset[str]) -> list[str]:
    """A sentence for each default that follows from what was given and might surprise."""
    every, rank, alpha = (values[n] for n in ("validation_loss_steps", "rank", "lora_alpha"))
    measured = every and "validation_loss_steps" not in given and _goes_by_the_loss(values)
    low = values["optimizer"] == "prodigy" and values["learning_rate"] <= LOW_FOR_PRODIGY
    warm = values["lr_warmup_steps"] or values.get("warmup_ratio")
    remarks = (
        (
            measured,
            f"the held-out loss is measured every {every} steps: change it with"
            " --validation_loss_steps.",
        ),
        (
            "rank" in given and "lora_alpha" not in given,
            f"--rank {rank} comes with --lora_alpha {alpha:g}, the paper's ratio: for diffusers'"
            f" add --lora_alpha {rank}.",
        ),
        (
            low,
            f"{said('learning_rate', values['learning_rate'])} is low for prodigy, which multiplies"
            " it with a rate of its own: 1.0 is usual.",
        ),
        (
            values["lr_scheduler"] == "constant_with_warmup" and not warm,
            "--lr_scheduler constant_with_warmup has no warm-up: add --lr_warmup_steps.",
        ),
        (
            values["use_dora"] and values.get("output_kohya_format"),
            "--use_dora: the file for diffusers is read as trained, the one for ComfyUI nearly so"
            " from version 0.3.30 on, and not by A1111, as the model card says in full.",
        ),
    )
    return [sentence for holds, sentence in remarks if holds]


def _check_packages(values: Mapping[str, Any]) -> None:
    """Refuse what needs a package that is missing, a token, or more memory than there is."""
    tracker, optimizer = values["report_to"], values["optimizer"]
    check_choice("--report_to", tracker, (*TRACKERS, "all", "none"))
    xformers = "enable_xformers_memory_efficient_attention"
    needed = {
        f"--report_to {tracker}": tracker in TRACKERS and tracker,
        "--quantize nf4": values["quantize"] == "nf4" and "bitsandbytes>=0.50",  # older: CUDA only
        f"--optimizer {optimizer}": OPTIMIZERS[optimizer].package,
        f"--{xformers}": values.get(xformers) and "xformers",
    }
    for option, package in needed.items():
        if package:
            machine.require(package, option)
    if values["push_to_hub"] and values["hub_token"] is None:
        from huggingface_hub import get_token

        if get_token() is None:
            raise UserError("--push_to_hub needs a token: run `hf auth login` or add --hub_token.")
    batch, passes = values["train_batch_size"], values["gradient_accumulation_steps"]
    if batch * passes > SAMPLES_OF_A_STEP:
        raise UserError(
            f"--train_batch_size {batch} times --gradient_accumulation_steps {passes} is over"
            f" {SAMPLES_OF_A_STEP} samples a step: give smaller ones."
        )
