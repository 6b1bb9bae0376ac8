"""Results as JSON files: written strictly, with kind and version, and read back as they were typed.

LANDSCAPE.write(result, folder)
LANDSCAPE.read(LandscapeResult, folder)      # refuses what is not that file, in one sentence
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from bilora_diffusion.durable import dump_json, strict_json, write_text
from bilora_diffusion.errors import UserError

Result = TypeVar("Result")
UNTYPED = (ValueError, TypeError, KeyError, AttributeError)
"""What reading a damaged record may raise."""


@dataclass(frozen=True)
class Format:
    """A file of results.

    Args:
        module: of ``eval``, whose command writes it.
        file: its name.
        kind: as the file says it; None where it says none.
        version: of its schema.
    """

    module: str
    file: str
    kind: str | None
    version: int = 1

    def text(self, result: Any) -> str:
        """A dataclass as strict JSON, a number that is not finite as null."""
        kind = {} if self.kind is None else {"kind": self.kind}
        head = {"schema_version": self.version, **kind}
        return dump_json(strict_json({**head, **asdict(result)})[0])

    def write(self, result: Any, folder: Path) -> None:
        """Write the file in one piece."""
        write_text(folder / self.file, self.text(result))

    def load(self, folder: Path) -> dict[str, Any]:
        """The file in a folder as JSON, its kind and version checked.

        Raises:
            UserError: there is none, it is damaged, or another version wrote it.
        """
        path = folder / self.file
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version, kind = record["schema_version"], record.get("kind")
        except OSError as error:
            raise UserError(
                f"{folder} holds no {self.file} that can be read: give another"
            ) from error
        except UNTYPED as error:
            raise self.damaged(folder) from error
        if (version, kind) != (self.version, self.kind):
            raise UserError(
                f"{path} is {kind!r} of schema version {version!r}, not {self.kind!r} of"
                f" {self.version}: {self._again}"
            )
        return record

    def read(self, result: type[Result], folder: Path) -> Result:
        """The result in a folder.

        Args:
            result: a dataclass; what it checks when it is made is refused as damage. Fields that it
                does not have are passed over.

        Raises:
            UserError: as :meth:`load`, or a value is of another type.
        """
        record = self.load(folder)
        try:
            return typed(result, {n: v for n, v in record.items() if n in _hints(result)})
        except UNTYPED as error:
            raise self.damaged(folder) from error

    def damaged(self, folder: Path) -> UserError:
        """What to raise where the file has not what it should have."""
        return UserError(f"{folder / self.file} is damaged: {self._again}")

    @property
    def _again(self) -> str:
        return f"run python -m eval.{self.module} again"


DYNAMICS = Format("dynamics", "dynamics.json", "dynamics")
GENERALIZATION = Format("generalization", "generalization.json", "generalization")
LANDSCAPE = Format("landscape", "landscape.json", "landscape")
SCORES = Format("clip_scores", "scores.json", "clip_scores")
SWEEP = Format("sweep", "sweep.json", None)
TEXT_SCORES = Format("text_scores", "text_scores.json", "text_scores")
FIGURES = (LANDSCAPE, DYNAMICS, GENERALIZATION, SWEEP)
"""Results with figures and a report."""


def typed(kind: Any, value: Any) -> Any:
    """A value of JSON as ``kind``: a dataclass, a list or dict of kinds, ``X | None`` or plain.

    Raises:
        TypeError: it is of another type, or a field without a default is missing.
        KeyError: a field that the dataclass does not have.
    """
    if kind is Any:
        return value
    origin, inside = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (own,) = (one for one in inside if one is not type(None))
        return None if value is None else typed(own, value)
    record = is_dataclass(kind)
    if not _is(value, dict if record else (int, float) if kind is float else origin or kind):
        raise TypeError(f"{value!r} is no {kind}")
    if record:
        make, hints = cast(Any, kind), _hints(kind)
        return make(**{name: typed(hints[name], item) for name, item in value.items()})
    if origin is list:
        return [typed(inside[0], item) for item in value]
    if origin is dict:
        return {key: typed(inside[1], item) for key, item in value.items()}
    return value


def _is(value: Any, kind: Any) -> bool:
    """``isinstance``, but true and false are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


_hints = cache(get_type_hints)
