"""What the configurations of all training scripts have in common."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any, ClassVar, Self


class RunConfig:
    """A flat frozen dataclass of options, made of groups.

    Attributes:
        groups: the option dataclasses it is made of, in the order of ``--help``.
        without_influence: options that a resumed run may change freely: they do not touch what is
            learned.
    """

    groups: ClassVar[tuple[Any, ...]]
    without_influence: ClassVar[frozenset[str]]

    train_text_encoder: bool = False  # what only some scripts have as an option
    eval_on_start: bool = False

    report_to: str
    scale_lr: bool
    learning_rate: float
    train_batch_size: int
    gradient_accumulation_steps: int
    lr_warmup_steps: int | None

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in their order; none for text."""
        return []

    @property
    def log_with(self) -> str | None:
        """The tracker for ``Accelerator(log_with=...)``."""
        return None if self.report_to == "none" else self.report_to

    def for_processes(self, count: int) -> Self:
        """Carry out ``--scale_lr`` for a run on ``count`` processes; call it once.

        The auxiliary's own rate keeps its ratio to the primary's; that of text encoders stays.
        """
        if not self.scale_lr:
            return self
        factor = self.gradient_accumulation_steps * self.train_batch_size * count
        names = ("learning_rate", "auxiliary_learning_rate")
        rates = {name: getattr(self, name) for name in names}
        scaled = {name: rate * factor for name, rate in rates.items() if rate is not None}
        return dataclasses.replace(self, **scaled)  # pyright: ignore[reportArgumentType]

    def warmup_steps(self, num_steps: int) -> int:
        """Steps in which the learning rate rises from 0, of ``num_steps`` in all."""
        return self.lr_warmup_steps or 0

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values; the hub token is left out."""
        names = [field.name for group in self.groups for field in fields(group)]
        values = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        return {name: values[name] for name in names if name != "hub_token"}

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide what is learned: a resumed run must have the same."""
        return {k: v for k, v in self.to_dict().items() if k not in self.without_influence}
