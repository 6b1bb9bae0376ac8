"""The sets of images that a run names: one, or a YAML list of concepts, each with its options.

    - {dataset: photos/dog, instance_prompt: a photo of TOK dog, repeats: 4}
    - {dataset: photos/castle, trigger_word: SKS}

Options of the command line are the defaults of each. What was read is `ImageOptions.concepts`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..config import constraints
from ..config.command_line import CommandLine, read_options
from ..config.resolving import without_ignored_options
from ..core.errors import UserError, is_main_process, placed
from ..core.fields import check, options_of
from ..core.files import folder_or_id, is_folder, quoted
from .derived import with_set_defaults
from .image_files import folder_of_set, list_folder
from .loss_options import PriorOptions
from .options import DataOptions, ImageOptions, ValidationOptions
from .sets import ImageSet

CONCEPT_OPTIONS = (
    "dataset_name",
    "instance_data_dir",
    "dataset_config_name",
    "image_column",
    "caption_column",
    "mask_column",
    "alpha_mask",
    "instance_prompt",
    "trigger_word",
    "shuffle_tags",
    "caption_dropout",
    "random_flip",
    "repeats",
    "class_prompt",
    "class_data_dir",
    "num_class_images",
    "validation_dataset",
)
"""Options that each concept has for itself."""


PROMPT_OPTIONS = ("validation_prompt", "validation_prompts")
"""Options of a concept that join those of the run."""


CONCEPT_GROUPS = (DataOptions, PriorOptions, ValidationOptions)


FACTS = (
    *CONCEPT_OPTIONS,
    "with_prior_preservation",
    "prior_prediction_weight",
    "hold_unconditional",
)
"""Options whose combinations are refused for each concept."""


Config = TypeVar("Config", bound=ImageOptions)


logger = logging.getLogger(__name__)


def with_sets_of_images(cfg: Config) -> Config:
    """The configuration with the defaults of its set of images, or of each of its concepts.

    Raises:
        UserError: The list of concepts can't be read, or a concept can't be trained; the sentence
            begins with its place.
    """
    if not has_concepts(cfg):
        return with_set_defaults(cfg)
    place, items = read_concepts(cfg)
    cfg = replace(cfg, dataset_name=place)
    constraints.check({"concepts_of": place, "validation_dataset": cfg.validation_dataset})
    concepts: list[Config] = []
    for number, item in enumerate(items, start=1):
        with placed(f"{place}, concept {number}: "):
            concept, notes = read_concept(cfg, item)
            require_other_folders(concept, concepts)
            concepts.append(concept)
        if is_main_process():
            for note in notes:
                logger.warning("%s, concept %d: %s", place, number, note)
    return joined(with_set_defaults(cfg), concepts)


def has_concepts(cfg: ImageOptions) -> bool:
    """Test that ``--dataset`` is a list of concepts, in the recipe or in a file."""
    dataset: Any = cfg.dataset_name  # a list in a recipe
    return isinstance(dataset, list) or Path(dataset or "").suffix.lower() in (".yaml", ".yml")


def read_concepts(cfg: ImageOptions) -> tuple[str, list[Any]]:
    """The file in which the concepts stand, and what it says of each."""
    dataset: Any = cfg.dataset_name
    if isinstance(dataset, list):
        place, items = str(cfg.config), dataset
    else:
        place = dataset
        items = read_options(Path(place), f'the list of concepts "{place}"', "--dataset")
    if not isinstance(items, list) or not items:
        raise UserError(f'{place} holds no list of concepts: write "- dataset: FOLDER" for each.')
    return place, items


def read_concept(run: Config, item: Any) -> tuple[Config, list[str]]:
    """The run's configuration with a concept's options, and a sentence for each without effect."""
    if not isinstance(item, dict):
        raise UserError(f'it is {quoted(item)}: write options, such as "dataset: FOLDER".')
    # `mapped` would accept some of the run's options, such as the resolution.
    names = {name.replace("-", "_") for name in item}
    shared = (names & options_of(run.groups).keys()).difference(CONCEPT_OPTIONS, PROMPT_OPTIONS)
    if shared:
        raise UserError(f"{min(shared)} holds for all concepts: give it on the command line.")
    parser = CommandLine(CONCEPT_GROUPS, "", "")
    explicit = parser.mapped(item)
    if isinstance(explicit.get("dataset_name"), list):
        raise UserError("its dataset is a list: give a single folder or hub id.")
    check(options_of(CONCEPT_GROUPS), {**parser.defaults(), **explicit})

    # The run's prompts are not sampled for each concept, and no preset adds some.
    without_prompts = {
        "dataset_name": None,
        "validation_prompt": None,
        "validation_prompts": [],
        "final_validation_prompt": None,
    }
    given_options = run.given_options | explicit.keys() | {"validation_prompts"}
    concept = replace(run, **{**without_prompts, **explicit, "given_options": given_options})
    concept = with_set_defaults(concept)
    check_settings(concept)
    constraints.check({name: getattr(concept, name) for name in FACTS})

    # Of the run's options without effect the run itself tells.
    concept = replace(concept, given_options=frozenset(explicit))
    concept, notes = without_ignored_options(concept, CONCEPT_GROUPS)
    check_images(concept)
    return concept, notes


def source_of(concept: ImageOptions) -> str:
    """Name or place of a concept's images."""
    return str(concept.dataset_name or concept.instance_data_dir)


