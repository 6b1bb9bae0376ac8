"""``--validation_part i/n``: measure one of n parts of the validation set.

What was chosen by one part is judged by another; and what is held out is not to be learned.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from ..core.errors import UserError

MOST_PARTS = 1000
Contents = Sequence[tuple[str, Hashable]]
"""The name of each sample, and a key of its content."""


def read_part(text: str) -> tuple[int, int]:
    """Number of the part, from 1, and how many there are; refuses what is not such an i/n."""
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count <= MOST_PARTS:
        raise UserError(
            f'--validation_part is "{text}": write i/n with i from 1 to n and n up to {MOST_PARTS},'
            " for example 1/2."
        )
    return number, count


def chosen(part: str | None, names: Sequence[str], set_name: str) -> list[int]:
    """The positions of a part's samples, in order; all of them where ``part`` is None.

    Args:
        names: an identifier of each sample; samples of one name fall into one part.
        set_name: the set, for a message.

    Raises:
        UserError: there are not so many different samples as parts.
    """
    if part is None:
        return list(range(len(names)))
    from ..core.seeds import parts  # which takes torch, and a command line is read before

    number, count = read_part(part)
    different = list(dict.fromkeys(names))
    if len(different) < count:
        raise UserError(
            f"--validation_part {part} asks for {count} parts of {set_name}, which has"
            f" {len(different)}: ask for fewer."
        )
    part_names = {different[index] for index in parts(different, count)[number - 1]}
    return [index for index, name in enumerate(names) if name in part_names]


def copies(noun: str, training: Contents, heldout: Contents | None = None) -> str | None:
    """A sentence on held-out samples that are trained on too; None where none is.

    Args:
        noun: samples in the plural, such as "images".
        training: samples that are trained on.
        heldout: samples that are held out; None where folds hold out parts of ``training``.
    """
    first_names: dict[Hashable, str] = {}
    pairs: list[tuple[str, str]] = []  # a held-out sample, and the training sample it equals
    for name, content in training:
        if content in first_names:
            pairs.append((name, first_names[content]))
        first_names.setdefault(content, name)
    count = f"{len(training)} {noun}"
    if heldout is not None:
        pairs = [(name, first_names[key]) for name, key in heldout if key in first_names]
        count = f"{len(heldout)} held-out {noun}"
    if not pairs:
        return None
    heldout_name, training_name = pairs[0]
    return (
        f"{len(pairs)} of the {count} are copies of what is learned from, such as {heldout_name} of"
        f" {training_name}, so the held-out loss is too low: drop one of the two."
    )
