"""Training any model: task contract, the one loop, stepping, outcome, dynamics."""
