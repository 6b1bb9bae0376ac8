"""Small text models and data, a trainer's arguments for them, and the loop to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    get_scheduler,
)

from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.api import BiLoRA

CONFIG = BiLoRAConfig(rank=4, alpha=8, rho=0.02)
RATE, STEPS, BATCH, LENGTH, WORDS = 1e-2, 20, 4, 8, 40


def tiny_llm(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=WORDS, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    return T5ForConditionalGeneration(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the words w3, w4, ..., and three special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def rows(count: int = STEPS * BATCH, seed: int = 0) -> Dataset:
    """Token rows of one length; each row's first tokens, of a number of its own, have no loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(count):
        labels[row, : row % 5] = -100
    columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return Dataset.from_dict({key: value.tolist() for key, value in columns.items()})


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for 20 steps over `rows()` in their order."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        **values,
    }


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    return TrainingArguments(**settings(folder, **values))


def batches(data: Dataset, size: int = BATCH) -> list[dict[str, Tensor]]:
    whole = {key: torch.tensor(data[key][:]) for key in data.column_names}
    return [
        {key: value[start : start + size] for key, value in whole.items()}
        for start in range(0, len(data), size)
    ]


def attached(model: Any, config: BiLoRAConfig = CONFIG, seed: int = 7) -> BiLoRA:
    torch.manual_seed(seed)
    return attach(model, config)


def by_hand(
    bilora: BiLoRA,
    data: Sequence[dict[str, Tensor]],
    *,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    accumulate: int = 1,
    schedule: str = "constant",
    warmup: int = 0,
    clip: float = 0.0,
    decay: float = 0.0,
    shifts: bool = True,
) -> list[float]:
    """Train as README's loop does, over all of `data`; the loss of a step is the mean over all its
    target tokens.
    """
    bilora.model.train()
    optimizer = kind(bilora.param_groups(lr=RATE, weight_decay=decay))  # type: ignore[call-arg]
    bilora.bind(optimizer)
    steps = len(data) // accumulate
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    losses = []
    for step in range(steps):
        window = data[step * accumulate : (step + 1) * accumulate]
        first = 1 if shifts else 0
        count = sum(int((batch["labels"][:, first:] != -100).sum()) for batch in window)
        total = 0.0
        for batch in window:
            own = int((batch["labels"][:, first:] != -100).sum())
            loss = cast(Any, bilora.model)(**batch).loss * own / count
            loss.backward()
            total += float(loss.detach())
        if clip:
            torch.nn.utils.clip_grad_norm_(bilora.clip_parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def difference(left: BiLoRA, right: BiLoRA) -> float:
    """The largest difference between the weights of both adapters of two models."""
    worst = 0.0
    for adapter in (PRIMARY, AUXILIARY):
        pair = [adapters.state_dict(bilora.model, adapter) for bilora in (left, right)]
        stripped = [
            {key.removeprefix("base_model.model."): value for key, value in state.items()}
            for state in pair
        ]
        assert stripped[0].keys() == stripped[1].keys()
        worst = max(
            worst,
            *((stripped[0][key] - stripped[1][key]).abs().max().item() for key in stripped[0]),
        )
    return worst


def losses(trainer: Any) -> list[float]:
    """The training loss that a trainer logged at each step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
