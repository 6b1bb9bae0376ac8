"""``--validation_part i/n``: measure one of n parts of the validation set.

What was chosen by one part is judged by another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import UserError

MOST_PARTS = 1000


def read_part(text: str) -> tuple[int, int]:
    """Number of the part, from 1, and how many there are.

    Raises:
        UserError: it is not i/n with 1 <= i <= n.
    """
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

    Samples of one name fall into one part, so that none is in two.

    Args:
        names: what identifies each sample, wherever it stands.
        what: the set, for a message.

    Raises:
        UserError: there are not so many different samples as parts.
    """
    if part is None:
        return list(range(len(names)))
    from ..seeds import parts  # which takes torch, and a command line is read before

    number, count = read_part(part)
    different = list(dict.fromkeys(names))
    if len(different) < count:
        raise UserError(
            f"--validation_part {part} asks for {count} parts of {what}, which has"
            f" {len(different)}: ask for fewer."
        )
    own = {different[i] for i in parts(different, count)[number - 1]}
    return [i for i, name in enumerate(names) if name in own]
