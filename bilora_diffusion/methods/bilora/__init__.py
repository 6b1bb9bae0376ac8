"""Bi-LoRA: the algorithm, the auxiliary adapter, and the ball that bounds the auxiliary."""
