"""A base model's configuration files: its family, parts and resolution, without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..core.errors import UserError, read_or_refuse
from ..core.files import folder_or_id
from ..mini import PIPELINES
from .families import SDXL, family_class

FLAG = "--pretrained_model_name_or_path"
ANOTHER = f"give another {FLAG}"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True)
class BaseModel:
    """A pipeline in diffusers' format, of a known family."""

    name: str  # as the user gave it
    index: Mapping[str, Any]  # model_index.json
    # Configurations of denoiser, autoencoder and scheduler, by the part's name.
    configs: Mapping[str, Mapping[str, Any]]

    @property
    def pipeline(self) -> str:
        """Name of the pipeline class."""
        return str(self.index.get("_class_name"))

    @property
    def family(self) -> Any:
        """The model's family, a `families.base.Family`."""
        return family_class(self.pipeline, self.name)()

    @property
    def usual_sampling(self) -> tuple[int, float]:
        """Default number of sampling steps and default guidance scale."""
        # `Family.usual_sampling` takes a loaded pipeline; these are the attributes that it reads.
        denoiser = SimpleNamespace(config=self.configs[self.family.denoiser])
        parts = {self.family.denoiser: denoiser}
        outline = SimpleNamespace(config=self.index, name_or_path=self.name, **parts)
        return self.family.usual_sampling(outline)

    @property
    def is_guided(self) -> bool:
        """Whether sampling makes an unconditional prediction by default."""
        _, guidance = self.usual_sampling
        return bool(self.family.is_guided(guidance, self.index, self.configs))

    @property
    def side(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        fix = f"correct its config.json, or {ANOTHER}"
        return read_or_refuse(
            f'the denoiser of "{self.name}"', fix, lambda: self.family.side_of(self.configs)
        )


def folder_of(name: str) -> Path | None:
    """Return the folder of a local or an embedded model; None for a hub id."""
    folder = Path(name).expanduser()
    if name in PIPELINES:
        folder = PIPELINES[name]()
    if folder.is_dir():
        return folder
    return None


def read_base_model(
    name: str, revision: str | None = None, cache_dir: str | None = None, flag: str = FLAG
) -> BaseModel:
    """Read a model's configuration files, and download them if the model is on the hub.

    Args:
        flag: the option that names the model, for messages.

    Raises:
        UserError: there is no such model, one of its files can't be read, it belongs to no known
            family, or a part is missing.
    """
    # The default model's values are written here, so that checking options needs no network.
    if name == SDXL_BASE:
        parts = {
            "unet": {"sample_size": 128},
            "vae": {"block_out_channels": [128, 256, 512, 512]},
            "scheduler": {"_class_name": "EulerDiscreteScheduler"},
        }
        return BaseModel(name, {"_class_name": SDXL}, parts)
    folder = folder_of(name)
    if folder is None:
        folder_or_id(name, flag)
    read = partial(_read, name, folder, flag, revision=revision, cache_dir=cache_dir)
    index = read("model_index.json")
    family = family_class(str(index.get("_class_name")), f"{flag} {name}")()
    tokenizers = {part.replace("text_encoder", "tokenizer") for part in family.encoders}
    needed_parts = sorted((set(family.parts) | tokenizers) - family.optional)
    for part in needed_parts:
        # The folders of the parts can be checked only on disk.
        if part not in index or (folder is not None and not (folder / part).is_dir()):
            raise UserError(
                f'{flag} "{name}" is not a complete {family.title} pipeline (it has no {part}):'
                " give a pipeline in diffusers' format, for example mini."
            )
    configs = {}
    for part in (family.denoiser, "vae"):
        configs[part] = read(f"{part}/config.json")
    configs["scheduler"] = read("scheduler/scheduler_config.json")
    return BaseModel(name, index, configs)


def _read(
    name: str, folder: Path | None, flag: str, file: str, **hub_options: Any
) -> dict[str, Any]:
    """Read one of a model's JSON files, which must hold an object.

    Args:
        folder: folder of a local model; None for a model on the hub.
    """
    from huggingface_hub import hf_hub_download

    if folder is None:
        path = Path(from_hub(name, lambda: hf_hub_download(name, file, **hub_options), flag))
    else:
        path = folder / file
    label = f'{file} of "{name}"'
    fix = f"download or write it again, or give another {flag}"
    content = read_or_refuse(label, fix, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise UserError(f"{label} is not a JSON object: {fix}.")
    return content


def from_hub(name: str, load: Callable[[], Any], flag: str = FLAG) -> Any:
    """Return the result of ``load``, which downloads files from a model's repository.

    Args:
        flag: the option that names the model, for messages.

    Raises:
        UserError: the model does not exist, may not be read, or can't be downloaded.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def load_permitted() -> Any:
        try:
            return load()
        except RepositoryNotFoundError as error:  # raised for gated repositories too
            raise UserError(
                f'the hub has no model "{name}" that you may read: check its name, accept its terms'
                " on its page and log in with `hf auth login` if it is gated or private, or give a"
                " local folder."
            ) from error

    fix = (
        f"check the connection, or pass {flag} the hub id or folder of a pipeline in diffusers'"
        " format, or the name of an embedded one, 'mini' or 'mini-flow'"
    )
    return read_or_refuse(f'the model "{name}"', fix, load_permitted)
