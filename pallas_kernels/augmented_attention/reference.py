"""Reference of augmented linear attention: plain loops over tokens, in float64."""

from collections.abc import Callable

import numpy as np


def _relu_squared(score: float) -> float:
    """`relu(s)^2`."""
    return max(score, 0.0) ** 2


def augmented_attention_reference(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    group_size: int,
    alpha: float | None,
    taps: np.ndarray | None,
    local: Callable[[float], float] | None = _relu_squared,
    parents: np.ndarray | None = None,
) -> np.ndarray:
    """Outputs `[T, H, E]` of one sequence, token by token, straight from the formula (You et al. 2024, section 4).

    Args:
        queries: `[T, H, D]`.
        keys: `[T, K, D]`; head h of the queries uses head `h // (H / K)` of keys and values.
        values: `[T, K, E]`.
        group_size: tokens in a group, by position.
        alpha: factor of the grouped branch, None to leave the branch out.
        taps: `[H, W]` convolution filter, lag 0 first, None to leave the convolution out.
        local: score function of the local branch, None to leave the branch out.
        parents: `[T]` index of the token before each one, -1 at the start; None means the one to the left. Tokens
            with the same parent are alternatives, so that a sequence with a draft tree behind it can be written down.
    """
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    length, heads, _ = queries.shape
    share = heads // keys.shape[1]
    parents = np.arange(-1, length - 1) if parents is None else parents
    outputs = np.zeros((length, heads, values.shape[2]))
    for t in range(length):
        history = [t]
        while parents[history[-1]] >= 0:
            history.append(int(parents[history[-1]]))
        position = len(history) - 1
        for h in range(heads):
            query = queries[t, h] / np.linalg.norm(queries[t, h])
            for lag, s in enumerate(history):
                key = keys[s, h // share] / np.linalg.norm(keys[s, h // share])
                value = values[s, h // share]
                if (position - lag) // group_size == position // group_size:
                    outputs[t, h] += (local(query @ key) if local else 0.0) * value
                else:
                    outputs[t, h] += (alpha or 0.0) * (query @ key) * value
                if taps is not None and lag < taps.shape[1]:
                    outputs[t, h] += float(taps[h, lag]) * value
    return outputs
