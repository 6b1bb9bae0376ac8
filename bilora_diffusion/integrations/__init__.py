"""Bi-LoRA in the trainers of Transformers and TRL.

    trainer = Trainer(model=model, args=args, train_dataset=data)  # or Seq2SeqTrainer, SFTTrainer
    bilora = use_bilora(trainer, BiLoRAConfig(rank=8, alpha=16, rho=0.05))
    trainer.train()

Everything else stays as it is: schedules, accumulation, clipping, evaluation, checkpoints, resume.
The folders that the trainer writes hold a plain PEFT LoRA adapter.
"""

from .trainer import use_bilora

__all__ = ["use_bilora"]
