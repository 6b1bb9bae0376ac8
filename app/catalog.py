"""Run folders, results and figures below the viewer's root, without widgets.

    catalog = Catalog(Path("demo"))
    catalog.scan.runs, catalog.scan.scores, catalog.scan.results, catalog.scan.broken
    catalog.resolve("lora/metrics.jsonl")        # refuses paths that lead out of the root

All paths in the items are POSIX paths relative to the root ("." is the root). Always open a file by
the path that `Catalog.resolve` returns: the folders may come from somebody else, and a link in them
must not give visitors of the viewer access to other files on this machine.
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
from bilora_diffusion.run.record import METRICS, RUN, VALIDATION, read_run
from eval.results import table
from eval.results.table import FILE

from .runs import RunItem, run_name
from .scores import Scores, read_scores

# Kind of the results with scored images
SCORES = "clip_scores"
# Pattern of the first validation image of each step
IMAGES = f"{VALIDATION}/step-*/000.png"
# Pattern of a file in each checkpoint
CHECKPOINTS = "checkpoints/step-*/digests.json"
# Exports of a run: a diffusers LoRA, full models, or a PEFT adapter of a text model
EXPORTED = (FILE_NAME, *DENOISERS, WEIGHTS)

# Pattern of the hash of a step's samples and noise, in a line of the log
DATA_HASH = re.compile(rb'"digest": "([0-9a-f]{1,128})"')
# Number of bytes at the beginning of a log that contain its first step
HEAD_BYTES = 8_192

# Maximum depth of the searched folders below the root
DEPTH = 6
# Names of folders that contain no runs or results; hidden folders are also skipped.
SKIPPED = frozenset(
    {"checkpoints", "images", VALIDATION, "logs", *COMPONENTS}
    | {"node_modules", "__pycache__", "site-packages", "build", "dist"}
)

LINK = "it is a link out of the root: copy it, or give the link's target as the root"
# Maximum number of digits of a step; JavaScript rounds larger integers.
MAX_STEP_DIGITS = 15
RENAME = "its name is not UTF-8: rename it"
BACKSLASH = "its name has a backslash, which separates folders on Windows: rename it"
# Time in which all visitors share one scan of the root
FRESH_SECONDS = 2.0


@dataclass(frozen=True)
class ResultItem:
    """A result folder."""

    path: str
    name: str
    # Name of the command that wrote it
    kind: str
    # `Scores` for scored images, otherwise the head of ``result.json``
    result: Any
    # Paths of the figures (PNG files) that exist, relative to the root
    figures: list[str]

    def file(self, name: str) -> str:
        """Return the path of a file in this folder, relative to the root."""
        return join(self.path, name)


@dataclass(frozen=True)
class BrokenFolder:
    """A folder that can't be shown completely, and the reason in one sentence."""

    path: str
    reason: str


@dataclass
class Scan:
    """The folders found by one scan of the root, sorted by path; `results` includes `scores`."""

    runs: list[RunItem] = field(default_factory=list)
    scores: list[ResultItem] = field(default_factory=list)
    results: list[ResultItem] = field(default_factory=list)
    broken: list[BrokenFolder] = field(default_factory=list)


