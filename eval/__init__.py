"""Evaluation: ``python -m eval.<name>`` reads run folders and writes typed results.

    python -m eval.sweep recipes/mini.yaml --over method=lora,bilora seed=0..4

It is run from a clone and not installed. Nothing happens at import.
"""
