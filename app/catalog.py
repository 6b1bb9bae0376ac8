"""Run folders, results and figures under the viewer's root. No widgets here.

    catalog = Catalog(Path("demo"))
    catalog.scan.runs, catalog.scan.scores, catalog.scan.figures, catalog.scan.broken
    catalog.resolve("lora/metrics.jsonl")        # refuses whatever leads out of the root

All paths in the items are POSIX and relative to the root ("." is the root itself). Open a file only
by what :meth:`Catalog.resolve` returns for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import is_file, is_folder, is_text
from bilora_diffusion.core.lora_names import (
    COMPONENTS,
    DENOISERS,
    FILE_NAME,
    WEIGHTS,
)
from bilora_diffusion.run.folder import FIT
from bilora_diffusion.run.record import METRICS, RUN, VALIDATION, read_run
from eval import table
from eval.table import FILE

from .runs import RunItem, label
from .scored import Scored, scored

SCORES = "clip_scores"
IMAGES, CHECKPOINTS = f"{VALIDATION}/step-*/000.png", "checkpoints/step-*/digests.json"
"""Files by which a run's steps are known."""
EXPORTED = (FILE_NAME, *DENOISERS, WEIGHTS)
"""Exports of a run: a diffusers LoRA, whole models, or a PEFT adapter of a text model."""

DATA_HASH = re.compile(rb'"digest": "([0-9a-f]{1,128})"')
HEAD_BYTES = 8_192
"""Bytes at the beginning of a log, which have its first step."""

DEPTH = 6  # levels of folders below the root that are looked at
SKIPPED = frozenset(
    {"checkpoints", "images", VALIDATION, "logs", *COMPONENTS}
    | {"node_modules", "__pycache__", "site-packages", "build", "dist"}
)
"""Folders that hold no run or result of their own; hidden ones are skipped as well."""

LINK = "it is a link out of the root: copy it, or give its own folder as the root"
DIGITS = 15  # of a step at most; JavaScript's numbers end there
RENAME = "its name is not UTF-8: give it another"
FRESH_SECONDS = 2.0  # for which a look at the root serves all visitors


@dataclass(frozen=True)
class ResultItem:
    """A result folder.

    Args:
        kind: name of the command.
        result: a :class:`Scored` of scored images, else ``result.json``.
        figures: PNG files relative to the root.
    """

    path: str
    name: str
    kind: str
    result: Any
    figures: list[str]

    def file(self, name: str) -> str:
        """A file of this folder, relative to the root, for :meth:`Catalog.resolve`."""
        return _join(self.path, name)


@dataclass(frozen=True)
class Broken:
    """A folder that can't be shown, and the reason in one sentence."""

    path: str
    reason: str


@dataclass
class Scan:
    """The folders that one look at the root finds, by path; ``scores`` are among ``figures``."""

    runs: list[RunItem] = field(default_factory=list)
    scores: list[ResultItem] = field(default_factory=list)
    figures: list[ResultItem] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)


