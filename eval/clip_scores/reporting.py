"""The scores and the report of a comparison, in the form of the paper's Table 4 and Figure A1."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from bilora_diffusion.config.lora_sources import SAMPLING_OPTION
from bilora_diffusion.core.files import counted
from bilora_diffusion.core.values import ADAPTER_GUIDANCE, guidance_title

from ..results import compare
from ..results.plot import canvas
from ..results.report import INTERVALS, escape_table_cell, number, section, table
from ..results.table import Metric, Result
from .prompts import ICON_PROMPTS

# The paper's Table 4 and Figure A1 show six prompts; the table also has the average over all.
TABLE_ROWS = 6
# With fewer prompts, the report warns that means are unreliable.
FEW_PROMPTS = 10
# Scores in the paper's Table 4
PAPER = ("i2t", "t2t")
BLANK = "–"
GRID = "grid.png"
TRUTH = "ground truth"
# Maximum side of an image in the grid; larger images are scaled down.
CELL_PIXELS = 256


# Values are raw cosines; tables show them times 100.
_cosine = partial(Metric, higher_is_better=True, scale=100, form=".2f")
# All scores; the first two are the paper's (Table 4).
METRICS = {
    "i2t": _cosine("CLIP I2T", "cosine between the embeddings of the image and its prompt"),
    "t2t": _cosine(
        "CLIP T2T", "cosine between the embeddings of the prompt and the image's caption"
    ),
    "truth": _cosine(
        "ground truth", "cosine between the embeddings of the image and the held-out picture"
    ),
    "nearest": _cosine(
        "memorization",
        "cosine between the embeddings of the image and its nearest training picture; a learned"
        " style also raises it, so look at the nearest pairs",
        higher_is_better=False,
    ),
    "dino_truth": _cosine(
        "DINO ground truth",
        "cosine between the DINOv2 embeddings of the image and the held-out picture",
    ),
    "dino_nearest": _cosine(
        "DINO memorization",
        "cosine between the DINOv2 embeddings of the image and its nearest training picture",
        higher_is_better=False,
    ),
    "drift": _cosine(
        "unchanged",
        "cosine between the embeddings of the image and the base model's image, over the general"
        " prompts",
    ),
}


def names(result: Result) -> dict[str, str]:
    """Map the text of each scored prompt to its row's title: its instance, or else the text."""
    titles = {}
    for prompt in result.settings["prompts"]:
        if not prompt["general"]:
            titles[prompt["text"]] = prompt["instance"] or prompt["text"]
    return titles


def introduction(result: Result) -> str:
    """Describe how the images were sampled, followed by the notes on the scores."""
    settings = result.settings
    count = len(names(result))
    sampling = settings["sampling"]
    scorer = settings["scorer"]
    seeds = settings["seeds"]
    notes = []
    if scorer["kind"] == "embedded":  # replaces the scorer's shorter note
        notes.append(
            f"These scores come from {scorer['name']}, a small model that knows only icons. They"
            " cannot be compared with the paper's scores."
        )
    elif scorer["note"]:
        notes.append(scorer["note"])
    if settings["captioner"] and settings["captioner"]["note"]:
        notes.append(settings["captioner"]["note"])
    if count < FEW_PROMPTS:
        notes.append(
            f"With fewer than {FEW_PROMPTS} prompts, means are unreliable: intervals are wide or"
            " missing."
        )
    source = ""
    if sampling["guidance_from"] != ADAPTER_GUIDANCE:
        title = guidance_title(sampling["guidance_from"])
        source = f" from the unconditional prediction of {title}"
    if SAMPLING_OPTION in sampling:
        strength = sampling[f"{SAMPLING_OPTION}_strength"]
        source += (
            f", the LoRA file {sampling[SAMPLING_OPTION]} at strength {strength:g} for all images"
        )
    if "scheduler" in sampling:
        source += f", scheduler {sampling['scheduler']}"
    weights = ""
    if precision := sampling.get("base_precision"):
        weights = f", adapters merged and rounded to {precision}"
    if noise := sampling.get("weight_noise"):
        weights += f", noise of {noise:g} standard deviations on the merged weights"
    sentence = (
        f"{count} prompts ({settings['prompt_set']}), {counted(len(seeds), 'seed')},"
        f" {sampling['steps']} steps, guidance {sampling['guidance_scale']:g}{source},"
        f" {sampling['size']} pixels, base model {sampling['base_model']}{weights}."
        " All adapters get the same prompts and the same initial noise."
    )
    if settings["truth_i2t"] is not None:
        score = number(settings["truth_i2t"], METRICS["i2t"])
        sentence += f" The held-out pictures themselves have a CLIP I2T score of {score}."
    distinct_notes = dict.fromkeys([*notes, *result.notes])
    return "\n\n".join([sentence, *(f"> {note}" for note in distinct_notes)])


