"""Print what is inside a LoRA file, convert it, or export a checkpoint of a run.

python -m bilora_diffusion.export runs/demo
python -m bilora_diffusion.export FILE --json
python -m bilora_diffusion.export RUN_OR_FILE --to kohya --output icons.safetensors
python -m bilora_diffusion.export runs/demo --step 100 [--to kohya]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..config.command_line import Sentences
from ..core.errors import UserError, run_cli, strip_controls
from ..core.lora_names import ADAPTER_METADATA, FORMATS
from .lorafile import LoraFile, inspect, lora_files

_WIDTH = 72  # characters of a metadata entry


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 and one sentence for an unreadable file."""
    parser = Sentences(
        prog="python -m bilora_diffusion.export",
        description="Print what is inside a LoRA file, convert it, or export a run's checkpoint.",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        help="a .safetensors file in diffusers', kohya's or PEFT's format, a folder of PEFT, or a"
        " run folder",
    )
    parser.add_argument(
        "--to",
        choices=FORMATS,
        help="convert it; kohya, for SDXL only, is what ComfyUI and A1111 read",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="take the run's checkpoint of this step; without --to, in the formats of its end",
    )
    parser.add_argument(
        "--output",
        help="the file or folder to write, which is never replaced; by default beside the source,"
        " or RUN/exports/step-N",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return run_cli(lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    source, step, to, output = options.source, options.step, options.to, options.output
    if step is None and to is None:
        if output is not None:
            raise UserError(f"--output {output} says where, not what; add --to or --step.")
        for file in lora_files(Path(source)):
            contents = inspect(file)
            print(as_json(contents) if options.json else as_table(contents))
        return
    # Here, so that to look inside a file needs no torch.
    from ..run.folder import hold_around
    from .conversion import export_file, export_step

    with hold_around(Path(output or source)):
        if step is None:
            exports = [export_file(source, to, output)]
        else:
            exports = export_step(source, step, to, output)
    for export in exports:
        print(export.path if export.is_new else f"is there already: {export.path}")


def as_json(contents: LoraFile) -> str:
    """Every field, and `auxiliary`."""
    return json.dumps({**asdict(contents), "auxiliary": contents.auxiliary}, indent=2)


def as_table(contents: LoraFile) -> str:
    """A page for people; the last lines say whether an auxiliary is inside and why."""
    lines = [
        f"file        {contents.path}",
        f"format      {contents.format}{', DoRA' if contents.dora else ''}",
        f"adapters    {', '.join(contents.adapters)}",
        f"parameters  {contents.parameters:,} ({', '.join(contents.dtypes)})",
    ]
    if contents.other_tensors:
        lines.append(f"other       {contents.other_tensors} tensors that are not LoRA's")
    lines += ["", f"{'model':<16}{'layers':>8}{'rank':>10}{'alpha':>12}"]
    for model, layers in contents.layers.items():
        rank = ", ".join(map(str, contents.ranks[model]))
        alpha = ", ".join(f"{value:g}" for value in contents.alphas.get(model, ())) or "= rank"
        lines.append(f"{model:<16}{layers:>8}{rank:>10}{alpha:>12}")
    metadata_keys = sorted(contents.metadata.keys() - {ADAPTER_METADATA})
    if metadata_keys:
        width = max(map(len, metadata_keys))
        lines += ["", "metadata"]
        for key in metadata_keys:
            lines.append(f"  {key:<{width}}  {_shortened(contents.metadata[key])}")
    lines += ["", f"auxiliary   {'FOUND' if contents.auxiliary else 'none'}"]
    lines += [f"  {sentence}" for sentence in contents.evidence]
    return "\n".join(map(strip_controls, lines))


def _shortened(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."


if __name__ == "__main__":
    sys.exit(main())
