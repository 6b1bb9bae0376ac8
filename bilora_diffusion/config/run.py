"""All options of a training script as a frozen dataclass; `config.resolving` creates it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from ..core import fields
from ..core.durable import strict_json
from ..core.values import HELDOUT_LOSS
from ..methods.options import AdapterOptions, MethodFlags
from ..run.settings import without_options
from . import constraints
from .command_line import CommandLine
from .lora_sources import LoraSource, lora_facts
from .options import OptimizerOptions, OutputOptions, StepOptions, StoppingOptions

# Options that choose the held-out samples.
HELDOUT_OPTIONS = frozenset({"validation_dataset", "validation_file", "max_eval_samples"})


class RunConfig(
    AdapterOptions,
    MethodFlags,
    StepOptions,
    StoppingOptions,
    OptimizerOptions,
    OutputOptions,
):
    """Base class of both scripts' configurations; combines the frozen option dataclasses."""

    modality: ClassVar[str]  # image or text
    groups: ClassVar[tuple[type, ...]]  # the option dataclasses, in the order of ``--help``
    alternatives: ClassVar[tuple[tuple[str, str], ...]]  # pairs for `CommandLine.read`
    description: ClassVar[str]
    usage: ClassVar[str]

    # Names of the options that the command line or its recipe gives.
    given_options: frozenset[str]
    # LoRA files that are values of options, by the option's name.
    lora_sources: dict[str, LoraSource]

    # Options that only one script has, or that a script redeclares with another default.
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
        """Return the parser for this script's command lines."""
        foreign_flags = constraints.table().foreign[cls.modality]
        return CommandLine(cls.groups, cls.description, cls.usage, foreign_flags)

    def derive_defaults(self) -> Self:
        """Return the configuration with this script's derived defaults.

        Some of them depend on the base model's configuration files, which are read for this.

        Raises:
            UserError: these files can't be read, or the model lacks something that an option needs.
        """
        raise NotImplementedError

    def check_inputs(self) -> None:
        """Check the values that depend on files, folders or several options of this script.

        Raises:
            UserError: a file or folder is missing, or a value can't be used; the message names the
                fix.
        """
        raise NotImplementedError

    @property
    def has_unused_parameters(self) -> bool:
        """Whether some trained parameters may get no gradient in a step; DDP then needs
        ``find_unused_parameters``."""
        return False

    @property
    def validates_at_checkpoints(self) -> bool:
        """Whether validation samples are generated at each checkpoint if ``--validation_epochs`` is
        not given; otherwise they are generated only at the end."""
        return False

    @property
    def base_model(self) -> str:
        """Hub id or path of the model that is trained, as the user gave it."""
        raise NotImplementedError

    @property
    def sampled_prompts(self) -> list[str]:
        """Prompt of each validation image, in the order of the images; empty for text."""
        return []

    def warmup_steps(self, num_steps: int) -> int:
        """Return the number of warm-up steps in a run of ``num_steps`` steps."""
        return self.lr_warmup_steps or 0

    def to_dict(self) -> dict[str, Any]:
        """Return all options but the hub token, together with the `lora_facts` of LoRA files."""
        values = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        options: dict[str, Any] = {}
        # In the order of --help, without fields that are not options.
        for name in fields.options_of(self.groups):
            if name != "hub_token":
                options[name] = values[name]
        return options | lora_facts(self.lora_sources)

    @classmethod
    def changeable_options(cls) -> frozenset[str]:
        """Return the names of options that may usually change on resume (see `fixed_options`)."""
        names: set[str] = set()
        for group in cls.groups:
            group_may_change = getattr(group, "may_change_on_resume", False)
            for name, field in fields.options_of([group]).items():
                if group_may_change or fields.option_of(field).may_change_on_resume:
                    names.add(name)
        return frozenset(names)

    def resume_settings(self) -> dict[str, Any]:
        """Return the options that may not change on resume, as JSON values (`fixed_options`)."""
        settings, _ = strict_json(self.to_dict())
        return self.fixed_options(settings)

    def fixed_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return a run's recorded options without those that may change on resume.

        If held-out measurements decide which weights the run exports, the options that define these
        measurements (`measurement_options`) may not change either.
        """
        names = self.changeable_options()
        if self.depends_on_heldout:
            names -= self.measurement_options
        return without_options(settings, names)

    @property
    def depends_on_heldout(self) -> bool:
        """Whether held-out measurements decide which weights the run exports."""
        return bool(self.keep_best or self.early_stopping_patience)

    @property
    def heldout_measure(self) -> str:
        """Log name of the held-out measure that chooses the exported weights."""
        return HELDOUT_LOSS

    @property
    def measurement_options(self) -> frozenset[str]:
        """Options that define what is measured, and on which samples."""
        return HELDOUT_OPTIONS | {"choose_by"}

    @property
    def measures_samples(self) -> bool:
        """Whether a measurement generates images or answers, which takes longer than a loss."""
        return False

    def measurement_interval(self, steps: int) -> int:
        """Return the number of steps between measurements.

        It is a 20th of the run, or a 5th if a measurement generates samples.
        """
        return max(1, steps // (5 if self.measures_samples else 20))
