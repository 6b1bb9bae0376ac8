"""Refuse names that are pronouns, prepositions or participles instead of nouns and verbs.

    python -m docs.name_lint                  # all code; part of `make lint`
    python -m docs.name_lint bilora_diffusion # any files or folders

The name of a value is a noun: `candidate`, not `one`; `layer_factors`, not `own`. The name of a
function has a verb: `escape_markdown`, not `escaped`. Properties, context managers
(`with restored(weights):`) and test helpers may be participles.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS_THAT_NAME_NOTHING = frozenset(
    """
    own one ones other others what which that this its it each every all any some such same
    whole rest more most less least many few much enough
    of at by without within beside beyond above below around between apart along
    again now then here there once already alone away back
    given taken made found shown said told asked wanted held kept seen known drawn dealt done gone
    meant named used sent lent begun stolen
    odd wrong untold unseen unsaid unknown idle alive
    """.split()  # noqa: SIM905
)
# Verbs that end in -ed and are not participles
VERBS_IN_ED = frozenset(["embed", "feed", "need", "seed", "speed"])
# Functions that format text within f-strings; their participles are accepted.
TEXT_FUNCTIONS = frozenset(["counted", "listed", "quoted"])
PATHS = (
    "app",
    "benchmarks",
    "bilora_diffusion",
    "docs",
    "eval",
    "examples",
    "tests",
    "train_dreambooth_bilora.py",
    "train_text_bilora.py",
)


def main(paths: Sequence[str]) -> int:
    """Print each refused name with file and line; return 1 if there is any, else 0."""
    count = 0
    for path in tracked_files(paths or PATHS):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if "tests" not in path.relative_to(ROOT).parts:
            for line, name in participle_functions(tree):
                print(f"{path.relative_to(ROOT)}:{line}: the function name {name!r} is not a verb")
                count += 1
        for line, name in sorted(set(new_names(tree))):
            is_dunder = name.startswith("__") and name.endswith("__")  # `__all__`
            if not is_dunder and name.strip("_").lower() in WORDS_THAT_NAME_NOTHING:
                print(f"{path.relative_to(ROOT)}:{line}: the name {name!r} is not a noun")
                count += 1
    return int(count > 0)


def tracked_files(paths: Sequence[str]) -> list[Path]:
    """Return the tracked Python files among these files and below these folders."""
    command = ["git", "ls-files", "--", *paths]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listing.stdout.splitlines() if name.endswith(".py")]
    return [path for path in files if path.exists()]


def new_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every variable, argument, attribute, function and class definition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def participle_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every function whose name is a single regular participle."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        word = node.name.strip("_")
        if "_" in word or not word.endswith("ed") or word in VERBS_IN_ED | TEXT_FUNCTIONS:
            continue
        signs = [ast.unparse(decorator) for decorator in node.decorator_list]
        if node.returns is not None:
            signs.append(ast.unparse(node.returns))
        if not any("property" in sign or "contextmanager" in sign.lower() for sign in signs):
            yield node.lineno, node.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
