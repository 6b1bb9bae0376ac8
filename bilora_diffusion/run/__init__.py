"""The run folder: its log, checkpoints, provenance, model card and upload."""
