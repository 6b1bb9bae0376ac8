"""Evaluation: ``python -m eval.<name>`` measures runs and writes one long table of what it found.

    python -m eval.sweep eval/experiments/lora_bilora.yaml

A command is what a subject's rows are, and the figures that show them (``evaluation.py``). It is
run from a clone and not installed. Nothing happens at import. Whatever can't be measured raises a
``UserError``, which ends the command in one sentence, before anything is written where it can be.
"""
