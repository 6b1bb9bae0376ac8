"""Examples of a task of the catalog, or of a local file."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..files import reason
from ..seeds import digest_texts
from .encode import quiet_datasets
from .entry import TextTask
from .examples import Example, subset
from .files import open_file
from .packages import read_rows

__all__ = ["open_file", "open_task"]


def open_task(
    task: TextTask,
    split: str,
    *,
    kind: str,
    cache_dir: str | None = None,
    seed: int = 0,
) -> list[Example]:
    """The examples of one split.

    Args:
        split: "train" or "validation".
        kind: "seq2seq", "causal" or "classification": a classifier is given bare sentences.
        cache_dir: where downloads are kept; None: the ``datasets`` library's folder.
        seed: draws the part of a training split of which only a part is used, and generated
            training questions. What is held out does not depend on it.

    Raises:
        UserError: the set can't be loaded, or is another one than the task was made for.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'a split is "train" or "validation", not "{split}"')
    stored = (task.validation or task.train) if split == "validation" else task.train
    rows = _packaged(task, split, seed) if task.package else _load(task, stored, cache_dir)
    numbers = list(range(len(rows)))
    if task.validation is None:
        held = held_out(task, rows)
        numbers = [n for n in numbers if (n in held) == (split == "validation")]
    if split == "train":
        numbers = subset(numbers, task.max_train_samples, seed, "train")
    places = (f'row {n + 1} of the split "{stored}" of {task.dataset}' for n in numbers)
    chosen = rows.select(numbers)
    return [task.example(row, kind, place) for row, place in zip(chosen, places, strict=True)]


def held_out(task: TextTask, rows: Any) -> set[int]:
    """Numbers of the rows that a task without a validation split holds out: ``task.holdout`` or a
    few more, because equal values of ``task.group`` stay together. The groups with the lowest
    hashes are taken, so the choice depends on the texts alone and on no seed or order.

    Raises:
        UserError: the set lacks the column, or does not have more rows than that.
    """
    if task.group not in rows.column_names:
        raise UserError(
            f'{task.dataset} has no column "{task.group}", only {", ".join(rows.column_names)}: the'
            f" set is not the one that the task {task.name} was made for."
        )
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(rows[task.group]):
        groups.setdefault(str(key), []).append(number)
    held: set[int] = set()
    for key in sorted(groups, key=lambda key: digest_texts(["held out", key])):
        if len(held) >= task.holdout:
            return held
        held.update(groups[key])
    raise UserError(
        f"{task.dataset} has {len(rows)} rows, and {task.name} holds {task.holdout} of them out:"
        " its download is incomplete, delete it and try again."
    )


def _packaged(task: TextTask, split: str, seed: int) -> Any:
    import datasets

    return datasets.Dataset.from_list(read_rows(task, split, seed))


def _load(task: TextTask, split: str, cache_dir: str | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    place: tuple[Any, ...] = (task.dataset, task.config_name)
    files: dict[str, Any] = {}
    for _ in range(2):
        try:
            with quiet_datasets():
                return datasets.load_dataset(*place, split=split, cache_dir=cache_dir, **files)
        except DatasetNotFoundError as error:
            raise UserError(
                f'the hub has no dataset "{task.dataset}" that you may read, which the task'
                f" {task.name} needs: log in with `hf auth login`, or give a file by --train_file."
            ) from error
        except (OSError, RuntimeError, ValueError, DatasetsError) as error:
            if "Dataset scripts are no longer supported" not in str(error) or files:
                raise UserError(
                    f"the dataset {task.dataset} of the task {task.name} could not be loaded"
                    f" ({reason(error)}): check the connection, or give a file by --train_file."
                ) from error
            # Of sets that come as a script, the hub keeps Parquet files on a branch.
            branch = f"hf://datasets/{task.dataset}@refs%2Fconvert%2Fparquet"
            part = f"{branch}/{task.config_name or 'default'}/{split}/*.parquet"
            place, files = ("parquet",), {"data_files": {split: part}}
    raise AssertionError("the second attempt returns or raises")
