"""Published architectures with random weights, created in seconds, and an SDXL pipeline of them.

    python benchmarks/random_models.py random_sdxl               # 6.9 GB, half a minute
    python train_dreambooth_bilora.py --pretrained_model_name_or_path random_sdxl --dataset mini \\
        --resolution 128 --max_train_steps 2 --output_dir out

The pipeline generates noise, not pictures: it serves to test shapes, memory and time. Its models
are created and written in bf16 one at a time, so memory never holds more than the UNet.

A model is built without memory on PyTorch's ``meta`` device. Then each weight gets memory in its
final precision and is filled. Matrices and kernels get normal values with a standard deviation of
1/sqrt(fan-in), so that activations stay finite and near 1 in bfloat16 through all 70 transformer
blocks. Normalization weights are 1, biases are 0, and embeddings have a standard deviation of 0.02.
Sizes come from the published ``config.json`` files.

`WORKLOADS` has the models that step_cost.py measures, with their inputs, losses and adapters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.mini import pipeline_dir

Model = TypeVar("Model", bound=nn.Module)
ROOT = Path(__file__).resolve().parents[1]
# Model -> published configurations of its denoiser and text encoders
MODELS: dict[str, Any] = json.loads(
    (ROOT / "results" / "dry_run_memory" / "models.json").read_text(encoding="utf-8")
)
SDXL = MODELS["Stable Diffusion XL"]
# Number of random values, which are generated once and repeated. It is a prime, so that the rows of
# a matrix differ.
BLOCK = 1_000_003
# Tokens of a CLIP prompt, including the start and end tokens
TEXT_LENGTH = 77
# Models of the SDXL pipeline
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Configuration of SDXL's autoencoder
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
}


def sdxl(part: str, **changes: Any) -> Any:
    """Build a model of SDXL base 1.0.

    Args:
        part: Name of the model in the pipeline, one of `PARTS`.
        changes: Changes to its configuration.
    """
    if part == "vae":
        return diffusers.AutoencoderKL(**{**VAE, **changes})
    if part == "unet":
        kind, config = SDXL["denoiser"]
        return getattr(diffusers, kind)(**{**config, **changes})
    kind, config, values = SDXL["encoders"][part == "text_encoder_2"]
    return getattr(transformers, kind)(getattr(transformers, config)(**{**values, **changes}))


def t5_base() -> Any:
    """Build T5-base as published: 12 + 12 layers, width 768, 12 heads, tied embeddings (223 M)."""
    sizes: Any = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    config = transformers.T5Config(**sizes)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def llama_7b(**changes: Any) -> Any:
    """Build Llama 2 7B (6.74 B parameters), with changes to its configuration."""
    config = transformers.LlamaConfig(
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,  # as in training, which generates no text
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


def materialize(
    build: Callable[[], Model],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Model:
    """Build a model and fill it with random weights.

    Weights are never held in a precision other than ``dtype``. Buffers keep the values and the
    precision that the model gives them.
    """
    with init_empty_weights(include_buffers=False):
        model = build()
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(BLOCK, generator=generator).to(device=device, dtype=dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            _fill(module, name, values, block)
            setattr(module, name, nn.Parameter(values))
    if tie := getattr(model, "tie_weights", None):
        tie()  # the loop gave each use of a shared matrix its own memory
    return model.to(device)


def _fill(module: nn.Module, name: str, values: Tensor, block: Tensor) -> None:
    """Fill one parameter in place; the module's docstring explains the scales."""
    if values.dim() < 2:
        values.fill_(0.0 if name == "bias" else 1.0)
        return
    # 1 / sqrt(fan-in): values[0] has the weights of one output, in a matrix and in a kernel.
    scale = 0.02 if isinstance(module, nn.Embedding) else values[0].numel() ** -0.5
    # The block is repeated, since billions of random numbers would take minutes.
    for part in values.view(-1).split(BLOCK):
        part.copy_(block[: part.numel()] * scale)


def write_pipeline(folder: Path, changes: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Write the SDXL pipeline into ``folder``.

    All files except the models come from the miniature, whose tokenizer reads any text as bytes.

    Args:
        folder: New or empty folder.
        changes: Model (one of `PARTS`) -> changes to its configuration.

    Returns:
        Number of parameters of each model.

    Raises:
        UserError: The folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already exists and is not an empty folder; name a new one or remove it."
        )
    shutil.copytree(pipeline_dir(), folder, ignore=shutil.ignore_patterns(*PARTS))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(
            pipeline_dir(), subfolder=name, model_max_length=TEXT_LENGTH
        )
        tokenizer.save_pretrained(folder / name)
    counts = {}
    for seed, name in enumerate(PARTS):
        build = partial(sdxl, name, **(changes or {}).get(name, {}))
        model = materialize(build, dtype=torch.bfloat16, seed=seed)
        model.save_pretrained(folder / name, max_shard_size="2GB")
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
        del model  # at most one model is in memory at a time
    return counts


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNet: Any = UNet2DConditionModel
# Name endings of the UNet's layers that get adapters
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A model that step_cost.py measures, with its batch, loss and defaults of the command line."""

    # Description for the report; "{batch}" and "{length}" are replaced by the samples and tokens.
    note: str
    # Builds the model; `materialize` calls it on the meta device
    build: Callable[[], nn.Module]
    # (model, samples, tokens, dtype, device, generator) -> tensors of a batch
    inputs: Callable[..., Inputs]
    # (model, inputs) -> scalar loss
    loss: Callable[[Any, Inputs], Tensor]
    spec: AdapterSpec
    # Learning rate, as in training
    lr: float
    # Defaults: samples per step, precision of the base weights (key of `DTYPES`), measured rounds
    batch: int
    dtype: str
    steps: int
    # Rounds before the measured ones
    warmup: int
    # Default number of tokens per text; None for images
    length: int | None = None


def pooled_width(config: Any) -> int:
    """Compute the width of an SDXL UNet's pooled prompt embedding from its configuration."""
    # The rest of the input are embeddings of six numbers, for sizes and crops.
    return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


