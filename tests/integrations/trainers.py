"""Data for small text models, trainers with Bi-LoRA, and a manual loop to compare them with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from bilora_diffusion import BiLoRAConfig, attach
from bilora_diffusion.api import BiLoRA
from bilora_diffusion.integrations import use_bilora
from tests.contract.models import WORDS, tiny_llm

RHO = 0.02
CONFIG = BiLoRAConfig(rank=4, alpha=8, rho=RHO)
RATE, STEPS, BATCH, LENGTH = 1e-2, 20, 4, 8
CONSTRUCTOR_ARGUMENTS = (
    "callbacks",
    "eval_dataset",
    "optimizers",
    "peft_config",
    "optimizer_cls_and_kwargs",
    "ref_model",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word w3, w4, ... and three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for number in range(3, WORDS):
        words[f"w{number}"] = number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def rows(count: int = STEPS * BATCH, seed: int = 0) -> Dataset:
    """Return token rows of equal length; the first 0 to 4 tokens of each row have no loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(count):
        labels[row, : row % 5] = -100
    return Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": torch.ones_like(tokens).tolist(),
            "labels": labels.tolist(),
        }
    )


def preferences(count: int = STEPS * BATCH, seed: int = 0) -> Dataset:
    """Return prompts of two words, each with a better and a worse answer of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        words = [f"w{n}" for n in torch.randint(3, WORDS, (9,), generator=generator).tolist()]
        end = 5 + number % 3
        answers = {
            "chosen": " ".join(["", *words[2:end]]),
            "rejected": " ".join(["", *words[end:]]),
        }
        examples.append({"prompt": " ".join(words[:2]), **answers})
    return Dataset.from_list(examples)


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    """Return arguments of `TrainingArguments` for 20 steps over `rows()`, in order."""
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


def plain(folder: Path, model: Any, kind: str = "trainer", **values: Any) -> Any:
    """Return a trainer on `rows()`; for "dpo", on `preferences()` with a separate reference model.

    Args:
        kind: "trainer", "seq2seq", "sft" or "dpo".
        values: training arguments; those in `CONSTRUCTOR_ARGUMENTS`, and `data` for the training
            set, are passed to the trainer itself.
    """
    make_data = preferences if kind == "dpo" else rows
    arguments: dict[str, Any] = {"train_dataset": values.pop("data", None) or make_data()}
    for name in CONSTRUCTOR_ARGUMENTS:
        if name in values:
            arguments[name] = values.pop(name)
    trainer_class: Any = Trainer
    arguments_class: Any = TrainingArguments
    if kind == "seq2seq":
        trainer_class, arguments_class = Seq2SeqTrainer, Seq2SeqTrainingArguments
    elif kind == "sft":
        trl = pytest.importorskip("trl")
        trainer_class, arguments_class = trl.SFTTrainer, trl.SFTConfig
        values = {"bf16": False, "gradient_checkpointing": False, **values}
    elif kind == "dpo":
        trl = pytest.importorskip("trl")
        trainer_class, arguments_class = trl.DPOTrainer, trl.DPOConfig
        values = {"bf16": False, "gradient_checkpointing": False, **values}
        if "peft_config" not in arguments:
            arguments.setdefault("ref_model", tiny_llm())
    if kind != "trainer":
        arguments["processing_class"] = tiny_tokenizer()
    training_arguments = arguments_class(**settings(folder, **values))
    return trainer_class(model=model, args=training_arguments, **arguments)


def with_bilora(folder: Path, bilora: BiLoRA, kind: str = "trainer", **values: Any) -> Any:
    """Return a trainer like that of `plain`, which trains the adapters of `bilora`."""
    trainer = plain(folder, bilora.model, kind, **values)
    assert use_bilora(trainer, bilora) is bilora
    return trainer


def batches(data: Dataset) -> list[dict[str, Tensor]]:
    parts = []
    for start in range(0, len(data), BATCH):
        part = data[start : start + BATCH]
        parts.append({name: torch.tensor(values) for name, values in part.items()})
    return parts


def count_targets(batch: dict[str, Tensor], shifts: bool) -> int:
    """Count the tokens with a loss; the first token has none if the model predicts the next one."""
    labels = batch["labels"][:, 1:] if shifts else batch["labels"]
    return int((labels != -100).sum())


def attached(model: Any, config: BiLoRAConfig = CONFIG, seed: int = 7) -> BiLoRA:
    torch.manual_seed(seed)
    return attach(model, config)


def by_hand(
    bilora: BiLoRA,
    data: Sequence[dict[str, Tensor]],
    *,
    accumulate: int = 1,
    schedule: str = "constant",
    warmup: int = 0,
    clip: float = 0.0,
    decay: float = 0.0,
    shifts: bool = True,
) -> list[float]:
    """Train on all of `data` like the loop in README, and return the loss of each step.

    A step's loss is the mean over the target tokens of all its batches.

    Args:
        shifts: whether the model predicts the next token.
    """
    bilora.model.train()
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=RATE, weight_decay=decay))
    bilora.bind(optimizer)
    steps = len(data) // accumulate
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    model: Any = bilora.model
    losses = []
    for step in range(steps):
        numbers = range(step * accumulate, (step + 1) * accumulate)  # of this step's batches
        all_targets = sum(count_targets(data[number], shifts) for number in numbers)
        total = 0.0
        for number in numbers:
            # A batch's loss is the mean over its own targets.
            share = count_targets(data[number], shifts) / all_targets
            loss = share * model(**data[number]).loss
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
    """Return the largest difference between the adapters of two models."""
    left_tensors, right_tensors = left._method.tensors(), right._method.tensors()
    assert left_tensors.keys() == right_tensors.keys()
    differences = [(left_tensors[key] - right_tensors[key]).abs().max() for key in left_tensors]
    return float(max(differences))


def losses(trainer: Any, name: str = "loss") -> list[float]:
    """Return the values that a trainer logged under a name, by default each step's loss."""
    return [line[name] for line in trainer.state.log_history if name in line]
