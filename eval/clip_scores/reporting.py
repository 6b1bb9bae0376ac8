"""Scores, and the report of a comparison: the paper's Table 4 and Figure A1, and sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bilora_diffusion.core.values import BASE_GUIDANCE

from .. import compare
from ..plot import canvas
from ..report import escaped, number, table
from ..table import Metric, Result

TABLE_ROWS = 6
"""The paper's Table 4 and Figure A1 show six prompts, the table their average over all too."""
FEW_PROMPTS = 10
PAPER = ("i2t", "t2t")
BLANK = "–"
GRID, TRUTH = "grid.png", "ground truth"
CELL_PIXELS = 256
"""Larger images are brought down to this before they are drawn."""


def _cosine(title: str, explanation: str, higher_is_better: bool | None = True) -> Metric:
    return Metric(title, explanation, higher_is_better, scale=100, form=".2f")


METRICS = {
    "i2t": _cosine("CLIP I2T", "cosine of the embeddings of image and prompt"),
    "t2t": _cosine("CLIP T2T", "cosine of the embeddings of prompt and caption of the image"),
    "truth": _cosine("ground truth", "cosine of the embeddings of image and held-out picture"),
    "nearest": _cosine(
        "memorization",
        "cosine of the embeddings of image and nearest training picture; a learned style raises it"
        " too, so look at the images that are nearest",
        False,
    ),
    "dino_truth": _cosine(
        "DINO ground truth", "cosine of DINOv2's embeddings of image and held-out picture"
    ),
    "dino_nearest": _cosine(
        "DINO memorization",
        "cosine of DINOv2's embeddings of image and its nearest training picture",
        False,
    ),
    "drift": _cosine(
        "unchanged", "cosine of the embeddings of image and base model's image, general prompts"
    ),
}
"""All scores; the first two are the paper's (Table 4). Values are raw, and shown times 100."""


def names(result: Result) -> dict[str, str]:
    """Text of each scored prompt -> what a row is called: the instance, else the whole prompt."""
    prompts = result.settings["prompts"]
    return {p["text"]: p["instance"] or p["text"] for p in prompts if not p["general"]}


def introduction(result: Result) -> str:
    """Sampling of the images, and sentences to be read before the scores."""
    settings, count = result.settings, len(names(result))
    sampling, scorer, seeds = settings["sampling"], settings["scorer"], settings["seeds"]
    notes = []
    if scorer["kind"] == "embedded":  # in place of the scorer's own note
        notes.append(
            f"These are scores of {scorer['name']}, a small model that knows icons only. They carry"
            " its name and are never set beside the paper's."
        )
    elif scorer["note"]:
        notes.append(scorer["note"])
    if settings["captioner"] and settings["captioner"]["note"]:
        notes.append(settings["captioner"]["note"])
    if 1 < count < FEW_PROMPTS:
        notes.append(f"With fewer than {FEW_PROMPTS} prompts a bootstrap interval is too narrow.")
    source = ""
    if sampling.get("guidance_from") == BASE_GUIDANCE:
        source = " from the base model's unconditional prediction"
    sentence = (
        f"{count} prompts ({settings['prompt_set']}), {len(seeds)} seed{'s' * (len(seeds) > 1)},"
        f" {sampling['steps']} steps, guidance {sampling['guidance_scale']:g}{source},"
        f" {sampling['size']} pixels, base model {sampling['base_model']}. All adapters get the"
        " same prompts and the same initial noise."
    )
    quoted = (f"> {note}" for note in dict.fromkeys([*notes, *result.notes]))
    return "\n\n".join([sentence, *quoted])


def legend(result: Result) -> str:
    """Explanation of the scores."""
    measured = {line.metric for line in result.summaries}
    sentences = []
    for name, metric in result.metrics.items():
        if name in measured:
            sentences.append(f"{metric.title}: {metric.explanation}.")
    return (
        "Cosines x 100, each prompt's the mean over seeds, with 95 % intervals of the mean by"
        f" bootstrap over prompts (BCa). Difference: to {escaped(result.control)},"
        " paired by prompt, and in how many prompts it is better. " + " ".join(sentences)
    )


def scores(result: Result) -> str:
    """The first prompts and the average over all: a column per score and group, best in bold."""
    scored = [name for name in PAPER if result.select(name)]
    columns = [(name, group) for name in scored for group in result.groups]
    heads = [f"{result.metric(name).title} {group}" for name, group in columns]
    values = {name: compare.units(result.select(name), over="item") for name in scored}
    row_names, rows = names(result), []
    for text in list(row_names)[:TABLE_ROWS]:
        of_prompt = [values[name].get(group, {}).get(text) for name, group in columns]
        rows.append([row_names[text], *_cells(result, columns, of_prompt)])
    lines = [result.summary(group, name) for name, group in columns]
    means = _cells(result, columns, [None if line is None else line.mean for line in lines])
    rows.append([f"average of {len(row_names)}", *means])
    return table(["prompt", *heads], rows)


def _cells(
    result: Result, columns: Sequence[tuple[str, str]], values: Sequence[float | None]
) -> list[str]:
    """A row's cells; the best of each score in bold, several where they are equal."""
    best: dict[str, float] = {}
    for (name, _), value in zip(columns, values, strict=True):
        if value is not None:
            best[name] = max(value, best.get(name, value))
    cells = []
    for (name, _), value in zip(columns, values, strict=True):
        cell = BLANK if value is None else number(value, result.metric(name))
        is_best = value is not None and value == best[name]
        cells.append(f"**{cell}**" if is_best else cell)
    return cells


def models(result: Result) -> list[str]:
    """Models that scored, and the number of prompts that they did not read to their end."""
    prompts = result.settings["prompts"]
    sentences = [
        f"{sum(prompt['truncated'] for prompt in prompts)} of {len(prompts)} prompts are longer"
        " than the scorer's text encoder takes and were cut."
    ]
    for role in ("scorer", "captioner", "image_model"):
        if model := result.settings.get(role):
            exact = ", ".join(filter(None, (model["kind"], model["model"], model["revision"])))
            title = role.capitalize().replace("_", " ")
            sentences.append(f"{title}: {model['name']} ({exact}).")
    return sentences


def grid(result: Result, folder: Path, truths: Mapping[str, Image.Image]) -> bool:
    """The first prompts at the first seed as in Fig. A1: one a row, one group a column.

    The images of a row share their initial noise. Returns whether there was anything to draw.
    """
    texts = list(names(result))[:TABLE_ROWS]
    if not texts:
        return False
    first = result.settings["seeds"][0]
    images = {(r.item, r.group): r.note for r in result.select("image") if r.seed == first}
    heads = [*result.groups, *([TRUTH] if truths.keys() & set(texts) else [])]
    size = (1.5 * len(heads) + 1.2, 1.5 * len(texts) + 0.4)
    with canvas(folder / GRID, len(texts), len(heads), figsize=size) as (_, axes):
        for line, text in zip(axes, texts, strict=True):
            line[0].set_ylabel(_wrapped(names(result)[text]), fontsize=8)
            for group, axis in zip(heads, line, strict=True):
                file = images.get((text, group))
                truth = truths.get(text) if group == TRUTH else None
                _show(axis, Image.open(folder / file) if file else truth)
        for axis, head in zip(axes[0], heads, strict=True):
            axis.set_title(_wrapped(head), fontsize=9)
    return True


def _show(axis: Any, image: Image.Image | None) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if image is None:
        axis.set_frame_on(False)
        return
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((CELL_PIXELS, CELL_PIXELS))
    axis.imshow(thumbnail, interpolation="lanczos")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 18)[:3])
