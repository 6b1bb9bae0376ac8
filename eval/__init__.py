"""Evaluation: ``python -m eval.NAME`` measures runs and writes its result as one long table.

    python -m eval.sweep eval/experiments/lora_bilora.yaml

A command says what the rows of a subject are, and which figures show them (``evaluation.py``). The
package is run from a clone and is not installed. Nothing happens at import. Whatever can't be
measured raises a ``UserError``, which ends the command in one sentence, where possible before
anything is written.
"""
