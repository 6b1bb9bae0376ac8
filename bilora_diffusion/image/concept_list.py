"""The image sets of a run: a single set, or a YAML list of concepts with their own options.

    - {dataset: photos/dog, instance_prompt: a photo of TOK dog, repeats: 4}
    - {dataset: photos/castle, trigger_word: SKS}

Options on the command line are the defaults of all concepts. The list becomes
`ImageOptions.concepts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..config import constraints
from ..config.command_line import CommandLine, read_options
from ..config.resolving import logger, without_ignored_options
from ..core.errors import UserError, add_source, is_main_process
from ..core.fields import check, options_of
from ..core.files import folder_or_id, is_folder, quoted
from .derived import with_set_defaults
from .image_files import folder_of_set, list_folder
from .model_options import PriorOptions
from .options import DataOptions, ImageOptions, ValidationOptions
from .sets import ImageSet

# Options that each concept can set.
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
# Prompts of a concept, which are added to the run's prompts.
PROMPT_OPTIONS = ("validation_prompt", "validation_prompts")
CONCEPT_GROUPS = (DataOptions, PriorOptions, ValidationOptions)
# Options whose combinations are checked for each concept.
FACTS = (
    *CONCEPT_OPTIONS,
    "with_prior_preservation",
    "prior_prediction_weight",
    "hold_unconditional",
    "guided_target",
)
Config = TypeVar("Config", bound=ImageOptions)


def with_sets_of_images(cfg: Config) -> Config:
    """Return the configuration with the defaults for its image set, or for each of its concepts.

    Raises:
        UserError: the prompts or the list of concepts can't be read, ``--validation_dataset`` is
            given together with a list, or a concept can't be trained. A message about a concept
            begins with the list's name and the concept's number.
    """
    if not has_concepts(cfg):
        return with_set_defaults(cfg)
    place, items = read_concepts(cfg)
    cfg = replace(cfg, dataset_name=place)
    constraints.check({"concepts_of": place, "validation_dataset": cfg.validation_dataset})
    concepts: list[Config] = []
    for number, item in enumerate(items, start=1):
        with add_source(f"{place}, concept {number}: "):
            concept, notes = read_concept(cfg, item)
            require_other_folders(concept, concepts)
            concepts.append(concept)
        if is_main_process():
            for note in notes:
                logger.warning("%s, concept %d: %s", place, number, note)
    return join_concepts(with_set_defaults(cfg), concepts)


def has_concepts(cfg: ImageOptions) -> bool:
    """Return whether ``--dataset`` is a list of concepts, in the recipe or in a YAML file."""
    dataset: Any = cfg.dataset_name  # a list in a recipe
    return isinstance(dataset, list) or Path(dataset or "").suffix.lower() in (".yaml", ".yml")


def read_concepts(cfg: ImageOptions) -> tuple[str, list[Any]]:
    """Return the name of the file that lists the concepts, and the entries of the list."""
    dataset: Any = cfg.dataset_name
    if isinstance(dataset, list):
        place, items = str(cfg.config), dataset
    else:
        place = dataset
        items = read_options(Path(place), f'the list of concepts "{place}"', "--dataset")
    if not isinstance(items, list) or not items:
        raise UserError(f'{place} is not a list of concepts: write "- dataset: FOLDER" for each.')
    return place, items


def read_concept(run: Config, item: Any) -> tuple[Config, list[str]]:
    """Return the run's configuration with a concept's options, and a note per ignored option.

    Args:
        item: entry of the list of concepts.
    """
    if not isinstance(item, dict):
        raise UserError(f'{quoted(item)} names no options: write some, such as "dataset: FOLDER".')
    # The parser below also accepts some options of the run, such as the resolution.
    names = {name.replace("-", "_") for name in item}
    run_options = names & options_of(run.groups).keys()
    run_options -= {*CONCEPT_OPTIONS, *PROMPT_OPTIONS}
    if run_options:
        raise UserError(f"{min(run_options)} applies to all concepts: give it on the command line.")
    parser = CommandLine(CONCEPT_GROUPS, "", "")
    explicit = parser.parse_mapping(item)
    if isinstance(explicit.get("dataset_name"), list):
        raise UserError("its dataset is a list: give a single folder or hub id.")
    check(options_of(CONCEPT_GROUPS), {**parser.defaults(), **explicit})

    # The run's prompts are sampled once, not for each concept. Here they count as given, so that a
    # preset adds none.
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

    # Keep only the concept's given options: the run itself notes its own ignored options.
    concept = replace(concept, given_options=frozenset(explicit))
    concept, notes = without_ignored_options(concept, CONCEPT_GROUPS)
    check_images(concept)
    return concept, notes


def require_other_folders(concept: ImageOptions, earlier: Sequence[ImageOptions]) -> None:
    """Check that a concept's folders do not conflict with those of earlier concepts.

    Two concepts may share class images only if they share the class prompt.
    """
    images, classes = folders_of(concept)
    for number, other_concept in enumerate(earlier, start=1):
        other_images, other_classes = folders_of(other_concept)
        if images == other_images:
            raise UserError(
                f"its images, {quoted(concept.source)}, are those of concept {number}: give each"
                " image only one concept."
            )
        if classes == other_images or images == other_classes:
            raise UserError(
                f"this concept and concept {number} have class images and training images in one"
                " folder: give the class images a folder of their own."
            )
        # Missing class images are sampled with the prompt, so two prompts need two folders.
        has_other_prompt = concept.class_prompt != other_concept.class_prompt
        if classes is not None and classes == other_classes and has_other_prompt:
            raise UserError(
                f"its class images are in {quoted(concept.class_data_dir)}, like those of concept"
                f" {number}, but the class prompts differ: give it a class_data_dir of its own."
            )


def folders_of(concept: ImageOptions) -> tuple[Path, Path | None]:
    """Return the folder of a concept's images and that of its class images, if it has any."""
    images = Path(concept.source).expanduser().resolve()
    if not concept.class_data_dir:
        return images, None
    return images, Path(concept.class_data_dir).expanduser().resolve()