def legend(result: Result) -> str:
    """Explain the tables and the scores in them."""
    measured = {line.metric for line in result.summaries}
    sentences = []
    for name, metric in result.metrics.items():
        if name in measured:
            sentences.append(f"{metric.title}: {metric.explanation}.")
    return (
        "Scores are cosines x 100. They are averaged over the seeds of each prompt, then over the"
        f" prompts, with {INTERVALS}. Differences are from {escape_table_cell(result.control)},"
        " paired by prompt, with their interval and the number of prompts with a better score. "
        + " ".join(sentences)
    )


def answers(result: Result) -> list[str]:
    """Return one sentence on each run's best step; [] if the subjects are not checkpoints."""
    return [answer["sentence"] for answer in result.settings.get("answers", ())]


def training_seeds(result: Result, group: str) -> str:
    """Return a group's number of runs; a dash for the base model and for files."""
    runs = [entry for entry in result.members(group) if entry.kind == "run"]
    return str(len(runs)) if runs else BLANK


def paper_table(result: Result) -> str:
    """Return a section in the form of the paper's Table 4; "" for other prompt sets."""
    if result.settings["prompt_set"] != ICON_PROMPTS:
        return ""
    return section("In the form of the paper's Table 4", scores(result))


def scores(result: Result) -> str:
    """Return a table of the first prompts and the average over all prompts.

    It has a column for each score and group; the best values are bold.
    """
    columns: list[tuple[str, str]] = []  # score and group
    heads = ["prompt"]
    column_values = []  # for each column, prompt -> value
    means = []
    for name in PAPER:
        rows_of_score = result.select(name)
        if not rows_of_score:
            continue
        values = compare.units(rows_of_score, compare.ITEM)
        for group in result.groups:
            columns.append((name, group))
            heads.append(f"{result.metric(name).title} {group}")
            column_values.append(values.get(group, {}))
            line = result.summary(group, name)
            means.append(None if line is None else line.mean)
    titles = names(result)
    rows = []
    for text in list(titles)[:TABLE_ROWS]:
        prompt_values = [values.get(text) for values in column_values]
        rows.append([titles[text], *_cells(result, columns, prompt_values)])
    rows.append([f"average of {len(titles)}", *_cells(result, columns, means)])
    return table(heads, rows)


def _cells(
    result: Result, columns: Sequence[tuple[str, str]], values: Sequence[float | None]
) -> list[str]:
    """Format the cells of a row; the best value of each score is bold, including ties."""
    best: dict[str, float] = {}
    for (name, _), value in zip(columns, values, strict=True):
        if value is not None:
            best[name] = max(value, best.get(name, value))
    cells = []
    for (name, _), value in zip(columns, values, strict=True):
        if value is None:
            cells.append(BLANK)
            continue
        cell = number(value, result.metric(name))
        if value == best[name]:
            cell = f"**{cell}**"
        cells.append(cell)
    return cells


def models(result: Result) -> list[str]:
    """Return sentences on the number of truncated prompts and on the models used for scoring."""
    prompts = result.settings["prompts"]
    sentences = [
        f"{sum(prompt['truncated'] for prompt in prompts)} of {len(prompts)} prompts exceed the"
        " length limit of the scorer's text encoder and were truncated."
    ]
    for role in ("scorer", "captioner", "image_model"):
        if model := result.settings[role]:
            exact = ", ".join(filter(None, (model["kind"], model["model"], model["revision"])))
            title = role.capitalize().replace("_", " ")
            sentences.append(f"{title}: {model['name']} ({exact}).")
    return sentences


def grid(result: Result, folder: Path, truths: Mapping[str, Image.Image]) -> bool:
    """Draw a grid like the paper's Fig. A1, with prompts in rows and groups in columns.

    It shows the first prompts at the first seed. The images of a row share their initial noise.

    Returns:
        Whether a grid was drawn; False if there is no scored prompt.
    """
    texts = list(names(result))[:TABLE_ROWS]
    if not texts:
        return False
    first_seed = result.settings["seeds"][0]
    images = {}  # (prompt, group) -> file
    for row in result.select("image"):
        if row.seed == first_seed:
            images[row.item, row.group] = row.note
    heads = list(result.groups)
    if truths.keys() & set(texts):
        heads.append(TRUTH)
    size = (1.5 * len(heads) + 1.2, 1.5 * len(texts) + 0.4)
    with canvas(folder / GRID, len(texts), len(heads), figsize=size) as (_, axes):
        for line, text in zip(axes, texts, strict=True):
            line[0].set_ylabel(_wrap(names(result)[text]), fontsize=8)
            for group, axis in zip(heads, line, strict=True):
                if (text, group) in images:
                    _show(axis, Image.open(folder / images[text, group]))
                elif group == TRUTH:
                    _show(axis, truths.get(text))
                else:
                    _show(axis, None)
        for axis, head in zip(axes[0], heads, strict=True):
            axis.set_title(_wrap(head), fontsize=9)
    return True


def _show(axis: Any, image: Image.Image | None) -> None:
    """Draw an image without ticks; nothing for None."""
    axis.set_xticks([])
    axis.set_yticks([])
    if image is None:
        axis.set_frame_on(False)
        return
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((CELL_PIXELS, CELL_PIXELS))
    axis.imshow(thumbnail, interpolation="lanczos")


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 18)[:3])