def _unet_inputs(
    pixels: int,
    prompt_length: int,
    model: Any,
    batch: int,
    _: None,
    dtype: Any,
    device: Any,
    generator: Any,
) -> Inputs:
    """Return random inputs of the UNet for square images with a side of ``pixels``."""
    config = model.config
    pooled = pooled_width(config)

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator).to(device=device, dtype=dtype)

    latents = (batch, config.in_channels, pixels // 8, pixels // 8)  # a latent per 8 x 8 pixels
    sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels]).expand(batch, 6)
    return {
        "sample": normal(latents),
        "noise": normal(latents),
        "timestep": torch.randint(1000, (batch,), generator=generator).to(device),
        "encoder_hidden_states": normal((batch, prompt_length, config.cross_attention_dim)),
        "added_cond_kwargs": {
            "text_embeds": normal((batch, pooled)),
            "time_ids": sizes.to(device=device, dtype=dtype),
        },
    }


def _unet_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Compute the mean squared error of the predicted noise."""
    arguments = {name: value for name, value in inputs.items() if name != "noise"}
    predicted = model(**arguments, return_dict=False)[0]
    return functional.mse_loss(predicted.float(), inputs["noise"].float())


def _text_inputs(
    target: int | None,
    model: Any,
    batch: int,
    source: int,
    _: Any,
    device: Any,
    generator: Any,
) -> Inputs:
    """Return random token sequences without padding.

    Args:
        target: Tokens of the labels; None to use the inputs as labels.
        model: The text model.
        batch: Number of sequences.
        source: Tokens of the inputs.
        device: Device of the tensors.
        generator: Generator of the tokens.
    """

    def tokens(length: int) -> Tensor:
        size = (batch, length)
        return torch.randint(2, model.config.vocab_size, size, generator=generator).to(device)

    ids = tokens(source)
    labels = ids if target is None else tokens(target)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


MINI = Workload(
    note="UNet of the miniature, rank 4 on attention, batch {batch} of 64 px",
    build=lambda: UNet.from_config(UNet.load_config(pipeline_dir(), subfolder="unet")),
    inputs=partial(_unet_inputs, 64, 32),
    loss=_unet_loss,
    spec=AdapterSpec(rank=4, alpha=8, target_modules=ATTENTION),
    lr=2e-4,
    batch=4,
    dtype="fp32",
    steps=200,
    warmup=5,
)
T5 = Workload(
    note="T5-base, rank 8 on every linear layer, batch {batch} of {length} + 8 tokens",
    build=t5_base,
    inputs=partial(_text_inputs, 8),
    loss=lambda model, inputs: model(**inputs).loss,  # mean cross entropy of the targets
    spec=AdapterSpec(rank=8, alpha=16),
    lr=5e-4,
    batch=8,
    dtype="fp32",
    steps=40,
    warmup=3,
    length=128,  # the paper's limit is 256
)
LLAMA = replace(
    T5,
    note="2 layers of Llama 2 7B, rank 8 on every linear layer, batch {batch} of {length} tokens",
    # A small vocabulary, so that the layers take most of the time
    build=lambda: llama_7b(num_hidden_layers=2, vocab_size=2048),
    inputs=partial(_text_inputs, None),
    batch=2,
    steps=12,
    warmup=2,
    length=256,  # the paper's limit is 1,024 (256 for Llama 3.1)
)
SDXL_UNET = replace(
    MINI,
    note="UNet of SDXL base 1.0, rank 4 on attention, batch {batch} of 128 px",
    build=partial(sdxl, "unet"),
    inputs=partial(_unet_inputs, 128, TEXT_LENGTH),
    batch=1,
    dtype="bf16",
    steps=10,
    warmup=1,
)
WORKLOADS = {"mini": MINI, "t5-base": T5, "llama-7b-layer": LLAMA, "sdxl-unet": SDXL_UNET}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pipeline and print the number of parameters of each model."""
    parser = argparse.ArgumentParser(description="Write an SDXL pipeline with random weights.")
    parser.add_argument("folder", type=Path, help="new folder for the pipeline")
    args = parser.parse_args(argv)
    for name, count in write_pipeline(args.folder).items():
        print(f"{name}: {count:,} parameters")


if __name__ == "__main__":
    sys.exit(run_cli(main))
