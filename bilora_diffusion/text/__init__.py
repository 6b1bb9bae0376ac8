"""Text models: options, tasks and rows, tokenization, packing, evaluation, training script."""
