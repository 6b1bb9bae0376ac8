"""Text sets: the catalog of tasks, local files, tokenization with its cache, packing, metrics."""
