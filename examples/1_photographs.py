"""Train a LoRA file on photographs with Bi-LoRA, then generate images with diffusers alone.

    python examples/1_photographs.py        # a tiny model and its 23 icons: minutes on a CPU

    python examples/1_photographs.py --photographs my_photos --output_dir runs/dog \\
        --caption "a photo of TOK dog" --prompt "a photo of TOK dog in a bucket"      # on a GPU

The second command trains Stable Diffusion XL on a folder of, for example, 20 photographs. TOK is a
meaningless word that becomes the name of the subject. The script also accepts the flags of
`train_dreambooth_bilora.py`, such as `--max_train_steps 300`. `before_and_after.png` in the output
folder shows generated images without the trained adapter (top) and with it (bottom).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from bilora_diffusion import commands, mini
from bilora_diffusion.run.runlog import read_run

ICON_PROMPTS = [f"a TOK icon of a {name}, in the style of TOK" for name in ("rabbit", "cloud")]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then generate images; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--photographs", help="folder of images; default: the 23 icons")
    parser.add_argument(
        "--caption", default="a photo of TOK", help="caption of photographs that have none"
    )
    parser.add_argument(
        "--prompt",
        help="prompt of the generated images; default: the caption, or two prompts for icons",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/photographs"))
    args, flags = parser.parse_known_args(argv)
    if args.photographs:
        prompts = [args.prompt or args.caption] * 2
        data_flags = ["--config", "sdxl", "--dataset", args.photographs]
        data_flags += ["--instance_prompt", args.caption]
    else:
        prompts = [args.prompt] * 2 if args.prompt else ICON_PROMPTS
        data_flags = ["--config", "mini"]  # the recipe names the model and the icons
    # The same as the command `bilora train`; docs/options.md lists all of its options.
    exit_code = commands.train([*data_flags, "--output_dir", str(args.output_dir), *flags])
    if exit_code == 0:
        picture = args.output_dir / "before_and_after.png"
        generate(args.output_dir, prompts).save(picture)
        print(f"Images without and with the adapter: {picture}")
    return exit_code


def generate(run: Path, prompts: Sequence[str]) -> Image.Image:
    """Generate an image for each prompt before and after the trained adapter is loaded.

    Args:
        run: run folder, with the adapter and the name of the base model.
        prompts: prompts; each has its own initial noise.

    Returns:
        One image with two rows: before and after.
    """
    model = read_run(run)["config"]["pretrained_model_name_or_path"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind: Any = DiffusionPipeline
    pipeline = kind.from_pretrained(mini.pipeline_dir() if model == "mini" else model, dtype=dtype)
    pipeline.to(device).set_progress_bar_config(disable=True)
    rows = []
    for is_trained in (False, True):
        if is_trained:
            pipeline.load_lora_weights(run)  # an ordinary LoRA file: the primary adapter alone
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        rows.append(pipeline(list(prompts), num_inference_steps=25, generator=noise).images)
    width, height = rows[0][0].size
    picture = Image.new("RGB", (width * len(prompts), height * len(rows)))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            picture.paste(image, (column * width, row * height))
    return picture


if __name__ == "__main__":
    raise SystemExit(main())
