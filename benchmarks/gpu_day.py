"""Measure every image model on a GPU, in one command that can be stopped and continued.

    python -m benchmarks.gpu_day                                   # all models, on the GPU
    python -m benchmarks.gpu_day --models sdxl,z_image --minutes 30
    python -m benchmarks.gpu_day --device cpu --models mini,sdxl --minutes 5 --output_dir runs/gpu
    python -m benchmarks.gpu_day --script train_dreambooth_lora_sdxl.py    # also diffusers' script
    python -m benchmarks.gpu_day --real stabilityai/stable-diffusion-xl-base-1.0 \\
        --images my_photos                                         # needs the hub, and captions

Each model has a basic part, LoRA in bf16 with a batch size of 1, and further parts with another
method, 4-bit weights, another image size or batch size, or compiled blocks. A part runs for at most
ten minutes in its own process (gpu_part.py), so running out of memory ends only this part. After
each part its row is written to ``OUTPUT_DIR/NAME.json`` and the table to ``NAME.md``. The same
command continues where an earlier one stopped. Weights are random: only ``--real`` needs the hub.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from benchmarks import gpu_result
from benchmarks.gpu_part import Part
from benchmarks.gpu_photographs import experiment_of, split_photographs
from benchmarks.gpu_result import FAILED, FINAL, MEASURED, OUT_OF_MEMORY, SKIPPED, TIMED_OUT
from benchmarks.measure import circumstances
from benchmarks.random_pipelines import SHAPES
from bilora_diffusion.config.command_line import UserErrorParser
from bilora_diffusion.core.durable import write_text
from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.core.files import without_paths

ROOT = Path(__file__).resolve().parents[1]
# Longest time of a part
LIMIT_SECONDS = 600.0
# Device -> time that must be left to start a model's first part or another command
FIRST_PART_SECONDS = {"cuda": 180.0, "cpu": 60.0}
# Time after SIGTERM, in which a training run saves a checkpoint
PATIENCE_SECONDS = 60.0
# Device -> side of the images in pixels: usual parts, and parts with small images
SIDES = {"cuda": (1024, 512), "cpu": (256, 128)}
MINI_SIDES = (64, 32)
# Parts that other commands measure
PEER, REAL = "diffusers' script", "photographs"


@dataclass(frozen=True)
class Command:
    """A part that another command of this repository measures."""

    key: str
    # Words after ``python``; () if the part can't be measured
    words: tuple[str, ...] = ()
    # Why it can't be measured
    reason: str = ""
    # JSON file or report that the command writes
    result: Path | None = None
    # Model folder that the command reads, and the words after ``python`` that create it
    model: Path | None = None
    model_words: tuple[str, ...] = ()


def plan(models: Sequence[str], device: str) -> list[Part]:
    """Return the parts of some models, kind by kind: the most useful kind of all models first."""
    kinds: list[dict[str, Any]] = [
        {},
        {"method": "bilora"},
        {"quantize": "nf4"},
        {"pixels": "small"},
        {"batch": 4},
        {"compile": True},
        {"method": "lora-sam"},
        {"method": "bilora", "quantize": "nf4", "pixels": "small"},
    ]
    parts = []
    for kind in kinds:
        for model in models:
            side, small_side = MINI_SIDES if model == "mini" else SIDES[device]
            changes = dict(kind)
            if "pixels" in changes:
                changes["pixels"] = small_side
            parts.append(replace(Part(model, side), **changes))
    return parts


def commands(args: argparse.Namespace, file: Path) -> list[Command]:
    """Return the parts that other commands measure: diffusers' script, and photographs.

    Raises:
        UserError: The photographs or the model of ``--real`` can't be used.
    """
    parts = []
    peer_result = file.with_suffix(".diffusers.json")
    if args.script is None:
        parts.append(Command(PEER, reason="give a copy of diffusers' script as --script"))
    elif args.device == "cpu":
        parts.append(Command(PEER, reason="on a CPU call benchmarks/against_diffusers.py"))
    else:
        words = f"{ROOT / 'benchmarks' / 'against_diffusers.py'} --script {args.script}"
        words += " --device cuda --preset sdxl-1024 --rounds 1 --steps 20 --variants lora bilora"
        model = file.with_suffix(".random_sdxl")
        words += f" --model {model} --json {peer_result}"
        model_words = (str(ROOT / "benchmarks" / "random_models.py"), str(model))
        parts.append(
            Command(
                PEER,
                tuple(words.split()),
                result=peer_result,
                model=model,
                model_words=model_words,
            )
        )
    if args.real is None:
        parts.append(Command(REAL, reason="give --real MODEL and --images FOLDER"))
    else:
        photographs = file.with_suffix(".images")
        split_photographs(args.images, photographs)
        experiment = file.with_suffix(".yaml")
        write_text(experiment, yaml.safe_dump(experiment_of(args.real, photographs)))
        folder = file.with_suffix(".photographs")
        words = ("-m", "eval.sweep", str(experiment), "--output_dir", str(folder))
        parts.append(Command(REAL, words, result=folder / "report.md"))
    return parts


def run_limited(
    words: Sequence[str], environment: Mapping[str, str], log: Path, limit: float
) -> int | None:
    """Run ``python WORDS`` in its own process group, and write its output to ``log``.

    Args:
        limit: Seconds after which the process group is ended.

    Returns:
        The exit code, or None if the limit was reached.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # its own group, which can be ended as a whole
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE_SECONDS)


