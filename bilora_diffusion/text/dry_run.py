"""Memory of a dry run of text beside what is trained: frozen weights, and what a step holds."""

from typing import Any

from ..adapters.quantize import held_bytes
from ..train.dry_run import NUMBER_BYTES, STEP, PhaseMemory

HIDDEN_COUNTS = {"causal": 10.5, "seq2seq": 13.0, "classification": 4.0}
"""Numbers that a layer stores for each hidden state of a token."""
INNER_COUNT = 3.6
"""Numbers that it stores for each inner state of its feed-forward part."""
SCORE_COUNT = 2.8
"""Numbers that it stores for each attention score, where attention is not fused."""
LOGIT_BYTES = 12
"""Bytes of the loss for each word of a predicted token."""


def memory_by_phase(task: Any, device: Any) -> PhaseMemory:
    """Memory of a task whose model is empty: the step of its longest rows."""
    cfg, loaded, train = task.cfg, task.loaded, task.data.train
    config = loaded.model.config.get_text_config()
    is_causal = loaded.kind == "causal"
    width, layers, tokens = config.hidden_size, config.num_hidden_layers, max(train.lengths)
    inner_width = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", 4 * width)
    numbers_of_layer = HIDDEN_COUNTS[loaded.kind] * width + INNER_COUNT * inner_width
    if not is_causal:
        numbers_of_layer += SCORE_COUNT * config.num_attention_heads * tokens
    if cfg.gradient_checkpointing:  # one hidden state for each layer, and all of one layer
        numbers = layers * width + numbers_of_layer
    else:
        numbers = layers * numbers_of_layer
    row_tokens = cfg.train_batch_size * tokens
    activations = int(row_tokens * NUMBER_BYTES[cfg.mixed_precision] * numbers)

    targets = cfg.train_batch_size * (tokens if is_causal else max(train.target_tokens))
    words = 0 if loaded.kind == "classification" else config.vocab_size
    weights = held_bytes(loaded.model, cfg.quantize, loaded.whole_modules)
    logits = targets * words * LOGIT_BYTES
    return {STEP: {"weights: model": weights, "activations": activations, "logits": logits}}
