"""Text models: options, tasks and their rows, tokenizing, packing, evaluation, the script."""
