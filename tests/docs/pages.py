"""The commands of a page, expanded by bash as in a reader's shell.

Shell functions replace the programs and record their arguments.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as distributed_parser

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(
    r"`((?:\w+=\w+ )*"
    r"(?:python3? (?:-m|[\w/]+\.py)|accelerate launch|torchrun|bilora \w+ -|bilora caption |make "
    r"|pip |git |for )"
    r"[^`]*)`"
)
PROGRAMS = (
    "python",
    "python3",
    "accelerate",
    "torchrun",
    "bilora",
    "make",
    "pip",
    "git",
    "pre-commit",
    "activate",
)
ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
AGENTS = ROOT / "AGENTS.md"
DOCS = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]
IMAGE_SCRIPT = "train_dreambooth_bilora.py"
TEXT_SCRIPT = "train_text_bilora.py"
SUBCOMMANDS = {
    "caption": "bilora_diffusion.caption",
    "train": IMAGE_SCRIPT,
    "text": TEXT_SCRIPT,
    "export": "bilora_diffusion.export",
    "demo": "bilora_diffusion.demo",
}
END = "\x1e"  # marks the end of a command's words
BASH = shutil.which("bash") or "bash"


def scripts(page: Path) -> Iterator[str]:
    """Yield the bash blocks of a page and the commands in its sentences, in the page's order."""
    # `activate` is a program here: without the file, `.` would skip the line's other commands.
    text = page.read_text(encoding="utf-8").replace(". .venv/bin/activate", "activate")
    text = text.replace(".venv/bin/", "")
    for match in re.finditer(f"{BLOCK.pattern}|{INLINE.pattern}", text, BLOCK.flags):
        language, body, command = match.groups()
        if command is not None:
            # An ellipsis represents a reader's other arguments.
            yield " ".join(command.replace(" ...", "").split())
        elif language == "bash":
            yield body


def commands(script: str, folder: Path) -> list[list[str]]:
    """Return the commands that a script starts in a folder, each as a list of words."""
    record = folder / "started"
    record.write_text("")
    started = shlex.quote(str(record))
    functions = ""
    for name in PROGRAMS:
        # Each word of the command ends with a null character.
        functions += f"{name}() {{ printf '%s\\0' {name} \"$@\" '{END}' >> {started}; }}\n"
    bash = [BASH, "-e", "-c", functions + script]
    without_programs = {"PATH": "/nonexistent"}
    run = subprocess.run(bash, cwd=folder, env=without_programs, capture_output=True, text=True)
    assert run.returncode == 0, f"{script}\n{run.stderr}"
    record_text = record.read_text()
    record.unlink()
    return [words.split("\0")[:-1] for words in record_text.split(f"{END}\0")[:-1]]


def program(words: list[str]) -> tuple[str, list[str]]:
    """Return the script, module or program that does a command's work, and its arguments.

    This looks through `python`, `accelerate launch`, `torchrun` and the subcommands of `bilora`.
    """
    name, *arguments = words
    if name in ("python", "python3"):
        name, *arguments = arguments
        if name == "-m":
            name, *arguments = arguments
    elif name == "accelerate":
        assert arguments[0] == "launch"
        launch = launch_command_parser().parse_args(arguments[1:])
        name = "bilora" if launch.module else launch.training_script
        arguments = launch.training_script_args
    elif name == "torchrun":
        launch = distributed_parser().parse_args(arguments)
        name, arguments = launch.training_script, launch.training_script_args
    if name == "bilora":
        name, arguments = SUBCOMMANDS[arguments[0]], arguments[1:]
    return name, arguments


def load_program(name: str) -> ModuleType:
    """Import the script or module of a command; its `main` takes the arguments."""
    if name.endswith(".py"):
        script = ROOT / name
        if str(script.parent) not in sys.path:  # the benchmarks import each other
            sys.path.insert(0, str(script.parent))
        return importlib.import_module(script.stem)
    module = importlib.import_module(name)
    return module if hasattr(module, "main") else importlib.import_module(f"{name}.__main__")
