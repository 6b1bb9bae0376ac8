"""Prompts that ask for what runs were trained on, for scoring without ``--prompts``.

The first of these that the first run has:

1. it was trained on icons that are shipped: their prompts, ``3d_icon``, or the held-out captions of
   the icons in other colours and of the animals;
2. held-out images with captions: the captions, with their pictures as the ground truth;
3. validation prompts;
4. an instance prompt or a trigger word: it, in the contexts of ``eval/prompts/contexts.txt``;
5. captions of its training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.captions import add_trigger
from bilora_diffusion.image.derived import ICONS
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.run.data import samples_of_part

from ..subjects import Subject
from .prompts import CONTEXTS, FOLDER, Prompt, instance_of, lines_of, read

ICON_PROMPTS = "3d_icon"
MOST_HELDOUT = 64
"""Held-out captions that are asked for by default: two checkpoints by two seeds are 256 images."""
MOST_TRAINING = 20
"""Captions of training images: as many as there are contexts."""
PLACE = "{prompt}"
FIX = "give --prompts, a text file with a prompt on each line"

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """Prompts by default.

    Args:
        name: of the set, for the first line and the report.
        prompts: those that are scored.
        is_of_icons: the runs learned shipped icons, whose general prompts are shipped too.
        note: a sentence that has to stand beside the scores, or "".
    """

    name: str
    prompts: Sequence[Prompt]
    is_of_icons: bool = False
    note: str = ""


def of_subjects(subjects: Sequence[Subject], base: str) -> Question:
    """The question of the first run; its note names the runs that alone would be asked another.

    Args:
        subjects: all that are scored; files and the base model say nothing of their training.
        base: the base model; files on a miniature are asked for its icons.
    """
    runs = _runs(subjects)
    if not runs:
        if base in mini.PIPELINES:
            return _icons(ICON_PROMPTS)
        raise UserError(f"no run folder is named that says what was learned: {FIX}.")
    first, *further_runs = runs
    question = _of_run(first)
    texts = [prompt.text for prompt in question.prompts]
    different = []
    for run in further_runs:
        if [prompt.text for prompt in _of_run(run).prompts] != texts:
            different.append(_name(run))
    if not different:
        return question
    note = (
        f"All prompts are those of {_name(first)}; scored alone, {', '.join(different)} would be"
        " asked others."
    )
    return replace(question, note=note)


def in_contexts(subjects: Sequence[Subject]) -> Question:
    """The instance prompt of the first run in the shipped contexts (``--prompts contexts``)."""
    runs = _runs(subjects)
    if not runs:
        raise UserError(
            f"--prompts {CONTEXTS} needs the instance prompt of a run: name a run folder."
        )
    name, prompts = _name(runs[0]), _contexts(_concepts(runs[0]))
    if not prompts:
        raise UserError(
            f"--prompts {CONTEXTS} needs an instance prompt or a trigger word, and {name} was"
            " trained with neither: give a file of prompts."
        )
    return Question(f"instance prompt of {name} in contexts", prompts, _icon_set(runs[0]) != "")


def learned_icons(subjects: Sequence[Subject], base: str) -> bool:
    """Test that the first run learned shipped icons; without runs, that the base model is ours."""
    runs = _runs(subjects)
    return _icon_set(runs[0]) != "" if runs else base in mini.PIPELINES


def _runs(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects that are run folders, each folder once."""
    runs: dict[Path, Subject] = {}
    for subject in subjects:
        if subject.folder is not None:
            runs.setdefault(subject.folder, subject)
    return list(runs.values())


def _icon_set(run: Subject) -> str:
    """The prompt set of the shipped icons that a run learned; "" for other images."""
    datasets = {_text(concept, "dataset_name") for concept in _concepts(run)}
    if datasets <= {ICONS, mini.MINI}:
        return ICON_PROMPTS
    # In other colours, and of animals, the pictures of 3d_icon are no ground truth.
    heldout = mini.heldout_name(str(datasets.pop()))
    return heldout if not datasets and heldout in mini.FOLDERS else ""


