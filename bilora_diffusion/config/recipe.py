"""A YAML file of options, read so that a value is the text that stands there.

YAML 1.1 makes numbers of ``1:30`` and ``010``, a date of ``2024-01-01`` and a truth of ``on``. Here
every value is what is written, as on the command line, and the option's own type decides what it
means; only ``true``, ``false`` and ``null`` (or nothing) are more than text. Anchors, tags and
repeated keys are refused, since an option has no use for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..core.errors import UserError, did_you_mean, reason
from ..core.files import (
    is_file,
    quoted,
    read_text,
)

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""The repository's recipes, which an installed package brings along."""
MAX_BYTES = 200_000
MAX_KEY_LETTERS = 200
"""Of a key: an option of a recipe, or the label of a variant."""
# Of YAML 1.1's words for null, true and false only these; yes, no, on and off are text.
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


def find_recipe(name: str) -> Path:
    """The file that ``--config`` names: a path, or one of `RECIPES` such as t5_base/mrpc."""
    path = Path(name)
    # A file wins over a recipe of its name; a path that is none is refused where it is read.
    if is_file(path) or path.is_absolute() or path.suffix:
        return path
    packaged_path = RECIPES / f"{name}.yaml"
    if is_file(packaged_path):
        return packaged_path
    names = list[str]()
    for file in RECIPES.rglob("*.yaml"):
        names.append(file.relative_to(RECIPES).with_suffix("").as_posix())
    # Those in folders, one for each task of the paper, would make the sentence too long.
    top_names = sorted(recipe for recipe in names if "/" not in recipe)
    raise UserError(
        f"--config {quoted(name)} is neither a file nor a recipe{did_you_mean(name, names)}: give a"
        f" path or one of {', '.join(top_names)}."
    )


def read_options(path: Path, label: str, flag: str) -> Any:
    """The content of a YAML file: mappings, lists, texts, True, False and None.

    Args:
        path: the file.
        label: it in the user's words, for messages.
        flag: the option that names it.

    Raises:
        UserError: no regular file, too large, no text, no YAML, or YAML that is more than options.
    """
    text = read_text(path, f"{label} of {flag}", MAX_BYTES)
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise UserError(f"{label} is nested too deeply: flatten it.") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{label} can't be read ({line}{error.problem}): correct it.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond all range
        raise UserError(f"{label} is not valid YAML ({reason(error)}): correct it.") from error


class _Loader(yaml.BaseLoader):
    """PyYAML's loader that leaves values text, without the parts that options have no use for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # Aliases of aliases can grow to gigabytes, and a tag could name a Python object.
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            raise _invalid("an anchor, an alias or a tag, or a text like one without quotes", event)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        # A word in quotes is text.
        is_word = node.style is None and node.value in _WORDS
        return _WORDS[node.value] if is_word else _text(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        values: dict[str, Any] = {}
        for key, value in node.value:
            name = _text(key)
            if name in values:
                raise _invalid(f"{quoted(name)} a second time", key)
            if len(name) > MAX_KEY_LETTERS:
                raise _invalid(f"a key of {len(name)} letters", key)
            values[name] = self.construct_object(value)
        return values


def _text(node: Any) -> str:
    text = node.value  # of a list or a mapping it is one of nodes
    if not isinstance(text, str):
        raise _invalid("no text where one is expected", node)
    return text


def _invalid(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
