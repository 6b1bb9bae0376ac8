"""Small scorers and captioners with random weights, saved as folders on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import transformers as hf
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bilora_diffusion.mini import pipeline_dir

SIZE = 32  # side length of an image, in pixels
PATCH = 8
WIDTH = 32
HEADS = 2
DIMENSION = 24  # size of an embedding

# Configuration of CLIP, with open_clip's keys
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 2, "head_width": 16}
TEXT = {
    "context_length": 32,
    "vocab_size": 4115,  # as the miniature's tokenizer, whose last token is the end token
    "width": WIDTH,
    "heads": HEADS,
    "layers": 2,
    "hf_tokenizer_name": "mini",
}
# Configuration of BLIP, with transformers' keys
BLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "projection_dim": DIMENSION,
}


def pictures(count: int, size: int | None = SIZE) -> list[Image.Image]:
    """Return random images, smooth colors with noise; without ``size``, each has a random size."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        shape = (size, size) if size else random.integers(33, 90, 2).tolist()
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(shape, Image.Resampling.BICUBIC))
        noise = random.integers(-30, 31, smooth.shape)
        images.append(Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)))
    return images


def sentences(count: int) -> list[str]:
    """Return distinct texts of different lengths."""
    things = ["rabbit", "cloud", "lion", "droplet", "frog", "sun", "red car"]
    styles = ["", ", in the style of TOK", " on a table", " with a very long tail and two hats"]
    # 7 and 4 have no common divisor, so each thing appears with every style.
    return [f"a ToK icon of {n} {things[n % 7]}{styles[n % 4]}" for n in range(count)]


def shake(model: nn.Module, scale: float = 0.2) -> None:
    """Add noise to the weights, to make embeddings of different images and texts differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.eval()


def save_open_clip(folder: Path) -> Path:
    """Write a random CLIP in open_clip's format: configuration, weights and tokenizer."""
    config: dict[str, Any] = {"embed_dim": DIMENSION, "vision_cfg": VISION, "text_cfg": TEXT}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    shake(model)
    folder.mkdir(parents=True)
    record = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    shutil.copytree(pipeline_dir() / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def save_blip(folder: Path) -> Path:
    """Write a random BLIP with a small vocabulary in transformers' format."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{number}" for number in range(40)]
    words += ["[DEC]", "[ENC]"]
    text_config = BLIP | {
        "pad_token_id": words.index("[PAD]"),
        "eos_token_id": words.index("[CLS]"),
        "sep_token_id": words.index("[SEP]"),
        "bos_token_id": words.index("[DEC]"),
        "vocab_size": len(words),
        "encoder_hidden_size": WIDTH,
    }
    vision_config = BLIP | {"image_size": SIZE, "patch_size": PATCH}
    torch.manual_seed(0)
    config = hf.BlipConfig(text_config=text_config, vision_config=vision_config)
    model = hf.BlipForConditionalGeneration(config)
    shake(model, scale=0.3)
    model.save_pretrained(folder)
    processor = hf.BlipProcessor(
        hf.BlipImageProcessor(size={"height": SIZE, "width": SIZE}),
        hf.BertTokenizer(vocab={word: index for index, word in enumerate(words)}),
    )
    processor.save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """Write a random DINOv2 with three layers, and its processor, in transformers' format."""
    torch.manual_seed(0)
    config = hf.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
    )
    model = hf.Dinov2Model(config)
    shake(model)
    model.save_pretrained(folder)
    processor = hf.BitImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    processor.save_pretrained(folder)
    return folder


def put_on_hub(repository: str, folder: Path, commit: str) -> None:
    """Copy ``folder`` into huggingface_hub's cache like a download; tests are offline."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit, dirs_exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
