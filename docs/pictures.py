"""Create the pictures of the README and the pages. Look at them before you commit them.

    python -m docs.pictures                     # all of them: half an hour on two cores
    python -m docs.pictures viewer mask.png     # the viewer's tabs and one figure

Runs are kept in build/pictures and reused. To train a run again, delete its folder there.
"""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from playwright.sync_api import expect

from bilora_diffusion import mini
from bilora_diffusion.core.plotting import new_figure
from bilora_diffusion.image import crops, latents
from bilora_diffusion.image.derived import SUBJECTS
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from tests.browser.driver import GENERATED_MS, LOADED_MS, chromium, go, serving
from tests.scripts.runs import free_port

FOLDER = Path(__file__).parent
RUNS = FOLDER.parent / "build" / "pictures"
CLASS_PROMPT = "a flat icon of a lion"
# Flags of a run that learns a style other than the class's
CLASS_RUN = (
    "--dataset mini --validation_dataset none --method lora --learning_rate 3e-3"
    " --max_train_steps 200 --train_batch_size 4 --num_validation_images 0 --report_to none"
)
# Flags of a run on the icons
ICON_RUN = (
    "--config mini --method lora --max_train_steps 300 --validation_dataset none"
    " --num_validation_images 0 --report_to none"
)
# Tab of the viewer -> selector of an element that is visible once the tab is filled
TABS = {
    "Compare": "#validation-images img",
    "Generate": "#generate-a input",
    "Training": "#training-loss svg.marks",
    "Results": "#results-figures img",
}
# Suffix of a screenshot's name -> width and height of the window in pixels
WINDOWS = {"": (1400, 900), "-phone": (390, 1400)}
# Tab -> height of the wide window in pixels, where the tab needs more than 900
HEIGHTS = {"Compare": 1200, "Training": 1280}


def run(*words: str) -> None:
    """Run ``python -m WORDS`` in another process, from the repository root."""
    subprocess.run([sys.executable, "-m", *words], cwd=FOLDER.parent, check=True)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture with 128 colors to keep the file small."""
    picture.convert("RGB").quantize(128, kmeans=3).save(path, optimize=True)


def show(axis: Any, image: Any, title: str = "", **options: Any) -> None:
    """Draw an image below its title, without ticks."""
    axis.imshow(image, **options)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def run_demo() -> Path:
    """Run the demo if its picture does not exist; return its folder."""
    folder = RUNS / "demo"
    if not (folder / "grid.png").exists():
        run("bilora_diffusion.demo", "--output_dir", str(folder))
    return folder


def draw_demo(path: Path) -> None:
    """Copy the demo's picture."""
    shutil.copy(run_demo() / "grid.png", path)


