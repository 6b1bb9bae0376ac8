"""Real architectures with random weights, made in seconds; and a whole SDXL pipeline of them.

    python benchmarks/random_models.py random_sdxl               # 6.9 GB, half a minute
    python train_dreambooth_bilora.py --pretrained_model_name_or_path random_sdxl --dataset mini \\
        --resolution 128 --max_train_steps 2 --output_dir out

The pipeline makes noise, not pictures: it is for shapes, memory and time. Its models are written in
bf16 one after the other, so no more than the UNet is ever in memory.

A model is built without memory on PyTorch's ``meta`` device; then each weight gets memory in its
final precision and is filled. Matrices and kernels get normal values of standard deviation
1/sqrt(fan-in), so that activations stay of order one and finite in bfloat16 through all 70
transformer blocks. Normalization weights are 1, biases 0, embeddings have a deviation of 0.02.
Sizes are those of the published ``config.json`` files.

`WORKLOADS` is what step_cost.py measures: models with their inputs, losses and adapters.
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
# Published sizes of denoisers and of text encoders, by the models' names
MODELS: dict[str, Any] = json.loads(
    (ROOT / "results" / "dry_run_memory" / "models.json").read_text(encoding="utf-8")
)
SDXL = MODELS["Stable Diffusion XL"]
# Number of random values, which are made once and repeated. It is a prime, so that the rows of a
# matrix differ.
BLOCK = 1_000_003
# Tokens of a prompt of CLIP, with start and end
TEXT_LENGTH = 77
# Models of the pipeline
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Sizes of SDXL's autoencoder
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
    """A model of SDXL base 1.0, by its name in the pipeline."""
    if part == "vae":
        return diffusers.AutoencoderKL(**{**VAE, **changes})
    if part == "unet":
        kind, config = SDXL["denoiser"]
        return getattr(diffusers, kind)(**{**config, **changes})
    kind, config, values = SDXL["encoders"][part == "text_encoder_2"]
    return getattr(transformers, kind)(getattr(transformers, config)(**{**values, **changes}))


def t5_base() -> Any:
    """T5-base as published: 12 + 12 layers, width 768, 12 heads, tied embeddings (223 M)."""
    sizes: Any = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    config = transformers.T5Config(**sizes)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def llama_7b(**changes: Any) -> Any:
    """Llama 2 7B (6.74 B parameters)."""
    config = transformers.LlamaConfig(
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,  # as in training: nothing is generated
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
    """``build()`` with random weights, never held in another precision than ``dtype``.

    Buffers keep the values and the precision that the model gives them.
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
        tie()  # each use of a shared matrix has got its own memory
    return model.to(device)


def _fill(module: nn.Module, name: str, values: Tensor, block: Tensor) -> None:
    """Set one parameter in place; the scales are explained at the top of the file."""
    if values.dim() < 2:
        values.fill_(0.0 if name == "bias" else 1.0)
        return
    # 1 / sqrt(fan-in): the entries of one output are values[0], of a matrix or of a kernel.
    scale = 0.02 if isinstance(module, nn.Embedding) else values[0].numel() ** -0.5
    # The block is repeated, since billions of random numbers would take minutes.
    for part in values.view(-1).split(BLOCK):
        part.copy_(block[: part.numel()] * scale)


def write_pipeline(folder: Path, changes: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Write the pipeline into ``folder``; returns the number of parameters of each model.

    All its files but the models are the miniature's, whose tokenizer takes any text byte by byte.

    Args:
        changes: of the models' configurations, by the models' names.

    Raises:
        UserError: the folder is in use.
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
        del model  # so that one model is in memory at a time
    return counts


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNet: Any = UNet2DConditionModel
# Layers of a UNet that get adapters
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A workload of step_cost.py."""

    # Sentence for the report; "{batch}" stands for the number of samples, "{length}" for tokens
    note: str
    # Makes the model; called under any default device
    build: Callable[[], nn.Module]
    # (model, samples, tokens, dtype, device, generator) -> tensors of one batch
    inputs: Callable[..., Inputs]
    # (model, inputs) -> scalar
    loss: Callable[[Any, Inputs], Tensor]
    spec: AdapterSpec
    # Learning rate, so that the adapters grow as they do in training
    lr: float
    # Samples of a step, precision of the base and rounds by default
    batch: int
    dtype: str
    steps: int
    warmup: int
    # Tokens of a text by default; None for images
    length: int | None = None


def pooled_width(config: Any) -> int:
    """Width of the pooled prompt embedding of an SDXL UNet, from its configuration."""
    # The UNet embeds six numbers of sizes and crops in addition.
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
    """Latents, prompt embeddings and size conditioning for images of ``pixels`` x ``pixels``."""
    config = model.config
    pooled = pooled_width(config)

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator).to(device=device, dtype=dtype)

    latents = (batch, config.in_channels, pixels // 8, pixels // 8)  # the autoencoder takes 8 x 8
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
    """Mean squared error of the predicted noise."""
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
    """Sequences without padding, all of them targets unless these have a length of their own."""

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
    # A small vocabulary, so that the time is that of the layers
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
    """Write the folder that the command line names, and print its models."""
    parser = argparse.ArgumentParser(description="Write an SDXL pipeline with random weights.")
    parser.add_argument("folder", type=Path, help="new folder for the pipeline")
    args = parser.parse_args(argv)
    for name, count in write_pipeline(args.folder).items():
        print(f"{name}: {count:,} parameters")


if __name__ == "__main__":
    sys.exit(run_cli(main))
