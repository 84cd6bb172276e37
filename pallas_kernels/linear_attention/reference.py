"""Reference of linear attention with a decay: a plain loop over tokens, in float64."""

import numpy as np


def linear_attention_reference(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    decay: np.ndarray | None = None,
    floor: float | None = None,
    memory: np.ndarray | None = None,
    normaliser: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs `[T, H, E]` of one sequence, and its memory `[K, D, E]` and normaliser `[K, D]` after the last token.

    Args:
        queries: `[T, H, D]`, as the feature map left them.
        keys: `[T, K, D]`; head h of the queries uses head `h // (H / K)` of keys and values.
        values: `[T, K, E]`.
        decay: `[K]` what a token's weight is multiplied with for each token that comes after it; None for one.
        floor: least divisor of sums; 0 divides by the sum of the weights whatever it is, unless it is zero;
            None does not divide.
        memory: `[K, D, E]` before the first token.
        normaliser: `[K, D]` before the first token.
    """
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    length, heads, size = queries.shape
    kv_heads = keys.shape[1]
    memory = np.zeros((kv_heads, size, values.shape[2])) if memory is None else np.array(memory, np.float64)
    normaliser = np.zeros((kv_heads, size)) if normaliser is None else np.array(normaliser, np.float64)
    outputs = np.zeros((length, heads, values.shape[2]))
    for t in range(length):
        for k in range(kv_heads):
            kept = 1.0 if decay is None else float(decay[k])
            memory[k] = kept * memory[k] + np.outer(keys[t, k], values[t, k])
            normaliser[k] = kept * normaliser[k] + keys[t, k]
        for h in range(heads):
            k = h // (heads // kv_heads)
            total = queries[t, h] @ normaliser[k]
            divisor = 1.0
            if floor is not None:
                divisor = max(total, floor) if floor else total or 1.0
            outputs[t, h] = queries[t, h] @ memory[k] / divisor
    return outputs, memory, normaliser
