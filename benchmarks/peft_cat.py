"""Download the pictures of PEFT's image-generation comparison, for eval/experiments/peft_cat.yaml.

    python benchmarks/peft_cat.py        # downloads 20 pictures of a cat into peft_cat/

This writes the folders ``train`` (14 pictures), ``valid`` (2, not used by any experiment) and
``heldout`` (4, whose captions are the prompts of the samples). Each picture has its caption in a
.txt file. The split and the captions come from method_comparison/image-gen in
https://github.com/huggingface/peft (Apache-2.0).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Makes the repository importable when this file is run as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bilora_diffusion.config.command_line import UserErrorParser
from bilora_diffusion.core.errors import UserError, as_user_error, run_cli

DATASET = "peft-internal-testing/cat-image-dataset"
# Captions of the data set's rows, in their order
CAPTIONS = (
    "sks cat sitting on a chair in front of a box of chocolates",
    "sks cat playing on the Steam Deck",
    'sks cat reading the newspaper with the title "DIE BOX"',
    "sks cat being fed sushi",
    "sks cat in front of a box of tomatoes",
    "a gingerbread house in front of sks cat",
    "sks cat is wearing a Wednesday Addams costume",
    "sks cat looks skeptical as he reads a magazine depicting a black cat",
    "sks cat wearing a striped scarf",
    "sleepy sks cat lying in bed covered by a blue blanket",
    "sks cat wearing a necklace while sitting in a box on a sofa",
    "a box with four donuts in front of sks cat",
    "sks cat wearing a pink veil with flowers on it and a dagger made out of yellow cardboard",
    "sks cat between two pillows, with one pillow showing a polar bear and the other a fox",
    "sks cat with an espresso reading the newspaper",
    "a close up of a hand petting sks cat on the head",
    "sks cat opens a white door",
    'sks cat with a VIP "all access" pass',
    'sks cat in front of a monitor showing the video game "RimWorld"',
    "sks cat reads a newspaper about cannabis",
)
# Rows of the validation set and of the held-out set; the other rows are for training
VALID, HELDOUT = (11, 16), (0, 3, 12, 15)


def main(argv: Sequence[str] | None = None) -> None:
    """Download the pictures and write the folders."""
    parser = UserErrorParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output_dir", type=Path, default=Path("peft_cat"))
    folder: Path = parser.parse_args(argv).output_dir
    from datasets import load_dataset  # a slow import, which --help does not need

    with as_user_error(f"{DATASET} can't be downloaded", "check the connection to the hub"):
        pictures = load_dataset(DATASET, split="train")["image"]
    if len(pictures) != len(CAPTIONS):
        raise UserError(
            f"{DATASET} has {len(pictures)} pictures, but {len(CAPTIONS)} are expected: the data"
            " set has changed, so update CAPTIONS."
        )
    for row, (picture, caption) in enumerate(zip(pictures, CAPTIONS, strict=True)):
        part = folder / "train"
        if row in VALID:
            part = folder / "valid"
        elif row in HELDOUT:
            part = folder / "heldout"
        part.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").save(part / f"{row:02}.png")
        (part / f"{row:02}.txt").write_text(f"{caption}\n", encoding="utf-8")
    print(f"written: {folder}/train, valid, heldout")


if __name__ == "__main__":
    sys.exit(run_cli(main))