class Catalog:
    """The folders under a root.

    Args:
        root: an existing folder.
        public: whether other people than the machine's user may see the page.

    Attributes:
        root: path of the root with all links resolved.
        scan: folders found by the last `refresh`.

    Raises:
        UserError: the root does not exist or is a file.
    """

    def __init__(self, root: Path, public: bool = False) -> None:
        root = Path(root)
        if not root.exists():
            raise UserError(f"there is no folder {root}: give the folder that holds your runs")
        if not root.is_dir():
            raise UserError(f"{root} is a file: give the folder that holds your runs")
        self.root = root.resolve()
        self._public = public
        self._lock = threading.Lock()
        self._cache: dict[Path, tuple[Any, Any]] = {}  # file -> (state of the file, content)
        self.scan = Scan()
        self._scan_time = 0.0
        self.refresh()

    @property
    def name(self) -> str:
        """Name of the root without its parent folders."""
        return self.root.name or "/"

    def command_path(self, path: str = ".") -> str:
        """Return a path below the root as a command's argument, relative to the working folder.

        If the root is outside of the working folder, the path is absolute; on a public page, it
        then begins with the root's name, without the parent folders.
        """
        folder = self.root
        working_folder = Path.cwd()
        if folder.is_relative_to(working_folder):
            folder = folder.relative_to(working_folder)
        if self._public and folder.is_absolute():
            folder = Path(self.name)
        return str(PurePosixPath(folder.as_posix()) / path)

    def without_root(self, error: Exception, folder: str = ".") -> str:
        """Return an error's message in one line, without the absolute paths of root and folder."""
        text = " ".join(str(error).split())
        return text.replace(f"{self.root / folder}/", "").replace(str(self.root), self.name)

    def content_hash(self, kind: str) -> str:
        """Return a hash of the "runs", "scores" or "results", which a page uses to find changes.

        Of a run's record, it includes only the status. So the hash of a training run changes only
        with the run's status, weights, images, checkpoints or first logged step.
        """
        if kind == "runs":
            items = [replace(run, record={"status": run.status}) for run in self.scan.runs]
        else:
            # A changed file is read again and becomes a new object with another id.
            items = [(item.path, id(item.result)) for item in getattr(self.scan, kind)]
        return hashlib.sha256(repr(items).encode()).hexdigest()[:16]

    def resolve(self, relative: str) -> Path:
        """Return the absolute path of a file or folder below the root, with links resolved.

        Args:
            relative: POSIX path relative to the root; the file may be missing.

        Raises:
            UserError: the path leads out of the root, is absolute, has a backslash or a null
                character, or can't be followed.
        """
        parts = PurePosixPath(relative)
        # A backslash separates folders on Windows.
        if "\0" in relative or "\\" in relative or parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{relative!r} is not a path below the root: give a relative one")
        try:
            path = (self.root / parts).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links
            raise UserError(f"{relative!r} can't be followed: give another path") from error
        if not path.is_relative_to(self.root):
            raise UserError(f"{relative!r} leads out of the root: copy it into the root instead")
        return path

    def read_cached(self, file: Path, read: Callable[[], Any]) -> Any:
        """Call `read` for a file and cache the result until the file changes.

        Raises:
            OSError: the file is missing.
        """
        status = file.stat()
        state = (status.st_ino, status.st_mtime_ns, status.st_size)
        cached_state, content = self._cache.get(file, (None, None))
        if cached_state != state:
            content = read()
            self._cache[file] = (state, content)
        return content

    def refresh_if_stale(self) -> None:
        """Scan the root again, unless the last scan is still fresh."""
        if time.monotonic() - self._scan_time > FRESH_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Scan the root again; unchanged files are not read again."""
        with self._lock:
            scan = Scan()
            for folder, names in self._folders(scan):
                self._read_folder(folder, names, scan)
            self.scan = scan
            self._scan_time = time.monotonic()

    def _folders(self, scan: Scan) -> Iterator[tuple[str, set[str]]]:
        """Yield folders below the root with the names of their entries, sorted by path.

        Unreadable folders, links out of the root, and folders whose name is not UTF-8 or has a
        backslash are added to the scan's broken folders.
        """
        waiting_folders = [(".", 0)]  # a stack, with the depth of each folder
        while waiting_folders:
            folder, depth = waiting_folders.pop()
            try:
                with os.scandir(self.root / folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                scan.broken.append(BrokenFolder(folder, f"it can't be read ({error.strerror})"))
                continue
            names = {entry.name for entry in entries}
            subfolders = []
            for entry in entries:
                path = join(folder, entry.name)
                if entry.name in SKIPPED or entry.name.startswith("."):
                    continue
                if not is_text(entry.name) and is_folder(Path(entry.path)):
                    scan.broken.append(BrokenFolder(join(folder, ascii(entry.name)), RENAME))
                elif "\\" in entry.name and is_folder(Path(entry.path)):
                    scan.broken.append(BrokenFolder(path, BACKSLASH))
                elif entry.is_symlink() and Path(entry.path).is_dir():
                    # A link within the root is not followed, because it could form a cycle; the
                    # scan finds its target anyway.
                    if not Path(entry.path).resolve().is_relative_to(self.root):
                        scan.broken.append(BrokenFolder(path, LINK))
                elif entry.is_dir(follow_symlinks=False) and depth < DEPTH:
                    subfolders.append((path, depth + 1))
            if "pyvenv.cfg" not in names:
                # Reversed, so that the first subfolder is taken from the stack first.
                waiting_folders += reversed(subfolders)
                yield folder, names

    def _read_folder(self, folder: str, names: set[str], scan: Scan) -> None:
        """Add the run and the result in a folder to a scan, if there are any."""
        title = self.name if folder == "." else folder  # shown in lists
        if RUN in names:
            record = self._read_file(folder, RUN, read_run, scan)
            if record is not None:
                scan.runs.append(self._run_item(folder, title, names, record))
        if FILE in names:
            result = self._read_file(folder, FILE, read_result, scan)
            if result is not None:
                item = self._result_item(folder, title, names, result, scan)
                scan.results.append(item)
                if isinstance(result, Scores):
                    scan.scores.append(item)

    def _run_item(
        self, folder: str, title: str, names: set[str], record: dict[str, Any]
    ) -> RunItem:
        """Describe a run folder by its record and its files."""
        weights = None
        for file in EXPORTED:
            if weights is None and file in names:
                weights = join(folder, file)
        data_hash = None
        if METRICS in names:
            with contextlib.suppress(UserError, OSError):
                data_hash = read_data_hash(self.resolve(join(folder, METRICS)))
        return RunItem(
            path=folder,
            name=run_name(title, record),
            record=record,
            weights=weights,
            steps=read_steps(self.root / folder, IMAGES),
            checkpoints=read_steps(self.root / folder, CHECKPOINTS),
            data_hash=data_hash,
        )

    def _result_item(
        self, folder: str, title: str, names: set[str], result: Any, scan: Scan
    ) -> ResultItem:
        """Describe a result folder; if a figure is missing, the folder is also listed as broken."""
        head = vars(result.result) if isinstance(result, Scores) else result
        figures = []
        missing_files = []
        for file in head["figures"]:
            if file in names:
                figures.append(join(folder, file))
            else:
                missing_files.append(file)
        if missing_files:
            reason = f"{FILE} names {missing_files[0]}, which is missing: run its command again"
            scan.broken.append(BrokenFolder(folder, reason))
        return ResultItem(folder, title, head["kind"], result, figures)

    def _read_file(self, folder: str, file: str, read: Callable[[Path], Any], scan: Scan) -> Any:
        """Read a folder's file with `read`; if it fails, add a broken folder and return None."""
        try:
            path = self.resolve(join(folder, file))
            # The reader gets the folder's path below the root even if the file is a link, because
            # its messages name that path.
            return self.read_cached(path, lambda: read(self.root / folder))
        except UserError as error:
            reason = self.without_root(error, folder)
        except OSError as error:
            reason = f"{file} can't be read ({error.strerror})"
        except Exception as error:
            # Catch any exception, because a damaged folder must not hide the others.
            reason = f"{file} is damaged ({type(error).__name__})"
        scan.broken.append(BrokenFolder(folder, reason))
        return None


