"""Several concepts in one run: a YAML list of sets of images, each with options of its own.

    - {dataset: photos/dog, instance_prompt: a photo of TOK dog, repeats: 4}
    - {dataset: photos/castle, trigger_word: SKS}

Options of the command line are the defaults of each. What was read is `DreamBoothConfig.concepts`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import refusals
from ..config.command_line import CommandLine
from ..config.recipe import read_options
from ..config.run import without_idle
from ..core.errors import UserError, is_main_process, placed
from ..core.fields import check, options_of
from ..core.files import quoted
from . import inputs
from .loss_options import PriorOptions
from .options import DataOptions, ValidationOptions
from .sets import ImageSet

OWN = (
    *("dataset_name", "instance_data_dir", "dataset_config_name", "image_column"),
    *("caption_column", "mask_column", "alpha_mask", "instance_prompt", "trigger_word"),
    *("shuffle_tags", "caption_dropout", "random_flip", "repeats", "class_prompt"),
    *("class_data_dir", "num_class_images", "validation_dataset"),
)
PROMPTS = ("validation_prompt", "validation_prompts")
"""Options of a concept that join those of the run."""
GROUPS = (DataOptions, PriorOptions, ValidationOptions)
logger = logging.getLogger(__name__)


def complete(values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Fill in what was not given, and read the concepts where ``--dataset`` has a list of them; an
    error's sentence begins with the place of a wrong concept.
    """
    values, listed = {**values, "concepts": []}, values["dataset_name"]
    if not isinstance(listed, list) and Path(listed or "").suffix.lower() not in (".yaml", ".yml"):
        inputs.complete_images(values, given)
        return inputs.complete(values, given)
    values["dataset_name"], items = _read(values)
    place = values["dataset_name"]
    refusals.check({"concepts_of": place, "validation_dataset": values["validation_dataset"]})
    every: list[dict[str, Any]] = []
    for number, item in enumerate(items, start=1):
        with placed(f"{place}, concept {number}: "):
            own, notes = _concept(values, item, given)
            _require_apart(own, every)
            every.append(own)
        for note in notes if is_main_process() else ():
            logger.warning("%s, concept %d: %s", place, number, note)
    inputs.complete_images(values, given)
    _join(values, every)
    return inputs.complete(values, given)


def _read(values: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The file in which the concepts stand, and what it says of each."""
    place = items = values["dataset_name"]
    if isinstance(items, list):
        place = str(values["config"])
    else:
        items = read_options(Path(place), f'the list of concepts "{place}"', "--dataset")
    if not isinstance(items, list) or not items:
        raise UserError(f'{place} holds no list of concepts: write "- dataset: FOLDER" for each.')
    return place, items


def _concept(
    run: Mapping[str, Any], item: Any, given: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """The options of the run as a concept has them, and a sentence for each that has no effect."""
    if not isinstance(item, dict):
        raise UserError(f'it is {quoted(item)}: write options, such as "dataset: FOLDER".')
    names = {name.replace("-", "_") for name in item}
    if others := sorted((names & run.keys()).difference(OWN, PROMPTS)):
        raise UserError(f"{others[0]} holds for all concepts: give it on the command line.")
    parser, fields = CommandLine(GROUPS, "", ""), options_of(GROUPS)
    explicit = parser.mapped(item)
    if isinstance(explicit.get("dataset_name"), list):
        raise UserError("its dataset is a list: give a single folder or hub id.")
    check(fields, {**parser.defaults(), **explicit})
    own = {**run, **dict.fromkeys(("dataset_name", *PROMPTS, "final_validation_prompt"))}
    own |= {"validation_prompts": [], **explicit}
    inputs.complete_images(own, given | explicit.keys() | {"validation_prompts"})
    facts = (*OWN, "with_prior_preservation", "prior_prediction_weight")
    refusals.check({name: own[name] for name in facts})
    own, notes = without_idle(fields, own, frozenset(explicit))
    inputs.check_images(own)
    return own, notes


def _source(own: Mapping[str, Any]) -> str:
    return str(own["dataset_name"] or own["instance_data_dir"])


def _require_apart(own: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> None:
    """Refuse images that an earlier concept has, or class images that belong to something else."""

    def folders(one: Mapping[str, Any]) -> list[Path | None]:
        places = _source(one), one["class_data_dir"]
        return [Path(place).expanduser().resolve() if place else None for place in places]

    images, classes = folders(own)
    for number, other in enumerate(before, start=1):
        its_images, its_classes = folders(other)
        if images == its_images:
            raise UserError(
                f"its images, {quoted(_source(own))}, are those of concept {number}: give each"
                " image one concept."
            )
        if classes == its_images or images == its_classes:
            raise UserError(
                f"class images and training images of concept {number} lie in one folder: give the"
                " class images a folder of their own."
            )
        if classes and classes == its_classes and own["class_prompt"] != other["class_prompt"]:
            raise UserError(
                f"its class images lie in {quoted(own['class_data_dir'])} as those of concept"
                f" {number}, and their prompts differ: give it a class_data_dir of its own."
            )


def require_disjoint(place: str, images: ImageSet) -> None:
    """Refuse an image that two concepts have: folders may lie in one another, or be links."""
    concepts = dict[Path, int]()
    for entry in images.entries:
        source = entry.encoded()
        if isinstance(source, bytes):
            continue
        first = concepts.setdefault(source.resolve(), entry.concept)
        if first != entry.concept:
            raise UserError(
                f"{place}, concept {entry.concept + 1}: its image {quoted(source)} is one of"
                f" concept {first + 1} too: give each image one concept."
            )


def _join(values: dict[str, Any], every: Sequence[Mapping[str, Any]]) -> None:
    """Put the concepts, with their names, and their validation prompts into the run's values."""
    places = [_source(own) for own in every]
    names = [Path(place).name or place for place in places]
    names = names if len(set(names)) == len(names) else places
    settings = values["validation_settings"] or [{} for _ in values["validation_prompts"]]
    for name, own in zip(names, every, strict=True):
        values["concepts"].append({"concept": name, **{option: own[option] for option in OWN}})
        prompts = own["validation_prompts"]
        its = own["validation_settings"] or [{} for _ in prompts]
        settings += [{**each, "concept": name} for each in its]
        values["validation_prompts"] = [*values["validation_prompts"], *prompts]
    values["validation_settings"] = settings if any(settings) else []
    # The file's name stands where a run has what its concepts have, so that checks of the run hold.
    for option in ("validation_dataset", "class_prompt", "class_data_dir"):
        if values[option] is None and any(own[option] for own in every):
            values[option] = values["dataset_name"]
