"""Write a caption file for each image in a folder, unless the image already has one.

    bilora caption my_photos --trigger_word TOK
    bilora caption my_photos --model Qwen/Qwen2.5-VL-3B-Instruct --prompt "Describe the dog's pose."

The caption of NAME.jpg is written to NAME.txt, where training reads it. Existing files are replaced
only with --overwrite, so the same command continues after an interruption. At the end the command
lists the captions with their numbers of tokens. It names captions that are too long, empty or
repeated, and images that look alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .config.command_line import Help, UserErrorParser
from .core.errors import run_cli
from .core.fields import add_flags, check, like, option, options_of
from .core.values import BATCHES, Range
from .image.model_options import ModelOptions
from .image.options import ImageOptions

# 0.77 billion parameters: 1.5 GB in 16 bits, 3.1 GB in 32 bits.
DEFAULT_MODEL = "florence-community/Florence-2-large"


class CaptionHelp(Help, argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows options as in training, and keeps the epilog's line breaks."""


@dataclass(frozen=True)
class CaptionOptions:
    """Options of ``bilora caption``."""

    section = "captions"
    trigger_word: str | None = like(ImageOptions, "trigger_word")
    model: str = option(
        DEFAULT_MODEL,
        "Model that writes the captions: hub id or folder of BLIP, Florence-2, or a chat model that"
        " reads images, such as Qwen/Qwen2.5-VL-3B-Instruct.",
        is_path=True,
    )
    prompt: str | None = option(
        None,
        "Prompt for the model. A chat model accepts any text (by default a request for one or two"
        " sentences); Florence-2 accepts <CAPTION>, <DETAILED_CAPTION> (default) or"
        " <MORE_DETAILED_CAPTION>; BLIP's captions begin with the prompt.",
    )
    overwrite: bool = option(False, "Replace existing captions.")
    max_new_tokens: int | None = option(
        None,
        "Maximum length of a caption in tokens (default: 29 for BLIP, 256 for other models).",
        range=Range(4096, "no image model reads more", at_least=1),
    )
    batch_size: int = option(4, "Number of images per batch.", range=BATCHES)
    dtype: str | None = option(
        None,
        "Precision of the model (default: bf16 on a CUDA GPU that supports it, fp16 on other CUDA"
        " GPUs, else fp32).",
        choices=("fp32", "fp16", "bf16"),
    )
    pretrained_model_name_or_path: str | None = like(
        ModelOptions,
        "pretrained_model_name_or_path",
        default=None,
        help="Base model to be trained. Captions over its token limit are reported (default: the"
        " 77 CLIP tokens of SDXL).",
    )
    skip_bad_images: bool = like(ImageOptions, "skip_bad_images")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    summary, _, epilog = (__doc__ or "").partition("\n\n")
    parser = UserErrorParser(
        prog="python -m bilora_diffusion.caption",
        description=summary,
        epilog=epilog,
        formatter_class=CaptionHelp,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of images")
    add_flags(parser, [CaptionOptions], bare=True)
    return run_cli(lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    check(options_of([CaptionOptions]), vars(options))
    # Imported lazily: the import takes seconds, and --help must not wait for it.
    from .image.caption_writer import caption_folder

    caption_folder(options)


if __name__ == "__main__":
    sys.exit(main())
