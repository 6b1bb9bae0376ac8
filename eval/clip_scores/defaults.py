"""Default prompts, without ``--prompts``: they ask for what the first run was trained on.

They are the first of these that the run has:

1. for shipped icons their prompts, ``3d_icon``; for icons in other colors and for animals their
   held-out captions;
2. the captions of its held-out images, whose pictures are the ground truth;
3. its instance prompt or trigger word in the contexts of ``eval/prompts/contexts.txt``, since one
   or two validation prompts tell little;
4. its validation prompts;
5. the captions of its training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import counted
from bilora_diffusion.image.captions import add_trigger
from bilora_diffusion.image.derived import ICONS
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.run.data import choose_samples

from ..subjects import Subject
from .prompts import CONTEXTS, FOLDER, ICON_PROMPTS, Prompt, instance_of, numbered_lines, read

# Most held-out captions by default. Of two checkpoints and two seeds these are 256 images.
MAX_HELDOUT_PROMPTS = 64
# Most captions of training images by default, as many as there are contexts
MAX_TRAINING_PROMPTS = 20
# Stands in a context where the instance prompt goes
PLACE = "{prompt}"
FIX = "give --prompts, a text file with a prompt on each line"

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """The prompts of a comparison."""

    # Name of the set, for the first printed line and the report
    name: str
    # The scored prompts; `settings.question` adds the general ones
    prompts: Sequence[Prompt]
    # The runs learned shipped icons, which have shipped general prompts
    is_of_icons: bool = False
    # Sentences that must be read with the scores, or ""
    note: str = ""


def of_subjects(subjects: Sequence[Subject], base: str) -> Question:
    """The question of the first run; its note names the runs whose own question is another.

    Args:
        subjects: all that are scored. Only run folders have a record of their training.
        base: the base model. Without a run folder, adapters of a miniature get its icons' prompts.
    """
    runs = _runs(subjects)
    if not runs:
        if base in mini.PIPELINES:
            return _icons(ICON_PROMPTS)
        raise UserError(f"no run folder is named that says what was learned: {FIX}.")
    question = _of_run(runs[0])
    texts = [prompt.text for prompt in question.prompts]
    different = []
    for run in runs[1:]:
        run_texts = [prompt.text for prompt in _of_run(run).prompts]
        if run_texts != texts:
            different.append(_name(run))
    if not different:
        return question
    note = (
        f"All prompts are those of {_name(runs[0])}; scored alone, {', '.join(different)} would be"
        " asked others."
    )
    return replace(question, note=f"{question.note} {note}".strip())


def in_contexts(subjects: Sequence[Subject]) -> Question:
    """The instance prompt of the first run in the shipped contexts (``--prompts contexts``)."""
    runs = _runs(subjects)
    if not runs:
        raise UserError(
            f"--prompts {CONTEXTS} needs the instance prompt of a run: name a run folder."
        )
    name = _name(runs[0])
    prompts = _contexts(_concepts(runs[0]))
    if not prompts:
        raise UserError(
            f"--prompts {CONTEXTS} needs an instance prompt or a trigger word, and {name} was"
            " trained with neither: give a file of prompts."
        )
    return Question(f"instance prompt of {name} in contexts", prompts, _icon_set(runs[0]) != "")


def learned_icons(subjects: Sequence[Subject], base: str) -> bool:
    """Test that the first run learned shipped icons, or without a run that the base is ours."""
    runs = _runs(subjects)
    if runs:
        return _icon_set(runs[0]) != ""
    return base in mini.PIPELINES


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
    # Icons in other colors and animals have other pictures as their ground truth.
    if len(datasets) == 1:
        heldout = mini.heldout_name(str(datasets.pop()))
        if heldout in mini.FOLDERS:
            return heldout
    return ""


def _of_run(run: Subject) -> Question:
    """The question of one run, see the top of this file."""
    name = _name(run)
    concepts = _concepts(run)
    if icon_set := _icon_set(run):
        return _icons(icon_set)
    heldout, num_left_out = _heldout(run, concepts)
    # A single caption is that of all pictures, and asks for none of them.
    if len(heldout) > 1:
        title = f"held-out captions of {name}, whose pictures are the ground truth"
        if len(heldout) > MAX_HELDOUT_PROMPTS:
            title = f"the first {MAX_HELDOUT_PROMPTS} of {len(heldout)} {title}"
        note = ""
        if num_left_out:
            note = (
                f"{name} has {counted(num_left_out, 'held-out image')} without a caption in a file."
                " The run measured them with its instance prompt; here no sample is compared with"
                " them, since that prompt asks for no single picture: give each a caption"
                " (docs/data.md)."
            )
        return Question(title, heldout[:MAX_HELDOUT_PROMPTS], note=note)

    note = ""
    if any(_text(concept, "validation_dataset") for concept in concepts):
        note = (
            f"The held-out images of {name} have no captions of their own in files, so that no"
            " sample is compared with them: give each a caption (docs/data.md)."
        )
    contexts = _contexts(concepts)
    if contexts:
        return Question(f"instance prompt of {name} in contexts", contexts, note=note)
    validation = []
    for text in run.record["config"].get("validation_prompts") or []:
        if text.strip():
            validation.append(Prompt(text.strip(), instance_of(text)))
    if validation:
        return Question(f"validation prompts of {name}", _distinct(validation), note=note)

    # The training images are opened last, since a hub's set may have to be downloaded.
    captions: list[Prompt] = []
    for concept in concepts:
        dataset = _text(concept, "dataset_name") or _text(concept, "instance_data_dir")
        if dataset is not None:
            images = _open(run, concept, dataset, _text(concept, "dataset_config_name"))
            captions += _caption_prompts(images, concept, with_pictures=False)
    captions = _distinct(captions)
    if not captions:
        raise UserError(
            f"{name} has neither held-out captions nor a validation prompt, an instance prompt or"
            f" captions: {FIX}."
        )
    title = f"training captions of {name}"
    return Question(title, captions[:MAX_TRAINING_PROMPTS], note=note)


def _icons(name: str) -> Question:
    """The question of a shipped set; all prompts of ``3d_icon``, which is the paper's."""
    prompts = read(name)
    if name != ICON_PROMPTS:
        prompts = prompts[:MAX_HELDOUT_PROMPTS]
    return Question(name, prompts, is_of_icons=True)