def require_other_folders(concept: ImageOptions, earlier: Sequence[ImageOptions]) -> None:
    """Refuse images that an earlier concept has, or class images that belong to something else."""
    images, classes = folders_of(concept)
    for number, neighbour in enumerate(earlier, start=1):
        neighbour_images, neighbour_classes = folders_of(neighbour)
        if images == neighbour_images:
            raise UserError(
                f"its images, {quoted(source_of(concept))}, are those of concept {number}: give"
                " each image one concept."
            )
        if classes == neighbour_images or images == neighbour_classes:
            raise UserError(
                f"class images and training images of concept {number} lie in one folder: give the"
                " class images a folder of their own."
            )
        # Missing class images are made by the prompt, so one folder can't serve two prompts.
        differs = concept.class_prompt != neighbour.class_prompt
        if classes is not None and classes == neighbour_classes and differs:
            raise UserError(
                f"its class images lie in {quoted(concept.class_data_dir)} as those of concept"
                f" {number}, and their prompts differ: give it a class_data_dir of its own."
            )


def folders_of(concept: ImageOptions) -> tuple[Path, Path | None]:
    """Where a concept's images and its class images lie."""
    images = Path(source_of(concept)).expanduser().resolve()
    if not concept.class_data_dir:
        return images, None
    return images, Path(concept.class_data_dir).expanduser().resolve()


def require_disjoint(place: str, images: ImageSet) -> None:
    """Refuse an image that two concepts have: folders may lie in one another, or be links."""
    concepts: dict[Path, int] = {}
    for entry in images.entries:
        source = entry.encoded()
        if isinstance(source, bytes):  # of a hub's set, which is no file of the user
            continue
        first = concepts.setdefault(source.resolve(), entry.concept)
        if first != entry.concept:
            raise UserError(
                f"{place}, concept {entry.concept + 1}: its image {quoted(source)} is one of"
                f" concept {first + 1} too: give each image one concept."
            )


def joined(run: Config, concepts: Sequence[Config]) -> Config:
    """The run's configuration with its concepts, by their names, and their validation prompts."""
    sources = [source_of(concept) for concept in concepts]
    names = [Path(source).name or source for source in sources]
    # Two folders may have one name, but not one path (`require_other_folders`).
    if len(set(names)) < len(names):
        names = sources
    records: list[dict[str, Any]] = []
    prompts = list(run.validation_prompts)
    settings = list(run.validation_settings) or [{} for _ in prompts]
    for name, concept in zip(names, concepts, strict=True):
        record: dict[str, Any] = {"concept": name}
        for option in CONCEPT_OPTIONS:
            record[option] = getattr(concept, option)
        records.append(record)
        # One mapping for each prompt; [] stands for as many empty ones.
        concept_settings = concept.validation_settings or [{} for _ in concept.validation_prompts]
        for prompt_settings in concept_settings:
            settings.append({**prompt_settings, "concept": name})
        prompts += concept.validation_prompts
    run = replace(
        run,
        concepts=records,
        validation_prompts=prompts,
        validation_settings=settings if any(settings) else [],
    )
    # The file's name stands where a run has what its concepts have, so that checks of the run hold.
    for option in ("validation_dataset", "class_prompt", "class_data_dir"):
        is_in_concept = any(getattr(concept, option) for concept in concepts)
        if getattr(run, option) is None and is_in_concept:
            run = replace(run, **{option: run.dataset_name})
    return run


def check_settings(cfg: ImageOptions) -> None:
    """Refuse a prompt's strength of the adapter, and guidance from the base model, where more than
    the adapter was trained.
    """
    for settings in cfg.validation_settings:
        facts: dict[str, Any] = {}
        if settings.get("strength", 1.0) != 1.0:
            facts["strength"] = settings["strength"]
        if "guidance_from" in settings:
            facts["guidance_from"] = settings["guidance_from"]
        if facts:
            constraints.check({**vars(cfg), **facts})


def check_images(cfg: ImageOptions) -> None:
    """Refuse images without a prompt or a place, of a run or of a concept."""
    for name in ("dataset_name", "validation_dataset"):
        value = getattr(cfg, name)
        if value is not None:
            folder_of_set(value, f"--{name}")
    images = cfg.instance_data_dir
    if images is not None and folder_or_id(images, "--instance_data_dir") is None:
        raise UserError(f"--instance_data_dir {quoted(images)} does not exist: correct the path.")
    # Class images that are missing are generated, and would be training images in the next run.
    source = str(cfg.dataset_name or cfg.instance_data_dir)
    folder = Path(source).expanduser()
    if cfg.class_data_dir is not None and Path(cfg.class_data_dir).exists():
        class_folder = folder_or_id(cfg.class_data_dir, "--class_data_dir")
        if class_folder is not None and class_folder.resolve() == folder.resolve():
            raise UserError(
                f"--class_data_dir {quoted(cfg.class_data_dir)} is the folder of the training"
                " images: give the class images a folder of their own."
            )
    # A set on the hub is not listed here: without any option it has no known column of captions.
    has_prompt = cfg.caption_column is not None or cfg.instance_prompt
    if not has_prompt and not (is_folder(folder) and list_folder(folder).has_captions):
        raise UserError(
            f'"{source}" has no prompt: add --instance_prompt, for example "a photo of TOK dog",'
            " --caption_column, or a .txt file with its caption beside each image."
        )
