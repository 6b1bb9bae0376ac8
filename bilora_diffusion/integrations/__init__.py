"""Bi-LoRA in the trainers of Transformers and TRL.

    trainer = Trainer(model=model, args=args, train_dataset=data)  # or a trainer of TRL
    bilora = use_bilora(trainer, BiLoRAConfig(rank=8, alpha=16, rho=0.05))
    trainer.train()

Schedules, gradient accumulation, clipping, evaluation, checkpoints and resuming work in the same
way as without Bi-LoRA. The trainer saves a plain PEFT LoRA adapter.
"""

from .trainer import use_bilora

__all__ = ["use_bilora"]
