"""Data for small text models, trainers with Bi-LoRA, and the loop to compare them with."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

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
from tests.contract.models import WORDS

RHO = 0.02
CONFIG = BiLoRAConfig(rank=4, alpha=8, rho=RHO)
RATE, STEPS, BATCH, LENGTH = 1e-2, 20, 4, 8
CONSTRUCTOR_ARGUMENTS = (
    "callbacks",
    "eval_dataset",
    "optimizers",
    "peft_config",
    "optimizer_cls_and_kwargs",
)


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


def plain(folder: Path, model: Any, kind: str = "trainer", **values: Any) -> Any:
    """A trainer over `rows()`.

    `values` are its training arguments; those in `CONSTRUCTOR_ARGUMENTS` and the data are its own.

    Args:
        kind: "trainer", "seq2seq" or "sft".
    """
    arguments = {key: values.pop(key) for key in CONSTRUCTOR_ARGUMENTS if key in values}
    arguments["train_dataset"] = values.pop("data", None) or rows()
    make: Any = Trainer
    form: Any = TrainingArguments
    if kind == "seq2seq":
        make, form = Seq2SeqTrainer, Seq2SeqTrainingArguments
        arguments["processing_class"] = tiny_tokenizer()
    elif kind == "sft":
        trl = pytest.importorskip("trl")
        make, form = trl.SFTTrainer, trl.SFTConfig
        arguments["processing_class"] = tiny_tokenizer()
        values = {"bf16": False, "gradient_checkpointing": False, **values}
    return make(model=model, args=form(**settings(folder, **values)), **arguments)


def with_bilora(folder: Path, bilora: BiLoRA, kind: str = "trainer", **values: Any) -> Any:
    """The same on the model that has these adapters, which it trains."""
    trainer = plain(folder, bilora.model, kind, **values)
    assert use_bilora(trainer, bilora) is bilora
    return trainer


def batches(data: Dataset) -> list[dict[str, Tensor]]:
    columns = {key: torch.tensor(data[key][:]).split(BATCH) for key in data.column_names}
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]


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
    samples: Sequence[int] = (),
) -> list[float]:
    """Train as README's loop does, over all of `data`; the loss of a step is the mean over all its
    target tokens.

    Args:
        samples: the number of the sample in each row of all batches, where there are several
            auxiliaries.
    """
    bilora.model.train()
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=RATE, weight_decay=decay))
    bilora.bind(optimizer)
    steps = len(data) // accumulate
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    losses, numbers = [], iter(samples)
    for step in range(steps):
        window = data[step * accumulate : (step + 1) * accumulate]
        first = 1 if shifts else 0
        count = sum(int((batch["labels"][:, first:] != -100).sum()) for batch in window)
        total = 0.0
        for batch in window:
            target_count = int((batch["labels"][:, first:] != -100).sum())
            batch_numbers = list(itertools.islice(numbers, len(batch["labels"])))
            with bilora.samples(batch_numbers) if batch_numbers else contextlib.nullcontext():
                loss = cast(Any, bilora.model)(**batch).loss * target_count / count
                loss.backward()
            total += float(loss.detach())
        if clip:
            torch.nn.utils.clip_grad_norm_(bilora.clip_parameters(), clip)
        bilora.observe(torch.tensor(total))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def difference(left: BiLoRA, right: BiLoRA) -> float:
    """The largest difference between what two models have of adapters."""
    left_tensors, right_tensors = left._method.tensors(), right._method.tensors()
    assert left_tensors.keys() == right_tensors.keys()
    return max(float((left_tensors[key] - right_tensors[key]).abs().max()) for key in left_tensors)


def losses(trainer: Any, name: str = "loss") -> list[float]:
    """Values that a trainer logged under a name, by default the training loss of each step."""
    return [line[name] for line in trainer.state.log_history if name in line]