def _heldout(run: Subject, concepts: Sequence[Config]) -> tuple[list[Prompt], int]:
    """The captions of the run's held-out images, each with the first picture that has it.

    Returns:
        The captions as prompts, and the number of images without a caption or file of their own.
    """
    prompts: list[Prompt] = []
    num_images = 0
    for concept in concepts:
        dataset = _text(concept, "validation_dataset")
        if dataset is None:
            continue
        images = _open(run, concept, dataset)
        # The images on which the run measured its held-out loss
        names = images.names()
        limit = run.record["config"].get("max_eval_samples")
        measured_images = images.only(choose_samples(names, limit))
        num_images += len(measured_images)
        prompts += _caption_prompts(measured_images, concept, with_pictures=True)
    return _distinct(prompts), num_images - len(prompts)


def _caption_prompts(images: ImageSet, concept: Config, with_pictures: bool) -> list[Prompt]:
    """The captions of images, with the trigger word that the run added.

    Args:
        with_pictures: each prompt gets its picture; images of a hub's set, which are not files, are
            left out.
    """
    prompts = []
    for entry in images.entries:
        if entry.caption is None:
            continue
        text = add_trigger(entry.caption, _text(concept, "trigger_word")).strip()
        file = None
        if with_pictures:
            file = entry.encoded_image()
            if isinstance(file, bytes):
                continue
        prompts.append(Prompt(text, instance_of(text), file))
    return prompts


def _contexts(concepts: Sequence[Config]) -> list[Prompt]:
    """Each concept's instance prompt, or its trigger word, in contexts.

    "a TOK icon, in the style of TOK" becomes "a TOK icon in fresh snow, in the style of TOK". Of
    many concepts each gets fewer contexts, so that there are at most `MAX_HELDOUT_PROMPTS` prompts.
    """
    contexts = numbered_lines(FOLDER / f"{CONTEXTS}.txt", CONTEXTS)
    count = max(1, MAX_HELDOUT_PROMPTS // len(concepts))
    prompts = []
    for concept in concepts:
        trigger = _text(concept, "trigger_word")
        plain = _text(concept, "instance_prompt") or trigger
        if plain is None:
            continue
        # The context goes before the first comma, after which the style stands.
        head, comma, tail = plain.partition(",")
        for _, context in contexts[:count]:
            placed = context.replace(PLACE, head.strip())
            text = add_trigger(f"{placed}{comma}{tail}", trigger)
            prompts.append(Prompt(text, context.replace(PLACE, "").strip()))
    return _distinct(prompts)


def _open(run: Subject, concept: Config, dataset: str, config_name: str | None = None) -> ImageSet:
    """A set of images, its columns and captions read by the run's options."""
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
    """The options of a run for each of its concepts; of a run without concepts one entry."""
    config = run.record["config"]
    return [{**config, **concept} for concept in config.get("concepts") or [{}]]


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each text."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def _text(config: Config, name: str) -> str | None:
    """An option's text; None if it is empty, or no text."""
    value = config.get(name)
    if isinstance(value, str) and value.strip():
        return value
    return None


def _name(run: Subject) -> str:
    return Path(str(run.folder)).resolve().name
