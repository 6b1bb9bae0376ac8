"""The configuration of a run: all options of a training script, frozen. `resolving` makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from ..core import fields
from ..core.values import HELDOUT_LOSS
from ..methods.options import AdapterOptions, MethodFlags
from . import constraints
from .command_line import CommandLine
from .options import OptimizerOptions, OutputOptions, StepOptions, StoppingOptions

# Options that say which samples are held out.
HELDOUT_OPTIONS = frozenset(
    {"validation_dataset", "validation_file", "validation_part", "max_eval_samples"}
)


class RunConfig(
    AdapterOptions,
    MethodFlags,
    StepOptions,
    StoppingOptions,
    OptimizerOptions,
    OutputOptions,
):
    """Base class of both scripts' configurations: flat frozen dataclasses of groups of options."""

    # Properties of the script.
    modality: ClassVar[str]  # image or text
    groups: ClassVar[tuple[type, ...]]  # the option dataclasses, in the order of ``--help``
    alternatives: ClassVar[tuple[tuple[str, str], ...]]  # as `CommandLine.read` takes them
    description: ClassVar[str]
    usage: ClassVar[str]
    without_influence: ClassVar[frozenset[str]]  # options that do not touch what is learned
    without_samples: ClassVar[Mapping[str, Any]]  # options under which no samples are made

    # Names of the options that the command line or its recipe gives.
    given_options: frozenset[str]

    # Options that only one script has, or that it declares otherwise.
    train_text_encoder: bool = False
    text_encoder_lr: float | None = None
    compile: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    eval_on_start: bool = False
    skip_final_inference: bool = False
    output_kohya_format: bool = False
    warmup_ratio: float | None = None
    resolution: int = 0
    validation_epochs: int | None
    validation_loss_steps: int

    @classmethod
    def parser(cls) -> CommandLine:
        """The parser of this script's command lines."""
        foreign_flags = constraints.table().foreign[cls.modality]
        return CommandLine(cls.groups, cls.description, cls.usage, foreign_flags)

    def derived(self) -> Self:
        """The configuration with this script's derived defaults.

        Some of them depend on the small files of the base model.

        Raises:
            UserError: these files can't be read, or the model does not have what is asked for.
        """
        raise NotImplementedError

    def check_inputs(self) -> None:
        """Refuse files and folders that this script reads and that do not exist.

        Raises:
            UserError: it has the value and the fix.
        """
        raise NotImplementedError

    @property
    def leaves_unused(self) -> bool:
        """Whether a step may leave trained parameters without a gradient, which DDP must know."""
        return False

    @property
    def validates_at_checkpoints(self) -> bool:
        """Whether each checkpoint gets validation samples if ``--validation_epochs`` is not given;
        if not, only the end of training does."""
        return False

    @property
    def base_model(self) -> str:
        """The model that is trained, as the user gave it."""
        raise NotImplementedError

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in the order of the images; none for text."""
        return []

    def warmup_steps(self, num_steps: int) -> int:
        """Steps in which the learning rate rises from 0, of ``num_steps`` in all."""
        return self.lr_warmup_steps or 0

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values; the hub token is left out."""
        values = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        options: dict[str, Any] = {}
        # In the order of --help. Fields that are no options are left out too.
        for name in fields.options_of(self.groups):
            if name != "hub_token":
                options[name] = values[name]
        return options

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide what is learned: a resumed run must have the same."""
        options = self.to_dict()
        for name in self.without_influence:
            options.pop(name, None)
        return options

    def resume_settings(self) -> dict[str, Any]:
        """`fingerprint` with the held-out options; a resumed run may change `free_options`."""
        settings = self.fingerprint()
        for name, value in self.to_dict().items():
            if name in self.heldout_options:
                settings[name] = value
        return settings

    @property
    def depends_on_heldout(self) -> bool:
        """Whether the measure of held-out samples decides what the run leaves."""
        return bool(self.fit or self.keep_best or self.early_stopping_patience)

    @property
    def heldout_measure(self) -> str:
        """The measure of held-out samples that decides, by its name in the log."""
        return HELDOUT_LOSS

    @property
    def heldout_options(self) -> frozenset[str]:
        """The options that say what is measured, and on which samples."""
        return HELDOUT_OPTIONS

    def measurement_interval(self, steps: int) -> int:
        """Steps from one measurement to the next, of twenty in a run of ``steps``."""
        return max(1, steps // 20)

    @property
    def free_options(self) -> frozenset[str]:
        """The options that a resumed run may change."""
        if self.depends_on_heldout:
            return self.without_influence - self.heldout_options
        return self.without_influence


def without_influence(groups: Sequence[type]) -> frozenset[str]:
    """Names of the options that do not touch what is learned, with ``may_change_on_resume``."""
    names: set[str] = set()
    for group in groups:
        group_may_change = getattr(group, "may_change_on_resume", False)
        for name, field in fields.options_of([group]).items():
            if group_may_change or fields.option_of(field).may_change_on_resume:
                names.add(name)
    return frozenset(names)
