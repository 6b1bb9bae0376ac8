"""Bi-LoRA: the algorithm, its auxiliary, and the ball that bounds it."""