class Day:
    """The measurements of one device: it runs parts and writes their rows to a file.

    Args:
        args: Arguments of the command line.

    Raises:
        UserError: The file has measurements of another device.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        facts = circumstances(torch.device(args.device))
        name = args.name or re.sub(r"[^a-z0-9]+", "-", str(facts["device"]["name"]).lower())
        self.file: Path = args.output_dir / f"{name.strip('-')}.json"
        self.facts = {key: facts[key] for key in ("versions", "commit", "commit_differs")}
        self.results: dict[str, Any] = {"device": facts["device"], "parts": {}, **self.facts}
        if self.file.exists():
            recorded = gpu_result.read_results(self.file)
            self.results["parts"] = recorded["parts"]
            before = recorded["device"]["name"]
            if before != facts["device"]["name"]:
                raise UserError(
                    f"{self.file} has measurements of {before}, but this device is"
                    f" {facts['device']['name']}: give another --name."
                )
        self.environment = dict(os.environ)
        if args.device == "cpu":
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}

    def left(self) -> float:
        """Return the seconds that are left of ``--minutes``."""
        return 60 * self.args.minutes - (time.monotonic() - self.started)

    def needed_seconds(self, model: str) -> float:
        """Estimate the seconds of a model's next part from its longest part so far."""
        seconds_of_parts = []
        for row in self.results["parts"].values():
            if row.get("part", {}).get("model") == model:
                seconds_of_parts.append(row.get("wall_seconds", 0.0))
        if not any(seconds_of_parts):
            return FIRST_PART_SECONDS[self.args.device]
        return min(LIMIT_SECONDS, 2 * max(seconds_of_parts))

    def is_done(self, key: str) -> bool:
        """Return whether a part has a final outcome and is not measured again."""
        return self.results["parts"].get(key, {}).get("outcome") in FINAL

    def write(self, key: str, row: Mapping[str, Any]) -> None:
        """Write the row of a part to the file, and all rows to the table."""
        origin = {name: self.facts[name] for name in ("commit", "commit_differs")}
        self.results["parts"][key] = {**row, **origin}
        write_text(self.file, json.dumps(self.results, indent=1) + "\n")
        write_text(self.file.with_suffix(".md"), gpu_result.table(self.results))
        print(f"{key}: {row['outcome']}", flush=True)

    def measure(self, part: Part) -> bool:
        """Measure a part and write its row; return False if ``--minutes`` ended first."""
        row: dict[str, Any] = {"title": SHAPES[part.model].title, "part": asdict(part)}
        if part.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
            self.write(part.key, row | {"outcome": SKIPPED, "reason": "no bitsandbytes"})
            return True
        with TemporaryDirectory() as folder:
            file, log = Path(folder, "part.json"), Path(folder, "log")
            words = ["-m", "benchmarks.gpu_part", json.dumps(asdict(part))]
            words += ["--device", self.args.device, "--json", str(file)]
            limit = min(LIMIT_SECONDS, self.left())
            began = time.monotonic()
            exit_code = run_limited(words, self.environment, log, limit)
            row["wall_seconds"] = time.monotonic() - began
            if file.exists():  # also if the process was ended while sampling
                row |= gpu_result.read_results(file)
            elif exit_code is None:
                if limit < LIMIT_SECONDS:
                    return False
                row["outcome"] = TIMED_OUT
            elif exit_code == -signal.SIGKILL:
                row |= {"outcome": OUT_OF_MEMORY, "reason": "the machine's"}
            else:
                row |= {"outcome": FAILED, "reason": last_line(log)}
        self.write(part.key, row)
        return True

    def run_command(self, command: Command) -> bool:
        """Run another command and write its row; return False if the time limit ended it."""
        row: dict[str, Any] = {"title": command.key}
        if not command.words:
            reason = f"{SKIPPED}: {command.reason}"
            self.write(command.key, row | {"outcome": SKIPPED, "text": reason})
            return True
        log = self.file.with_suffix(".log")
        limit = min(LIMIT_SECONDS, self.left())
        if command.model is not None and not command.model.exists():
            run_limited(command.model_words, self.environment, log, limit)
        exit_code = run_limited(command.words, self.environment, log, limit)
        if exit_code is None:
            return False
        if exit_code or command.result is None or not command.result.exists():
            sentence = last_line(log)
            self.write(command.key, row | {"outcome": FAILED, "text": f"{FAILED}: {sentence}"})
            return True
        row |= {"outcome": MEASURED, "text": f"see {command.result.name}"}
        if command.result.suffix == ".json":
            row["result"] = gpu_result.read_results(command.result)
        self.write(command.key, row)
        return True