def draw_buckets(path: Path) -> None:
    """Draw five images of different shapes, and the crop of each for its bucket."""
    icons = open_images("mini-heldout", caption_column="label")
    shapes = ((400, 1000), (600, 900), (700, 700), (900, 600), (1100, 400))  # height, width
    with new_figure(path, dpi=100, figsize=(11, 4.6), layout="tight") as figure:
        axes = figure.subplots(2, len(shapes))
        for number, (height, width) in enumerate(shapes):
            # An icon in the middle of a canvas with a frame
            canvas = Image.new("RGB", (width, height), "#e8eef4")
            frame = (8, 8, width - 9, height - 9)
            ImageDraw.Draw(canvas).rectangle(frame, outline="#7a8a99", width=6)
            side = min(height, width) - 80
            icon = icons.image(number).resize((side, side))
            canvas.paste(icon, ((width - side) // 2, (height - side) // 2))
            bucket = crops.nearest_bucket((height, width), crops.sizes_around(512))
            crop = crops.sample_crop(
                (height, width),
                bucket,
                center_crop=True,
                random_flip=False,
                generator=torch.Generator(),
            )
            pixels = crops.cut(crops.resize(canvas, bucket, "lanczos"), crop, bucket)
            show(axes[0, number], canvas, f"{height} x {width}")
            show(axes[1, number], pixels.permute(1, 2, 0), f"bucket {bucket[0]} x {bucket[1]}")


def draw_mask(path: Path) -> None:
    """Draw an icon, its mask, and the latents' weights without and with ``--unmasked_weight``."""
    icon = open_images("mini-heldout", caption_column="label").image(4)
    is_icon = np.asarray(icon.convert("L")) < 250  # the background is white
    mask = torch.from_numpy(is_icon)[None].float()  # (1, height, width)
    latents_of_icon = torch.empty(1, 1, 8, 8)  # only the shape is read
    gray: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
    with new_figure(path, dpi=100, figsize=(9, 2.6), layout="tight") as figure:
        axes = figure.subplots(1, 4)
        show(axes[0], icon, "image")
        show(axes[1], is_icon, "NAME.mask.png", **gray)
        weights = latents.weight_map([mask], latents_of_icon, 0.0)
        show(axes[2], weights[0, 0], "weight of each latent", **gray)
        weights = latents.weight_map([mask], latents_of_icon, 0.1)
        show(axes[3], weights[0, 0], "--unmasked_weight 0.1", **gray)


def draw_class(path: Path) -> None:
    """Draw samples of a class: by the base model, and by LoRA with and without preservation."""
    # Row of the picture -> value of --prior_prediction_weight
    rows = {"base model": None, "LoRA": "0", "LoRA,\nclass preserved": "3"}
    with new_figure(path, dpi=100, figsize=(7.4, 3.9), layout="tight") as figure:
        axes = figure.subplots(len(rows), 6)
        for number, (title, weight) in enumerate(rows.items()):
            pipeline: Any = load_pipeline("mini", dtype=torch.float32)
            if weight is not None:
                folder = RUNS / f"class-{weight}"
                words = ["--class_prompt", CLASS_PROMPT, "--prior_prediction_weight", weight]
                if not folder.exists():
                    words += [*CLASS_RUN.split(), "--output_dir", str(folder)]
                    run("bilora_diffusion", "train", *words)
                pipeline.load_lora_weights(str(folder))
            seeds = range(6)
            prompts = [CLASS_PROMPT] * len(seeds)
            images = generate(pipeline, prompts, seeds, size=64, steps=25, guidance_scale=4.0)
            for axis, image in zip(axes[number], images, strict=True):
                show(axis, image)
            axes[number, 0].set_ylabel(title, fontsize=9)


def draw_four_steps(path: Path) -> None:
    """Draw samples of held-out captions in 25 steps, and in 4 steps with and without distillation.

    The number in a row's title is the mean absolute difference of its pixels from the first row's,
    on a scale of 0 to 255.
    """
    folder = RUNS / "four-steps"
    if not folder.exists():
        run("bilora_diffusion", "train", *ICON_RUN.split(), "--output_dir", str(folder))
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    pipeline.load_lora_weights(str(folder), adapter_name="trained")
    pipeline.load_lora_weights(str(mini.four_steps_file()), adapter_name="distilled")
    four_steps: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0}
    four_steps["scheduler"] = "EulerDiscreteScheduler:timestep_spacing=trailing"
    # Row of the picture -> its adapters and sampler
    rows: dict[str, tuple[list[str], dict[str, Any]]] = {
        "25 steps,\nguidance": (["trained"], {"steps": 25, "guidance_scale": 4.0}),
        "4 steps": (["trained"], four_steps),
        "4 steps,\ndistilled": (["trained", "distilled"], four_steps),
    }
    guided_pixels = None
    prompts = [f"a TOK icon of a {subject}, in the style of TOK" for subject in SUBJECTS]
    with new_figure(path, dpi=100, figsize=(7.4, 3.9), layout="tight") as figure:
        axes = figure.subplots(len(rows), len(prompts))
        for number, (title, (adapters, sampler)) in enumerate(rows.items()):
            pipeline.set_adapters(adapters)
            images = generate(pipeline, prompts, range(len(prompts)), size=64, **sampler)
            pixels = np.stack([np.asarray(image, dtype=float) for image in images])
            if guided_pixels is None:
                guided_pixels = pixels
            else:
                title += f"\n{np.abs(pixels - guided_pixels).mean():.1f}"
            for axis, image in zip(axes[number], images, strict=True):
                show(axis, image)
            axes[number, 0].set_ylabel(title, fontsize=9)


def take_screenshots(folder: Path) -> None:
    """Take screenshots of the viewer's tabs, with the demo's runs and their scores."""
    demo = run_demo()
    if not (demo / "scores").exists():
        runs = [str(demo / "lora"), str(demo / "bilora"), "base", "--output_dir", f"{demo}/scores"]
        flags = "--prompts mini-duotone-heldout --max_prompts 6 --seeds 0 --guidance_from base"
        run("eval.clip_scores", *runs, *flags.split(), "--guidance_scale", "2")
    with serving(demo, RUNS / "viewer.log", free_port()) as url, chromium() as browser:
        for (tab, part), ending in itertools.product(TABS.items(), WINDOWS):
            width, height = WINDOWS[ending]
            if not ending:
                height = HEIGHTS.get(tab, height)
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(LOADED_MS)
            go(page, url, tab)
            expect(page.locator(part).first).to_be_visible()
            if tab == "Generate":
                page.locator("#generate-go").click()
                status = page.locator("#generate-status")
                expect(status).to_contain_text("Done.", timeout=GENERATED_MS)
            page.wait_for_timeout(1500)  # milliseconds, until animations end
            save(Image.open(BytesIO(page.screenshot())), folder / f"{tab.lower()}{ending}.png")
            page.close()


# Picture, or folder of pictures, below docs/ -> function that creates it
PICTURES: dict[str, Callable[[Path], None]] = {
    "grid.png": draw_demo,
    "buckets.png": draw_buckets,
    "mask.png": draw_mask,
    "class.png": draw_class,
    "four_steps.png": draw_four_steps,
    "viewer": take_screenshots,
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(PICTURES)
    if not set(names) <= set(PICTURES):
        sys.exit(f"give names among {', '.join(PICTURES)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"== {name}", flush=True)
        file = FOLDER / name
        PICTURES[name](file)
        if file.is_file():
            save(Image.open(file), file)
