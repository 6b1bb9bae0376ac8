"""Training of any model: the task interface, the loop, its steps, the outcome and the dynamics."""