def _of_run(run: Subject) -> Question:
    name, concepts = _name(run), _concepts(run)
    if icon_set := _icon_set(run):
        return _icons(icon_set)
    heldout = _heldout(run, concepts)
    if len(heldout) > 1:
        title = f"held-out captions of {name}, whose pictures are the ground truth"
        if len(heldout) > MOST_HELDOUT:
            title = f"the first {MOST_HELDOUT} of {len(heldout)} {title}"
        return Question(title, heldout[:MOST_HELDOUT])

    validation = _distinct(_validation_prompts(run))
    if validation:
        return Question(f"validation prompts of {name}", validation)
    contexts = _contexts(concepts)
    if contexts:
        return Question(f"instance prompt of {name} in contexts", contexts)

    captions: list[Prompt] = []
    for concept in concepts:
        dataset = _text(concept, "dataset_name") or _text(concept, "instance_data_dir")
        if dataset is not None:
            images = _open(run, concept, dataset, _text(concept, "dataset_config_name"))
            captions += _captioned(images, concept, with_pictures=False)
    captions = _distinct(captions)
    if not captions:
        raise UserError(
            f"{name} has neither held-out captions nor a validation prompt, an instance prompt or"
            f" captions: {FIX}."
        )
    return Question(f"training captions of {name}", captions[:MOST_TRAINING])


def _icons(name: str) -> Question:
    prompts = read(name)
    if name != ICON_PROMPTS:
        prompts = prompts[:MOST_HELDOUT]
    return Question(name, prompts, is_of_icons=True)


def _heldout(run: Subject, concepts: Sequence[Config]) -> list[Prompt]:
    """Different captions of the run's held-out images, each with the first picture that has it."""
    prompts: list[Prompt] = []
    for concept in concepts:
        dataset = _text(concept, "validation_dataset")
        if dataset is None:
            continue
        images = _open(run, concept, dataset)
        names = [entry.name for entry in images.entries]
        part = samples_of_part(_text(concept, "validation_part"), names, images.label)
        prompts += _captioned(images.only(part), concept, with_pictures=True)
    return _distinct(prompts)


def _captioned(images: ImageSet, concept: Config, with_pictures: bool) -> list[Prompt]:
    """The captions of images as the run saw them; with pictures, those of images in files."""
    prompts = []
    for entry in images.entries:
        if entry.caption is None:
            continue
        text = add_trigger(entry.caption, _text(concept, "trigger_word")).strip()
        file = entry.encoded() if with_pictures else None
        if isinstance(file, bytes):  # of a set on the hub, which has no files
            continue
        prompts.append(Prompt(text, instance_of(text), file))
    return prompts


def _validation_prompts(run: Subject) -> list[Prompt]:
    texts = run.record["config"].get("validation_prompts") or []
    return [Prompt(text.strip(), instance_of(text)) for text in texts if text.strip()]


def _contexts(concepts: Sequence[Config]) -> list[Prompt]:
    """Each concept's instance prompt, or its trigger word, in contexts; fewer for many concepts.

    "a TOK icon, in the style of TOK" becomes "a TOK icon in fresh snow, in the style of TOK".
    """
    contexts = lines_of(FOLDER / f"{CONTEXTS}.txt", CONTEXTS)
    count = max(1, MOST_HELDOUT // len(concepts))
    prompts = []
    for concept in concepts:
        trigger = _text(concept, "trigger_word")
        plain = _text(concept, "instance_prompt") or trigger
        if plain is None:
            continue
        head, comma, tail = plain.partition(",")
        for context in contexts[:count]:
            placed = context.replace(PLACE, head.strip())
            text = add_trigger(f"{placed}{comma}{tail}", trigger)
            prompts.append(Prompt(text, context.replace(PLACE, "").strip()))
    return _distinct(prompts)


def _open(run: Subject, concept: Config, dataset: str, config_name: str | None = None) -> ImageSet:
    """Images with captions as the run's options read them."""
    try:
        return open_images(
            dataset,
            image_column=_text(concept, "image_column") or "image",
            caption_column=_text(concept, "caption_column"),
            config_name=config_name,
            cache_dir=_text(concept, "cache_dir"),
            skip_bad_images=True,
        )
    except UserError as error:
        raise UserError(
            f"the images of {_name(run)} can't be opened for their captions"
            f" ({str(error).rstrip('.')}): {FIX}."
        ) from error


def _concepts(run: Subject) -> list[Config]:
    """The options of a run as each of its concepts has them."""
    config = run.record["config"]
    return [{**config, **concept} for concept in config.get("concepts") or [{}]]


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each text."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def _text(config: Config, name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) and value.strip() else None


def _name(run: Subject) -> str:
    return Path(str(run.folder)).resolve().name
