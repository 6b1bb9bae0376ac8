"""``--validation_part i/n``: measure one of n parts of the validation set.

What was chosen by one part is judged by another; and what is held out is not to be learned.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from ..core.errors import UserError

MOST_PARTS = 1000
Contents = Sequence[tuple[str, Hashable]]
"""Of each sample its name, and what tells its content from others."""


def read_part(text: str) -> tuple[int, int]:
    """Number of the part, from 1, and how many there are; refuses what is not such an i/n."""
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count <= MOST_PARTS:
        raise UserError(
            f'--validation_part is "{text}": write i/n with i from 1 to n and n up to {MOST_PARTS},'
            " for example 1/2."
        )
    return number, count


def chosen(part: str | None, names: Sequence[str], what: str) -> list[int]:
    """The positions of a part's samples, in order; all of them where ``part`` is None.

    Args:
        names: what identifies each sample; samples of one name fall into one part.
        what: the set, for a message.

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
            f"--validation_part {part} asks for {count} parts of {what}, which has"
            f" {len(different)}: ask for fewer."
        )
    own = {different[i] for i in parts(different, count)[number - 1]}
    return [i for i, name in enumerate(names) if name in own]


def copies(what: str, learned: Contents, held: Contents | None = None) -> str | None:
    """A sentence on held-out samples that are learned from too; None where none is.

    Args:
        what: they are called, such as "images".
        learned: what is trained on.
        held: what is held out; None where folds hold out parts of ``learned``.
    """
    first: dict[Hashable, str] = {}
    found: list[tuple[str, str]] = []
    for name, content in learned:
        if content in first:
            found.append((name, first[content]))
        first.setdefault(content, name)
    if held is not None:
        found = [(name, first[content]) for name, content in held if content in first]
    if not found:
        return None
    count = f"{len(learned)} {what}" if held is None else f"{len(held)} held-out {what}"
    return (
        f"{len(found)} of the {count} are copies of what is learned from, such as {found[0][0]} of"
        f" {found[0][1]}, so the held-out loss is too low: drop one of the two."
    )
