"""What a comparison by CLIP scores leaves: ``scores.json``, typed and versioned.

    result = ScoresResult.read(folder)          # refuses another version in one sentence
    result.write(folder)

Every score is raw: a cosine in [-1, 1]. Reports and the viewer show it times 100.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bilora_diffusion.durable import dump_json, strict_json, write_text
from bilora_diffusion.errors import UserError

from ..statistics import Interval

SCHEMA_VERSION = 1
KIND = "clip_scores"
FILE = "scores.json"


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
        tokens: length for the scorer, with start and end tokens.
        truncated: longer than the scorer's text encoder takes.
    """

    text: str
    instance: str | None = None
    reference: str | None = None
    general: bool = False
    tokens: int | None = None
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
class ModelEntry:
    """A scorer or a captioner: its name as shown, and what identifies it exactly.

    Args:
        name: shown beside every score.
        kind: "open_clip", "transformers", "embedded", "blip", "coca" or "retrieval".
        model: architecture, hub id or folder name.
        revision: pretrained tag, commit or digest of the weights.
        note: a sentence that has to stand beside its scores, or "".
    """

    name: str
    kind: str
    model: str
    revision: str | None = None
    note: str = ""


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

    def write(self, folder: Path) -> None:
        """Write ``scores.json`` in one piece."""
        record, _ = strict_json({"schema_version": SCHEMA_VERSION, "kind": KIND, **asdict(self)})
        write_text(folder / FILE, dump_json(record))

    @classmethod
    def read(cls, folder: Path) -> ScoresResult:
        """The result in a folder.

        Raises:
            UserError: there is none, it is damaged, or another version wrote it.
        """
        path = Path(folder) / FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version = record["schema_version"]
        except OSError as error:
            raise UserError(f"{folder} holds no {FILE} that can be read: give another") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: run python -m eval.clip_scores again") from error
        if version != SCHEMA_VERSION or record.get("kind") != KIND:
            raise UserError(
                f"{path} is {record.get('kind')!r} of schema version {version!r}, not {KIND!r} of"
                f" {SCHEMA_VERSION}: run python -m eval.clip_scores again"
            )
        try:
            return _typed(cls, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: run python -m eval.clip_scores again") from error


def _typed(cls: type[ScoresResult], record: dict[str, Any]) -> ScoresResult:
    values = {
        entry.name: record[entry.name]
        for entry in fields(cls)
        if entry.name in record or entry.default_factory is MISSING
    }
    captioner = values["captioner"]
    result = cls(
        **values
        | {
            "scorer": ModelEntry(**values["scorer"]),
            "captioner": None if captioner is None else ModelEntry(**captioner),
            "adapters": [AdapterEntry(**row) for row in values["adapters"]],
            "prompts": [PromptEntry(**row) for row in values["prompts"]],
            "images": [ImageScore(**row) for row in values["images"]],
            "summaries": [Summary(**_intervals(row)) for row in values["summaries"]],
            "comparisons": [Comparison(**_intervals(row)) for row in values["comparisons"]],
        }
    )
    _check(result)
    return result


def _check(result: ScoresResult) -> None:
    """Raise ValueError or TypeError for a position that is not there and an unknown score."""
    adapters = [image.adapter for image in result.images]
    adapters += [row.adapter for row in result.summaries]
    adapters += [at for row in result.comparisons for at in (row.adapter, row.control)]
    prompts = [image.prompt for image in result.images]
    for positions, there in ((adapters, result.adapters), (prompts, result.prompts)):
        if not all(0 <= position < len(there) for position in positions):
            raise ValueError("a position is out of range")
    if not {row.metric for row in [*result.summaries, *result.comparisons]} <= METRICS.keys():
        raise ValueError("a score is unknown")


def _intervals(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: Interval(**value) if key.endswith("interval") and value is not None else value
        for key, value in row.items()
    }
