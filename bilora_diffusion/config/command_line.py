"""Read option values from the command line and a recipe, and record which of them were given.

This module does not depend on a particular script; it works with any set of option dataclasses.

A recipe is a YAML file of options. Values are read as text, since YAML 1.1 would turn ``1:30`` and
``010`` into numbers, ``2024-01-01`` into a date and ``on`` into True. The option's type parses the
text. Only ``true``, ``false`` and ``null`` (or ``~``, or an empty value) are special. Anchors, tags
and repeated keys are refused, because options do not need them.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml

from ..core import removed
from ..core.errors import UserError, add_source, did_you_mean, reason
from ..core.fields import add_flags, check, default_of, option_of, options_of
from ..core.files import is_file, quoted, read_text
from ..core.values import check_choice

# Folder of the package's recipes.
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Maximum size of a YAML file in bytes.
MAX_BYTES = 200_000
# Maximum number of characters in a key: an option of a recipe, or the label of a variant.
MAX_KEY_LETTERS = 200
# YAML 1.1 has more words for null, true and false; here yes, no, on and off are text.
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that leaves out spellings with dashes and uninformative defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # --dataset_name and --dataset-name are equivalent; show only the first. Aliases are shown.
        spellings = action.option_strings
        action.option_strings = []
        for spelling in spellings:
            if not spelling.startswith("--") or "-" not in spelling.removeprefix("--"):
                action.option_strings.append(spelling)
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


class UserErrorParser(argparse.ArgumentParser):
    """A parser that raises a one-sentence `UserError` instead of exiting."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.dest in ("method", "compare"):
            removed.refuse_method(value)
        if action.choices is not None:
            check_choice(action.option_strings[0], value, action.choices)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        read: Any = action.type or str
        removed.refuse_value(action.dest, text)
        # A positional argument has no option strings.
        spelling = action.option_strings[0] if action.option_strings else action.dest
        try:
            return read(text)
        except ValueError as error:
            # Readers in `core.fields` put the advice into the error's message; int does not.
            fix = "give a whole number" if read is int else error
            raise UserError(f"{spelling} is {quoted(text)}: {fix}.") from error

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a `UserError`."""
        # argparse's message is "argument --rank: expected one argument".
        flag = re.match(r"argument (--\w+).*expected", message)
        if flag is not None:
            raise UserError(f"{flag[1]} has no value: put one after it.")
        words = message.removeprefix("unrecognized arguments: ")
        if words != message:
            word = words.split()[0]
            hint = did_you_mean(word, self._option_string_actions)
            raise UserError(f'unexpected "{word}"{hint}: --help lists all flags.')
        raise UserError(f"{message}.")


class CommandLine(UserErrorParser):
    """A parser that separates given values from defaults.

    Args:
        groups: dataclasses of options; one of them has the field ``config``, which names a recipe.
        description: first lines of ``--help``.
        usage: the shortest complete command line.
        foreign: options of other scripts that this script does not have; for each, the reason and
            what to use instead (`constraints.Table`).
    """

    def __init__(
        self,
        groups: Sequence[Any],
        description: str,
        usage: str,
        foreign: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        super().__init__(
            description=description,
            usage=usage,
            allow_abbrev=False,
            formatter_class=Help,
        )
        add_flags(self, groups)
        self._fields = options_of(groups)
        self._foreign = foreign

    def read(
        self,
        argv: Sequence[str] | None,
        alternatives: Sequence[tuple[str, str]] = (),
        ignored: Callable[[Mapping[str, Any], Mapping[str, Any]], Collection[str]] | None = None,
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """Read the arguments and the recipe that they name.

        Args:
            argv: arguments without the program's name; None for ``sys.argv``.
            alternatives: pairs of mutually exclusive options. An option on the command line
                overrides its partner in the recipe.
            ignored: a function that gets the recipe's options and the command line's options, and
                returns the names of the recipe's options to ignore.

        Returns:
            Values of all options, and the names of those that the arguments or the recipe give.

        Raises:
            UserError: an option is unknown, a value has the wrong type or is not allowed, or the
                recipe can't be read.
        """
        flags = self.explicit(argv)
        recipe: dict[str, Any] = {}
        if "config" in flags:
            recipe = self._recipe(find_recipe(flags["config"]))
        for first, second in alternatives:
            if first in flags and second not in flags:
                recipe.pop(second, None)
            if second in flags and first not in flags:
                recipe.pop(first, None)
        if ignored is not None:
            for name in ignored(recipe, flags):
                recipe.pop(name, None)
        # Precedence: flags, recipe, defaults.
        values = {**self.defaults(), **recipe, **flags}
        check(self._fields, values)
        return values, frozenset(recipe.keys() | flags.keys())

    def defaults(self) -> dict[str, Any]:
        """Return the default value of every option."""
        return {name: default_of(field) for name, field in self._fields.items()}

    def explicit(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Return the options given on the command line, without those of a recipe."""
        # argparse keeps attributes that the namespace has, so an option that is not given stays
        # None.
        namespace = argparse.Namespace(**dict.fromkeys(self._fields))
        _, unknown_words = self.parse_known_args(argv, namespace)
        if unknown_words:
            word = unknown_words[0].split("=")[0]
            if not word.startswith("-"):
                raise UserError(f'unexpected "{word}": put the flag that it belongs to before it.')
            self._refuse(word, self._names())
        return {name: value for name, value in vars(namespace).items() if value is not None}

    def _refuse(self, word: str, names: Mapping[str, str]) -> NoReturn:
        """Raise UserError for an option that this parser does not have.

        Args:
            word: the flag, or the key in a recipe.
            names: a mapping from each spelling of the existing options to the option's name.

        Raises:
            UserError: always; the message has a hint.
        """
        name = word.lstrip("-").replace("-", "_")
        dashes = "--" if word.startswith("-") else ""
        removed.refuse_option(name, f"{dashes}{name}")
        if name in self._foreign:
            reason, instead = self._foreign[name]
            sentence = f"{dashes}{name} is not an option here, since {reason}: {instead}."
            # Backquotes are for the table in docs/options.md.
            raise UserError(sentence.replace("`", ""))
        hint = did_you_mean(f"{dashes}{name}", [f"{dashes}{option}" for option in names])
        raise UserError(f'unknown option "{word}"{hint}: --help lists all of them.')

    def _names(self) -> dict[str, str]:
        """Return a mapping from each spelling, without leading dashes, to the option's name."""
        names: dict[str, str] = {}
        for action in self._actions:
            if action.dest == "help":
                continue
            for spelling in action.option_strings:
                if spelling.startswith("--"):  # a recipe has no short flags such as -h
                    names[spelling.lstrip("-").replace("-", "_")] = action.dest
        return names

    def _recipe(self, path: Path) -> dict[str, Any]:
        """Read the options of a recipe."""
        recipe_options = read_options(path, f'the recipe "{path}"', "--config")
        if not isinstance(recipe_options, dict):
            raise UserError(f'the recipe "{path}" holds no options: write lines like "rank: 4".')
        with add_source(f'in the recipe "{path}", '):
            return self.parse_mapping(recipe_options)

    def parse_mapping(self, recipe_options: Mapping[str, Any]) -> dict[str, Any]:
        """Parse a mapping from a YAML file to option values, like `explicit`.

        Raises:
            UserError: an option is unknown or given twice, or a value has the wrong type.
        """
        # A recipe has `output_kohya_format: false` instead of a --no_ flag, and can't name another
        # recipe.
        names: dict[str, str] = {}
        for spelling, name in self._names().items():
            if not spelling.startswith("no_") and spelling != "config":
                names[spelling] = name
        words: dict[str, str] = {}
        lists: dict[str, list[Any] | None] = {}
        for key, value in recipe_options.items():
            name = names.get(key.replace("-", "_"))
            if name is None:
                self._refuse(key or '""', names)
            if name in words or name in lists:
                raise UserError(f'"{key}" gives {name} a second time: keep one of the two.')
            texts = self._texts(name, value)
            # None cannot be written on a command line, so it is stored with the lists.
            if isinstance(texts, str):
                words[name] = texts
            else:
                lists[name] = texts
        # The option's type parses single values and lists of numbers, as it does for flags; items
        # of other lists stay text.
        values = self.explicit([f"--{name}={text}" for name, text in words.items()])
        for name, texts in lists.items():
            if texts is None:
                continue
            values[name] = texts
            if option_of(self._fields[name]).range:
                action = self._option_string_actions[f"--{name}"]
                values[name] = [self._get_value(action, text) for text in texts]
        return values

    def _texts(self, name: str, value: Any) -> str | list[Any] | None:
        """Convert a recipe's value to command-line text; list items may be mappings.

        Returns:
            The text, or a list of items; None for null, which means no value.

        Raises:
            UserError: the value has the wrong type, or is null although the option has a default.
        """
        field = self._fields[name]
        is_itemized = option_of(field).itemized
        takes_list = field.default_factory is not dataclasses.MISSING
        if value is None and field.default is None:
            return None
        is_list = isinstance(value, list)
        items = value if isinstance(value, list) else [value]
        kinds: tuple[type, ...] = (bool, str)
        # A mapping may only be an item of a list, not a single value.
        if is_itemized and (is_list or takes_list):
            kinds = (bool, str, dict)
        is_readable = all(isinstance(item, kinds) for item in items)
        if not is_readable or (is_list and not (takes_list or is_itemized)):
            fix = "single values in one list" if takes_list else "a single value"
            raise UserError(f'"{name}" is {quoted(value)}: give {fix}.')
        # Booleans become the words true and false, which flags accept.
        texts = [str(item).lower() if isinstance(item, bool) else item for item in items]
        return texts if takes_list or is_list else texts[0]