def require_disjoint(place: str, images: ImageSet) -> None:
    """Check that no image file is in two concepts, for example through nested folders or links.

    Args:
        place: file with the list of concepts, for messages.
    """
    concepts: dict[Path, int] = {}
    for entry in images.entries:
        source = entry.encoded_image()
        if isinstance(source, bytes):  # from a table, not from a file
            continue
        first_concept = concepts.setdefault(source.resolve(), entry.concept)
        if first_concept != entry.concept:
            raise UserError(
                f"{place}, concept {entry.concept + 1}: its image {quoted(source)} is also in"
                f" concept {first_concept + 1}: give each image only one concept."
            )


def join_concepts(run: Config, concepts: Sequence[Config]) -> Config:
    """Return the run's configuration with its concepts, their names and validation prompts."""
    names = [Path(concept.source).name or concept.source for concept in concepts]
    # Folders can have the same name, but not the same path (`require_other_folders`).
    if len(set(names)) < len(names):
        names = [concept.source for concept in concepts]
    records: list[dict[str, Any]] = []
    prompts = list(run.validation_prompts)
    settings = list(run.validation_settings) or [{} for _ in prompts]
    for name, concept in zip(names, concepts, strict=True):
        record: dict[str, Any] = {"concept": name}
        for option in CONCEPT_OPTIONS:
            record[option] = getattr(concept, option)
        records.append(record)
        # `validation_settings` has one mapping for each prompt, or is [] if all are empty.
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
    # The run's checks only test that these are set, so the name of the list's file is enough.
    for option in ("validation_dataset", "class_prompt", "class_data_dir"):
        is_in_concept = any(getattr(concept, option) for concept in concepts)
        if getattr(run, option) is None and is_in_concept:
            run = replace(run, **{option: run.dataset_name})
    return run


def check_settings(cfg: ImageOptions) -> None:
    """Check that each prompt's adapter strength and guidance source fit the trained adapter."""
    for settings in cfg.validation_settings:
        facts: dict[str, Any] = {}
        if settings.get("strength", 1.0) != 1.0:
            facts["strength"] = settings["strength"]
        if "guidance_from" in settings:
            facts["guidance_from"] = settings["guidance_from"]
        if facts:
            constraints.check({**vars(cfg), **facts})


def check_images(cfg: ImageOptions) -> None:
    """Check that a run's or concept's images exist, have prompts and are not its class images."""
    for name in ("dataset_name", "validation_dataset"):
        value = getattr(cfg, name)
        if value is not None:
            folder_of_set(value, f"--{name}")
    images = cfg.instance_data_dir
    if images is not None and folder_or_id(images, "--instance_data_dir") is None:
        raise UserError(f"--instance_data_dir {quoted(images)} does not exist: correct the path.")
    # Missing class images are generated into the folder, so the next run would train on them.
    folder = Path(cfg.source).expanduser()
    if cfg.class_data_dir is not None and Path(cfg.class_data_dir).exists():
        class_folder = folder_or_id(cfg.class_data_dir, "--class_data_dir")
        if class_folder is not None and class_folder.resolve() == folder.resolve():
            raise UserError(
                f"--class_data_dir {quoted(cfg.class_data_dir)} is the folder of the training"
                " images: give the class images a folder of their own."
            )
    # A set on the hub has captions only if their column is given.
    has_prompt = cfg.caption_column is not None or cfg.instance_prompt
    if not has_prompt and not (is_folder(folder) and list_folder(folder).has_captions):
        raise UserError(
            f'"{cfg.source}" has no prompt: add --instance_prompt, for example "a photo of TOK'
            ' dog", --caption_column, or, in a folder without a metadata file, a .txt file with the'
            " caption next to each image."
        )
