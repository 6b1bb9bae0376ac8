"""The commands of a page, expanded by bash as a reader's shell would.

Functions stand in the place of the programs and write down the arguments that they get.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python -m|python \w+/|accelerate launch|make |pip install|for )[^`]*)`")
PROGRAMS = ("python", "accelerate", "make", "pip", "pre-commit", "bilora")
END = "\x1e"
BASH = shutil.which("bash") or "bash"


def scripts(page: Path) -> Iterator[str]:
    """The bash blocks of a page, then the commands within its sentences."""
    text = page.read_text(encoding="utf-8").replace(".venv/bin/", "")
    for language, body in BLOCK.findall(text):
        if language == "bash":
            yield body
    for command in INLINE.findall(BLOCK.sub("", text)):
        # An ellipsis stands for whatever else a reader wants.
        yield " ".join(command.replace(" ...", "").split())


def commands(script: str, folder: Path) -> list[list[str]]:
    """The commands that a script starts in a folder, each as its words."""
    record = folder / "started"
    record.write_text("")
    started = shlex.quote(str(record))
    functions = "".join(
        f"{name}() {{ printf '%s\\0' {name} \"$@\" '{END}' >> {started}; }}\n" for name in PROGRAMS
    )
    bash = [BASH, "-e", "-c", functions + script]
    without_programs = {"PATH": "/nonexistent"}
    run = subprocess.run(bash, cwd=folder, env=without_programs, capture_output=True, text=True)
    assert run.returncode == 0, f"{script}\n{run.stderr}"
    return [words.split("\0")[:-1] for words in record.read_text().split(f"{END}\0")[:-1]]
