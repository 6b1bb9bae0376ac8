"""Hold the folders to the budgets of SCOPE.md.

python -m docs.scope        # fails above a budget; make lint runs it
python -m docs.scope --show # the lines that each folder has
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| `([\w/*. ]+)` \| *([\d,]*) \|", re.MULTILINE)


def budgets(text: str) -> dict[str, int]:
    """Folders or files -> lines, from the table below "## Budgets"."""
    table = text.partition("## Budgets")[2]
    return {name: int(lines.replace(",", "") or 0) for name, lines in ROW.findall(table)}


def lines_of(root: Path, row: str, others: Sequence[str]) -> int:
    """Lines of the Python files of a row, without those that a narrower row counts."""
    files = {file for part in row.split() for file in _files(root, part)}
    narrower = {
        file
        for other in others
        for part in other.split()
        if other != row and (own := set(_files(root, part))) < files
        for file in own
    }
    return sum(len(file.read_text("utf-8").splitlines()) for file in files - narrower)


def _files(root: Path, part: str) -> list[Path]:
    return list(root.glob(part)) if part.endswith(".py") else list((root / part).rglob("*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Print what exceeds its budget; 1 if anything does."""
    table, over = budgets((ROOT / "SCOPE.md").read_text("utf-8")), 0
    for row, most in table.items():
        lines = lines_of(ROOT, row, list(table))
        if lines > most:
            over = 1
            print(f"{row}: {lines} lines, {most} in SCOPE.md: take something out.")
        elif argv:
            print(f"{row}: {lines} of {most}")
    return over


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
