"""Options of the training scripts: declaration, parsing, derived defaults and checks."""
