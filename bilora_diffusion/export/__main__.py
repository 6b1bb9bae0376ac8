"""Print or convert a LoRA file, export a run's checkpoint, or merge a text run.

python -m bilora_diffusion.export runs/demo
python -m bilora_diffusion.export FILE --json
python -m bilora_diffusion.export RUN_OR_FILE --to kohya --output icons.safetensors
python -m bilora_diffusion.export runs/demo --step 100 [--to kohya]
python -m bilora_diffusion.export runs/answers --to merged
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from ..config.command_line import UserErrorParser
from ..core.errors import UserError, run_cli, strip_controls
from ..core.lora_names import ADAPTER_METADATA, FORMATS, MERGED
from .lorafile import LoraFile, inspect, lora_files

_WIDTH = 72  # maximum number of characters of a metadata value in the table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code of `run_cli`."""
    parser = UserErrorParser(
        prog="python -m bilora_diffusion.export",
        description="Print a LoRA file's contents, convert the file, export a run's checkpoint, or"
        " merge a text run into its base model.",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        help="a .safetensors file in diffusers', kohya's or PEFT's format, a PEFT folder, or a run"
        " folder",
    )
    parser.add_argument(
        "--to",
        choices=(*FORMATS, MERGED),
        help="format to write; ComfyUI and A1111 read kohya, which is for SDXL only; merged writes"
        " the base model of a text run with the adapter merged into it",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="export the run's checkpoint of this step; without --to, in the formats that the run"
        " exports at its end",
    )
    parser.add_argument(
        "--output",
        help="file or folder to write; existing files are never replaced. Default: in the source"
        " folder, or next to the source file; for --step RUN/exports/step-N; for --to merged"
        " RUN/exports/step-N/merged",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return run_cli(lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    if options.step is None and options.to is None:
        if options.output is not None:
            raise UserError(
                f"--output {options.output} has no effect without --to or --step; add one of them."
            )
        for file in lora_files(Path(options.source)):
            contents = inspect(file)
            if options.json:
                fields = {**asdict(contents), "auxiliary": contents.auxiliary}
                print(json.dumps(fields, indent=2))
            else:
                print(as_table(contents))
        return
    # Imported late, since inspecting needs torch only for a file with kohya's alphas.
    from ..run.lock import locked_around
    from .conversion import export_file, export_step

    with locked_around(Path(options.output or options.source)):
        if options.to == MERGED:
            # Imported by name, since the package `text` imports this package.
            merging = import_module("..text.merging", __package__)
            exports = [merging.merge_run(options.source, options.step, options.output)]
        elif options.step is None:
            exports = [export_file(options.source, options.to, options.output)]
        else:
            exports = export_step(options.source, options.step, options.to, options.output)
    for export in exports:
        if export.is_new:
            print(export.path)
        else:
            print(f"is there already: {export.path}")
        for note in export.notes:
            print(note)


def as_table(contents: LoraFile) -> str:
    """Format a file's contents as a table; its last lines show signs of an auxiliary, if any."""
    file_format = contents.format
    if contents.dora:
        file_format += ", DoRA"
    lines = [
        f"file        {contents.path}",
        f"format      {file_format}",
        f"adapters    {', '.join(contents.adapters)}",
        f"parameters  {contents.parameters:,} ({', '.join(contents.dtypes)})",
    ]
    if contents.other_tensors:
        lines.append(f"other       {contents.other_tensors} tensors that are not part of a LoRA")
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
            value = " ".join(contents.metadata[key].split())
            if len(value) > _WIDTH:
                value = f"{value[: _WIDTH - 3]}..."
            lines.append(f"  {key:<{width}}  {value}")
    # An exported file must contain only the primary.
    lines += ["", f"auxiliary   {'FOUND' if contents.auxiliary else 'none'}"]
    lines += [f"  {sentence}" for sentence in contents.evidence]
    return "\n".join(map(strip_controls, lines))


if __name__ == "__main__":
    sys.exit(main())
