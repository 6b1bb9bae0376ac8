"""The command of the installed package; the repository's scripts call the same functions.

    bilora demo
    bilora caption my_photos --trigger_word TOK
    bilora train --config flux2_klein --dataset my_photos --instance_prompt "a photo of TOK dog"
    bilora text --config t5_base/mrpc
    bilora export runs/dog --to kohya
    accelerate launch -m bilora_diffusion train --dataset linoyts/3d_icon

Each command has ``--help``.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from .config import machine
from .core.errors import report_errors, run_cli
from .core.values import check_choice

COMMANDS = ("caption", "train", "text", "export", "demo")
# Environment variable of torch: if it is "1", `torch.compile` returns its argument unchanged.
NOT_COMPILED = "TORCHDYNAMO_DISABLE"


def run_script(modality: str, argv: Sequence[str] | None = None) -> int:
    """Resolve a command line, then import the libraries and train.

    Args:
        modality: "image" or "text".
        argv: arguments; None for ``sys.argv``.

    Returns:
        The exit code (`errors.report_errors`).
    """
    with report_errors() as exit_code:
        machine.refuse_separate_processes()
        with importing():
            # The configuration comes first, so that a typo is reported immediately.
            config = import_module(f".{modality}.config", __package__).resolve(argv)
            script = import_module(f".{modality}.script", __package__)
        script.train(argv, config)  # `train.command.train` with the script
    return exit_code.number


# Main functions of the two training scripts.
train = functools.partial(run_script, "image")
text = functools.partial(run_script, "text")


@contextmanager
def importing() -> Iterator[None]:
    """Speed up the imports of libraries inside the context.

    Garbage collection is off during the imports, and later skips their objects: torch and the
    libraries that use it create hundreds of thousands of permanent objects, and visiting them would
    take a third of a short run's time. `torch.compile`, which bitsandbytes calls when it is
    imported, does nothing during the imports, since torch would otherwise load its compiler. If
    torch has already been imported, as in a notebook, nothing is changed.
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
        # Later collections skip all objects that exist now.
        gc.freeze()
        gc.enable()
        # A run with --compile needs the compiler after the imports.
        if not was_set:
            del os.environ[NOT_COMPILED]


def main() -> int:
    """Run the command that ``sys.argv`` names; return the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(f"usage: bilora {{{','.join(COMMANDS)}}} ...\n\n{inspect.cleandoc(__doc__ or '')}")
        return 0
    if name not in COMMANDS:
        return run_cli(lambda: check_choice("the command of bilora", name, COMMANDS))
    # Messages show the command's name, as they show a script's name.
    sys.argv = [f"bilora {name}", *sys.argv[2:]]
    if name == "train":
        return train()
    if name == "text":
        return text()
    # Imported lazily: these modules take seconds, and the other commands do not need them.
    module = ".export.__main__" if name == "export" else f".{name}"
    return import_module(module, __package__).main()
