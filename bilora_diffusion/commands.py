"""The command of the installed package; the scripts of the repository are the same functions.

    bilora demo
    bilora train --config flux2_klein --dataset my_photos --instance_prompt "a photo of TOK dog"
    bilora text --config t5_base/mrpc
    bilora export runs/dog --to kohya
    accelerate launch -m bilora_diffusion train --dataset linoyts/3d_icon

Each has ``--help``.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from .config import machine
from .core.errors import reported, run_cli
from .core.values import check_choice

NOT_COMPILED = "TORCHDYNAMO_DISABLE"
"""torch's switch: where it is "1", `torch.compile` gives back what it is given."""


def train(argv: Sequence[str] | None = None) -> int:
    """Train an image model; returns the exit code: 0, or 2 after a sentence that says what to mend.

    Args:
        argv: Arguments; None for ``sys.argv``.
    """
    with reported() as code:
        run_script("image", argv)
    return code.number


def text(argv: Sequence[str] | None = None) -> int:
    """Train a text model; as `train`."""
    with reported() as code:
        run_script("text", argv)
    return code.number


def run_script(modality: str, argv: Sequence[str] | None) -> None:
    """Resolve the command line, then import the libraries and run the training script."""
    machine.refuse_separate_processes()
    with importing():
        # Before all else, so that a typo is answered at once.
        config = import_module(f".{modality}.config", __package__).resolve(argv)
        script = import_module(f".{modality}.script", __package__)
    script.train(argv, config)


@contextmanager
def importing() -> Iterator[None]:
    """Within the context libraries are imported faster.

    Garbage collection is off, and later skips the objects of these imports: torch and the libraries
    on it make hundreds of thousands that stay, and looking through them takes a third of a short
    run. Nothing is compiled at import (bitsandbytes asks for it, and PEFT imports that), since
    torch would load its compiler for it. Does nothing if torch is imported already, as in a
    notebook.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    was_set = NOT_COMPILED in os.environ
    os.environ.setdefault(NOT_COMPILED, "1")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # A run with --compile needs the compiler after the imports.
        if not was_set:
            del os.environ[NOT_COMPILED]


COMMANDS: dict[str, Callable[[], int]] = {
    "train": train,
    "text": text,
    "export": lambda: import_module(".export.__main__", __package__).main(),
    "demo": lambda: import_module(".demo", __package__).main(),
}


def main() -> int:
    """Run the command that ``sys.argv`` names; returns the exit code."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(f"usage: bilora {{{','.join(COMMANDS)}}} ...\n\n{inspect.cleandoc(__doc__ or '')}")
        return 0
    if name not in COMMANDS:
        return run_cli(lambda: check_choice("the command of bilora", name, COMMANDS))
    sys.argv = [f"bilora {name}", *arguments]
    return COMMANDS[name]()
