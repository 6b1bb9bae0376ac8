"""Evaluation commands: ``python -m eval.NAME`` measures runs and writes tables and a report.

    python -m eval.sweep eval/experiments/lora_bilora.yaml

A command defines the rows of a subject and the figures that show them (``evaluation.py``). The
package is run from a clone of the repository and is not installed. Importing it has no side
effects. If something can't be measured, a ``UserError`` ends the command with one sentence, where
possible before anything is written.
"""