class Catalog:
    """The folders under a root; ``scan`` has them as they were at the last :meth:`refresh`.

    Args:
        root: an existing folder.
        public: whether others than this machine's user may see :meth:`place`.
    """

    def __init__(self, root: Path, public: bool = False) -> None:
        root = Path(root)
        if not root.exists():
            raise UserError(f"there is no folder {root}: give the folder that holds your runs")
        if not root.is_dir():
            raise UserError(f"{root} is a file: give the folder that holds your runs")
        self.root, self._public = root.resolve(), public
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[Any, Any]] = {}
        self.scan, self._scan_time = Scan(), 0.0
        self.refresh()

    @property
    def name(self) -> str:
        """Name of the root, without its place on the machine."""
        return self.root.name or "/"

    def place(self, path: str = ".") -> str:
        """The name of a path below the root for a command started in this process' folder.

        Where others may see it, a root that lies elsewhere is called by its name alone.
        """
        root, working_folder = self.root, Path.cwd()
        place = root
        if root.is_relative_to(working_folder):
            place = root.relative_to(working_folder)
        if self._public and place.is_absolute():
            place = Path(self.name)
        return str(PurePosixPath(place.as_posix()) / path)

    def plain(self, error: Exception, folder: str = ".") -> str:
        """An error as one line without a folder's place on the machine."""
        text = " ".join(str(error).split())
        return text.replace(f"{self.root / folder}/", "").replace(str(self.root), self.name)

    def sign(self, kind: str) -> str:
        """Changes whenever there is something else among the "runs", "scores" or "figures".

        A run that goes on counts as the same until its status, weights, images or checkpoints
        change.
        """
        if kind == "runs":
            parts = [replace(run, record={"status": run.status}) for run in self.scan.runs]
        else:
            parts = [(item.path, id(item.result)) for item in getattr(self.scan, kind)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def resolve(self, relative: str) -> Path:
        """The file or folder that ``relative`` names.

        Args:
            relative: POSIX path below the root; need not exist.
        """
        parts = PurePosixPath(relative)
        if "\0" in relative or "\\" in relative or parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{relative!r} is not a path below the root: give a relative one")
        try:
            place = (self.root / parts).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links
            raise UserError(f"{relative!r} can't be followed: give another path") from error
        if not place.is_relative_to(self.root):
            raise UserError(f"{relative!r} leads out of the root: copy it into the root instead")
        return place

    def cached(self, file: Path, read: Callable[[], Any]) -> Any:
        """A file by ``read``, called again only where the file has changed.

        Raises:
            OSError: there is none.
        """
        status = file.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if file not in self._read or self._read[file][0] != stamp:
            self._read[file] = (stamp, read())
        return self._read[file][1]

    def look(self) -> None:
        """:meth:`refresh`, unless that was a moment ago."""
        if time.monotonic() - self._scan_time > FRESH_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Look at the root again; files that have not changed are not read again."""
        with self._lock:
            scan = Scan()
            for folder, names in self._folders(scan):
                self._read_folder(folder, names, scan)
            self.scan, self._scan_time = scan, time.monotonic()

    def _folders(self, scan: Scan) -> Iterator[tuple[str, set[str]]]:
        """Folders below the root and the names of the files in each, by path."""
        waiting = [(".", 0)]
        while waiting:
            folder, depth = waiting.pop()
            try:
                with os.scandir(self.root / folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                scan.broken.append(Broken(folder, f"it can't be read ({error.strerror})"))
                continue
            subfolders, names = [], {entry.name for entry in entries}
            for entry in entries:
                path = _join(folder, entry.name)
                is_search = entry.name == FIT and RUN in names
                if entry.name in SKIPPED or entry.name.startswith(".") or is_search:
                    continue
                if not is_text(entry.name) and is_folder(Path(entry.path)):
                    scan.broken.append(Broken(_join(folder, ascii(entry.name)), RENAME))
                elif entry.is_symlink() and Path(entry.path).is_dir():
                    # One that stays inside is shown where it leads to; followed, it could circle.
                    if not Path(entry.path).resolve().is_relative_to(self.root):
                        scan.broken.append(Broken(path, LINK))
                elif entry.is_dir(follow_symlinks=False) and depth < DEPTH:
                    subfolders.append((path, depth + 1))
            if "pyvenv.cfg" not in names:
                waiting += reversed(subfolders)
                yield folder, names

    def _read_folder(self, folder: str, names: set[str], scan: Scan) -> None:
        name = self.name if folder == "." else folder
        if RUN in names:
            record = self._read_file(folder, RUN, read_run, scan)
            if record is not None:
                exported = [_join(folder, file) for file in EXPORTED if file in names]
                run = RunItem(
                    path=folder,
                    name=label(name, record),
                    record=record,
                    weights=exported[0] if exported else None,
                    steps=read_steps(self.root / folder, IMAGES),
                    checkpoints=read_steps(self.root / folder, CHECKPOINTS),
                    data_hash=self._data_hash(folder) if METRICS in names else None,
                )
                scan.runs.append(run)
        result = self._read_file(folder, FILE, read_result, scan) if FILE in names else None
        if result is not None:
            head = vars(result.result) if isinstance(result, Scored) else result
            pictures = []
            missing = []
            for file in head["figures"]:
                if file in names:
                    pictures.append(_join(folder, file))
                else:
                    missing.append(file)
            if missing:
                reason = f"{FILE} names {missing[0]}, which is not there: make the result again"
                scan.broken.append(Broken(folder, reason))
            item = ResultItem(folder, name, head["kind"], result, pictures)
            scan.figures.append(item)
            if isinstance(result, Scored):
                scan.scores.append(item)

    def _data_hash(self, folder: str) -> str | None:
        with contextlib.suppress(UserError, OSError):
            return read_data_hash(self.resolve(_join(folder, METRICS)))
        return None

    def _read_file(self, folder: str, file: str, read: Callable[[Path], Any], scan: Scan) -> Any:
        """A folder's file by ``read``, or None and a line among the broken ones."""
        try:
            # The reader gets the folder's own name, so that messages have it too.
            place = self.resolve(_join(folder, file))
            return self.cached(place, lambda: read(self.root / folder))
        except UserError as error:
            reason = self.plain(error, folder)
        except OSError as error:
            reason = f"{file} can't be read ({error.strerror})"
        except Exception as error:
            # One damaged folder never hides the good ones, whatever is in it.
            reason = f"{file} is damaged ({type(error).__name__})"
        scan.broken.append(Broken(folder, reason))
        return None


def _join(folder: str, name: str) -> str:
    return str(PurePosixPath(folder) / name)


def read_steps(folder: Path, pattern: str) -> tuple[int, ...]:
    """The steps of a run that have a file of this pattern, in order."""
    names = [path.parent.name.removeprefix("step-") for path in folder.glob(pattern)]
    return tuple(sorted(int(name) for name in names if name.isdecimal() and len(name) <= DIGITS))


def read_data_hash(file: Path) -> str | None:
    """The hash of the data of a log's first step; None where the log has none yet."""
    if not is_file(file):
        return None
    with file.open("rb") as log:
        match = DATA_HASH.search(log.read(HEAD_BYTES))
    return match[1].decode() if match else None


def read_result(folder: Path) -> Scored | dict[str, Any]:
    """A result: its scored images, or of another command ``result.json``."""
    record = table.head(folder)
    pictures = record.get("figures")
    if not isinstance(pictures, list) or not all(
        isinstance(name, str) and name == Path(name).name for name in pictures
    ):
        raise UserError(f"{folder / FILE} is damaged: run python -m eval.{record['kind']} again")
    return scored(table.read(folder)) if record["kind"] == SCORES else record
