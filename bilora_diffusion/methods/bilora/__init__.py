"""Bi-LoRA: the algorithm, its ball, its radius, and the auxiliaries it trains."""