def join(folder: str, name: str) -> str:
    """Return the path of a folder's entry, relative to the root."""
    return str(PurePosixPath(folder) / name)


def read_steps(folder: Path, pattern: str) -> tuple[int, ...]:
    """Return the steps of a run that have a file matching the pattern, in order."""
    steps = []
    for path in folder.glob(pattern):
        digits = path.parent.name.removeprefix("step-")
        if digits.isdecimal() and len(digits) <= MAX_STEP_DIGITS:
            steps.append(int(digits))
    return tuple(sorted(steps))


def read_data_hash(file: Path) -> str | None:
    """Read the data hash of a log's first step; None if there is no log, step or hash."""
    if not is_file(file):
        return None
    with file.open("rb") as log:
        match = DATA_HASH.search(log.read(HEAD_BYTES))
    if match is None:
        return None
    return match[1].decode()


def read_result(folder: Path) -> Scores | dict[str, Any]:
    """Read a result: `Scores` of images, or the head of another command's ``result.json``.

    Raises:
        UserError: the file is damaged.
    """
    record = table.head(folder)
    figures = record.get("figures")
    # Accept only plain file names, so that each figure is inside the folder.
    if not isinstance(figures, list) or not all(
        isinstance(name, str) and name == Path(name).name for name in figures
    ):
        raise UserError(f"{folder / FILE} is damaged: run python -m eval.{record['kind']} again")
    if record["kind"] == SCORES:
        return read_scores(table.read(folder))
    return record
