"""What is trained: a task brings frozen models, data and a loss; the loop and the method do the rest."""
