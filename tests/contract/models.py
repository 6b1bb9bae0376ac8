"""Small models of every kind that the methods adapt, each with a fixed batch of inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1")
WORDS = 40
"""Vocabulary size of the text models and of `tiny_tokenizer` in `tests/integrations`."""


class MLP(nn.Module):
    """Two linear layers around a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.conv = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden + self.conv(hidden[..., None, None])[..., 0, 0])


def tiny_mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP()


def tiny_unet(**settings: Any) -> nn.Module:
    """Return a small UNet of SDXL's kind; `settings` are further arguments of its class."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        **settings,
    )


def tiny_sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
    )


def tiny_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=WORDS, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    return T5ForConditionalGeneration(config)


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_llm() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        vocab_size=WORDS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tiny_clip(projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        **SMALL, vocab_size=30, projection_dim=16, eos_token_id=29, max_position_embeddings=8
    )
    model_class = CLIPTextModelWithProjection if projection else CLIPTextModel
    return model_class(config)


ROWS = 4
"""Number of samples in the fixed batch."""


def _mlp_output(model: nn.Module, rows: slice) -> Tensor:
    inputs = torch.linspace(-1, 1, ROWS * 6).view(ROWS, 6)[rows]
    # Quantized weights are integers; the others have the dtype in which the model computes.
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return model(inputs.to(weight.dtype))


def _unet_output(model: Any, rows: slice) -> Tensor:
    latents = torch.linspace(-1, 1, ROWS * 4 * 64).view(ROWS, 4, 8, 8)[rows]
    context = torch.linspace(1, -1, ROWS * 3 * 8).view(ROWS, 3, 8)[rows]
    timesteps = torch.tensor([3, 700, 20, 950])[rows]
    return model(latents, timesteps, context).sample


def _tokens(rows: slice) -> Tensor:
    """Return rows of the fixed batch: all tokens differ, and none is padding."""
    return torch.arange(1, 1 + ROWS * 6).view(ROWS, 6)[rows]


def _t5_output(model: Any, rows: slice) -> Tensor:
    tokens = _tokens(rows)
    return model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits


def _llm_output(model: Any, rows: slice) -> Tensor:
    return model(_tokens(rows)).logits


def _clip_output(model: Any, rows: slice) -> Tensor:
    return model(_tokens(rows)).last_hidden_state


class Case(NamedTuple):
    """A model, the layers to adapt, and the outputs for a fixed batch of `ROWS` samples."""

    make: Callable[[], nn.Module]
    targets: str | tuple[str, ...]
    rows_output: Callable[[nn.Module, slice], Tensor]

    def output(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        """Return the model's outputs for these rows of the fixed batch."""
        return self.rows_output(model, rows)


CASES = {
    "mlp": Case(tiny_mlp, ("first", "conv", "last"), _mlp_output),
    "unet": Case(tiny_unet, UNET_TARGETS, _unet_output),
    "t5": Case(tiny_t5, "all-linear", _t5_output),
    "llm": Case(tiny_llm, "all-linear", _llm_output),
    "clip": Case(tiny_clip, "all-linear", _clip_output),
}
