"""The run folder: log, checkpoints, provenance, model card, push."""
