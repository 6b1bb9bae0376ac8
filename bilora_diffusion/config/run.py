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

# Options that say which samples are held out.
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
    alternatives: ClassVar[tuple[tuple[str, str], ...]]  # as `CommandLine.read` takes them
    description: ClassVar[str]
    usage: ClassVar[str]

    # Names of the options that the command line or its recipe gives.
    given_options: frozenset[str]
    # LoRA files that options name, by the option's name.
    lora_sources: dict[str, LoraSource]

    # Options that only one script has, or redeclares with another default.
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

    def derive_defaults(self) -> Self:
        """Return the configuration with this script's derived defaults.

        Some of them depend on the small files of the base model.

        Raises:
            UserError: these files can't be read, or the model lacks something that an option needs.
        """
        raise NotImplementedError

    def check_inputs(self) -> None:
        """Check that all input files and folders exist.

        Raises:
            UserError: one is missing; the message names it and the fix.
        """
        raise NotImplementedError

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a step may leave trained parameters without a gradient, so that DDP needs
        ``find_unused_parameters``."""
        return False

    @property
    def validates_at_checkpoints(self) -> bool:
        """Whether validation samples are generated at each checkpoint if ``--validation_epochs`` is
        not given; else only at the end."""
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
        """Number of warm-up steps in a run of ``num_steps`` steps."""
        return self.lr_warmup_steps or 0

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values, without the hub token, and the hashes of LoRA files."""
        values = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        options: dict[str, Any] = {}
        # In the order of --help, without fields that are not options.
        for name in fields.options_of(self.groups):
            if name != "hub_token":
                options[name] = values[name]
        return options | lora_facts(self.lora_sources)

    @classmethod
    def changeable_options(cls) -> frozenset[str]:
        """Names of the options that may change on resume, since they do not change the training."""
        names: set[str] = set()
        for group in cls.groups:
            group_may_change = getattr(group, "may_change_on_resume", False)
            for name, field in fields.options_of([group]).items():
                if group_may_change or fields.option_of(field).may_change_on_resume:
                    names.add(name)
        return frozenset(names)

    def resume_settings(self) -> dict[str, Any]:
        """The options that may not change on resume, as JSON values; see `fixed_options`."""
        settings, _ = strict_json(self.to_dict())
        return self.fixed_options(settings)

    def fixed_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded options of a run without those that may change on resume.

        Where a measurement decides which weights the run exports, its options may not change.
        """
        names = self.changeable_options()
        if self.depends_on_heldout:
            names -= self.measurement_options
        return without_options(settings, names)

    @property
    def depends_on_heldout(self) -> bool:
        """Whether the measurement of held-out samples decides which weights the run exports."""
        return bool(self.keep_best or self.early_stopping_patience)

    @property
    def heldout_measure(self) -> str:
        """Log name of the held-out metric that selects the exported weights."""
        return HELDOUT_LOSS

    @property
    def measurement_options(self) -> frozenset[str]:
        """The options that say what is measured, and on which samples."""
        return HELDOUT_OPTIONS | {"choose_by"}

    @property
    def measures_samples(self) -> bool:
        """Whether a measurement generates images or answers, which takes longer than a loss."""
        return False

    def measurement_interval(self, steps: int) -> int:
        """Steps between measurements: 20 per run, or 5 if a measurement generates samples."""
        return max(1, steps // (5 if self.measures_samples else 20))