def find_recipe(name: str) -> Path:
    """Return the file of the recipe that ``--config`` names: a path, or a name in `RECIPES`.

    Raises:
        UserError: there is neither such a file nor such a recipe.
    """
    path = Path(name)
    # A file takes precedence over a recipe of the same name. `read_options` raises an error if the
    # path does not exist.
    if is_file(path) or path.is_absolute() or path.suffix:
        return path
    packaged_path = RECIPES / f"{name}.yaml"
    if is_file(packaged_path):
        return packaged_path
    names = list[str]()
    for file in RECIPES.rglob("*.yaml"):
        names.append(file.relative_to(RECIPES).with_suffix("").as_posix())
    # Recipes in subfolders, one for each task of the paper, would make the message too long.
    top_names = sorted(recipe for recipe in names if "/" not in recipe)
    raise UserError(
        f"--config {quoted(name)} is neither a file nor a recipe{did_you_mean(name, names)}: give a"
        f" path or one of {', '.join(top_names)}."
    )


def read_options(path: Path, label: str, flag: str) -> Any:
    """Return the content of a YAML file: mappings, lists, text, true, false and null.

    Args:
        path: the file.
        label: name of the file in messages.
        flag: the option that names the file.

    Raises:
        UserError: the path is not a regular file, or the file can't be read, is too large, is not
            UTF-8, or is not plain YAML.
    """
    text = read_text(path, f"{label} of {flag}", MAX_BYTES)
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise UserError(f"{label} is nested too deeply: flatten it.") from error
    except yaml.MarkedYAMLError as error:
        problem = error.problem
        if error.problem_mark:
            problem = f"line {error.problem_mark.line + 1}: {problem}"
        raise UserError(f"{label} can't be read ({problem}): correct it.") from error
    # An escape sequence for an invalid code point raises ValueError or OverflowError.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{label} is not valid YAML ({reason(error)}): correct it.") from error


class _Loader(yaml.BaseLoader):
    """YAML loader that keeps values as text, and refuses features that options do not need."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # Nested aliases can expand to gigabytes, and a tag could name a Python object.
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            raise _invalid("an anchor, an alias or a tag, or unquoted text like one", event)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        # A scalar with a style is quoted, so "true" and "null" stay text.
        if node.style is None and node.value in _WORDS:
            return _WORDS[node.value]
        return _text(node)

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
    text = node.value
    if not isinstance(text, str):  # the value of a list or a mapping is a list of nodes
        raise _invalid("a list or a mapping where text is expected", node)
    return text


def _invalid(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
