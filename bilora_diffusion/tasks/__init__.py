"""What is trained: a task brings models, data and a loss; loop and method do the rest."""
