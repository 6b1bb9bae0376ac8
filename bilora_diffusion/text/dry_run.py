"""Memory of a dry run of text beside what is trained: frozen weights, and what a step holds."""

from typing import Any

from ..adapters.quantize import held_bytes
from ..train.dry_run import NUMBER, STEP, Moments

HIDDEN = {"causal": 10.5, "seq2seq": 13.0, "classification": 4.0}
INNER, SCORES, LOGITS = 3.6, 2.8, 12
"""Numbers that a layer keeps for each hidden and each inner state of a token and, where attention
is not fused, for each of its scores; bytes of the loss for each word of a predicted token.
"""


def moments(task: Any, device: Any) -> Moments:
    """Of a task whose model is empty: the step of its longest rows."""
    cfg, loaded, train = task.cfg, task.loaded, task.data.train
    config, causal = loaded.model.config.get_text_config(), loaded.kind == "causal"
    width, tokens, count = config.hidden_size, max(train.lengths), config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", 4 * width)
    layer = HIDDEN[loaded.kind] * width + INNER * inner
    layer += 0 if causal else SCORES * config.num_attention_heads * tokens
    states = count * width + layer if cfg.gradient_checkpointing else count * layer
    weights = held_bytes(loaded.model, cfg.quantize, loaded.whole_modules)
    activations = int(cfg.train_batch_size * tokens * NUMBER[cfg.mixed_precision] * states)
    targets = cfg.train_batch_size * (tokens if causal else max(train.target_tokens))
    words = 0 if loaded.kind == "classification" else config.vocab_size
    logits = targets * words * LOGITS
    return {STEP: {"weights: model": weights, "activations": activations, "logits": logits}}
