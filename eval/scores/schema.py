"""What a comparison by CLIP scores leaves: ``scores.json``, typed and versioned.

    SCORES.write(result, folder)
    result = SCORES.read(ScoresResult, folder)  # refuses another version in one sentence

Every score is raw: a cosine in [-1, 1]. Reports and the viewer show it times 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..statistics import Interval
from .models import ModelEntry


@dataclass(frozen=True)
class Metric:
    """A score of an image or of a prompt.

    Args:
        title: for tables.
        explanation: one sentence for the report's legend.
        higher_is_better: None for a score that describes and does not judge.
    """

    title: str
    explanation: str
    higher_is_better: bool | None = True


METRICS: Mapping[str, Metric] = {
    "i2t": Metric("CLIP I2T", "cosine of the embeddings of image and prompt"),
    "t2t": Metric("CLIP T2T", "cosine of the embeddings of prompt and caption of the image"),
    "truth": Metric("ground truth", "cosine of the embeddings of image and held-out picture"),
    "nearest": Metric(
        "memorization",
        "cosine of the embeddings of image and nearest training picture; a learned style raises it"
        " too, so look at the images that are nearest",
        False,
    ),
    "drift": Metric(
        "unchanged", "cosine of the embeddings of image and base model's image, general prompts"
    ),
    "diversity": Metric(
        "diversity", "1 - cosine, mean over pairs of one prompt's images from several seeds", None
    ),
}
"""All scores by name; the first two are the paper's (Table 4)."""


@dataclass(frozen=True)
class AdapterEntry:
    """One column of the comparison.

    Args:
        label: unique; what tables and figures show.
        kind: "base", "run", "file" or "hub".
        source: the argument it was given as, without machine paths.
        method: of training, where the file or the run says.
        digest: of the weights; "" for the base model.
        images: folder of its images, relative to the result's folder.
    """

    label: str
    kind: str
    source: str
    method: str | None
    digest: str
    images: str


@dataclass(frozen=True)
class PromptEntry:
    """One prompt.

    Args:
        text: as the model and the scorer get it.
        instance: what it names, where the prompt set says.
        reference: file name of the held-out picture it describes, where one exists.
        general: asked to measure drift and in no other score.
        truncated: longer than the scorer's text encoder takes.
    """

    text: str
    instance: str | None = None
    reference: str | None = None
    general: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class ImageScore:
    """One image and its scores; None where a score does not apply.

    Args:
        adapter, prompt: positions in the result's lists.
        seed: of the initial noise.
        file: relative to the result's folder.
        caption: from the captioner.
        nearest_image: name of the training picture that is most like it.
    """

    adapter: int
    prompt: int
    seed: int
    file: str
    i2t: float | None = None
    t2t: float | None = None
    caption: str | None = None
    truth: float | None = None
    nearest: float | None = None
    nearest_image: str | None = None
    drift: float | None = None


@dataclass(frozen=True)
class Summary:
    """A score of one adapter: mean over prompts of the mean over seeds, with its 95 % interval."""

    adapter: int
    metric: str
    mean: float
    interval: Interval | None
    prompts: int


@dataclass(frozen=True)
class Comparison:
    """One adapter minus another in one score, paired by prompt (means over seeds).

    Args:
        mean: of the differences.
        interval: 95 %, of that mean.
        wins, ties, losses: prompts in which the adapter's score is higher, equal, lower.
        win_rate: (wins + ties / 2) / prompts.
        win_rate_interval: 95 %.
    """

    metric: str
    adapter: int
    control: int
    mean: float
    interval: Interval | None
    wins: int
    ties: int
    losses: int
    win_rate: float
    win_rate_interval: Interval | None


@dataclass(frozen=True)
class ScoresResult:
    """Everything that a report or the viewer shows.

    Args:
        sampling: steps, guidance_scale, size, scale of the adapters, and the base model's name.
        diversity: adapter's label -> prompt's text -> score, with at least two seeds.
        figures: PNG files beside ``scores.json``.
        provenance: command, versions, commit, device.
        notes: sentences that a reader has to know.
    """

    scorer: ModelEntry
    captioner: ModelEntry | None
    sampling: dict[str, Any]
    seeds: list[int]
    prompt_set: str
    adapters: list[AdapterEntry]
    prompts: list[PromptEntry]
    images: list[ImageScore]
    summaries: list[Summary]
    comparisons: list[Comparison]
    diversity: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a position that is not there and an unknown score."""
        adapters = [image.adapter for image in self.images]
        adapters += [row.adapter for row in self.summaries]
        adapters += [at for row in self.comparisons for at in (row.adapter, row.control)]
        prompts = [image.prompt for image in self.images]
        for positions, there in ((adapters, self.adapters), (prompts, self.prompts)):
            if not all(0 <= position < len(there) for position in positions):
                raise ValueError("a position is out of range")
        if not {row.metric for row in [*self.summaries, *self.comparisons]} <= METRICS.keys():
            raise ValueError("a score is unknown")