def last_line(log: Path) -> str:
    """Return the last line of a process's output, without paths of this machine."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return without_paths(lines[-1]) if lines else "no output"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; raise UserError if a value can't be used."""
    parser = UserErrorParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default_models = ",".join(name for name in SHAPES if name != "mini")
    parser.add_argument("--device", choices=sorted(SIDES), default="cuda")
    parser.add_argument("--models", default=default_models, help=f"some of {','.join(SHAPES)}")
    parser.add_argument(
        "--minutes", type=float, default=24 * 60.0, help="time limit of the whole command"
    )
    parser.add_argument("--name", help="name of the result file; default: the device's name")
    parser.add_argument("--output_dir", type=Path, default=Path("results/gpu"))
    parser.add_argument("--script", type=Path, help="copy of diffusers' SDXL DreamBooth script")
    parser.add_argument("--real", metavar="MODEL", help="folder or hub id of a pretrained model")
    parser.add_argument("--images", type=Path, help="photographs with captions, for --real")
    args = parser.parse_args(argv)
    args.models = args.models.split(",")
    for name in args.models:
        if name not in SHAPES:
            raise UserError(f"--models has {name}: give some of {', '.join(SHAPES)}.")
    if not 0 < args.minutes < 1e5:
        raise UserError(f"--minutes is {args.minutes:g}: give a number above 0.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but PyTorch finds no GPU; give --device cpu.")
    if args.script is not None and not args.script.is_file():
        raise UserError(f"--script is {args.script}, which is not a file; give your copy of it.")
    if (args.real is None) != (args.images is None):
        raise UserError("--real and --images belong together: give both, or neither.")
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"--images is {args.images}, which is not a folder; give your photographs.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the missing parts, print the table, and report if parts are still missing."""
    args = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    day = Day(args)
    # This comes first, to refuse unusable photographs or models before hours of work.
    other_parts = commands(args, day.file.resolve())
    remaining = [part for part in plan(args.models, args.device) if not day.is_done(part.key)]
    is_complete = True
    for part in remaining:
        if day.left() < day.needed_seconds(part.model) or not day.measure(part):
            is_complete = False
            break
    for command in other_parts:
        if is_complete and not day.is_done(command.key):
            # A skipped command takes no time.
            has_time = not command.words or day.left() > FIRST_PART_SECONDS[args.device]
            is_complete = has_time and day.run_command(command)
    if day.file.exists():
        print(gpu_result.table(day.results))
    print(
        f"written: {day.file}" if day.file.exists() else "nothing was measured: give more --minutes"
    )
    if not is_complete:
        print("Parts are missing: give the same command again to continue.")


if __name__ == "__main__":
    sys.exit(run_cli(main))
