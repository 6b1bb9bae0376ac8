"""Training any model: task contract, the one loop, stepping, optimizers, averaging, dynamics."""
