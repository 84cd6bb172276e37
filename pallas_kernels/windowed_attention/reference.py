"""Reference of attention over a window and a memory: plain loops over tokens, in float64."""

from typing import Any

import numpy as np

from pallas_kernels.windowed_attention.problem import Features, FeatureWeights


def windowed_attention_reference(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    weights: FeatureWeights,
    *,
    features: Features,
    group_size: int,
    groups: int,
    tokens: int | None,
    sinks: int = 0,
    scale: float,
    balance: np.ndarray,
    log_decays: np.ndarray | None,
) -> np.ndarray:
    """Outputs `[T, H, E]` of one document, token by token, straight from the formula.

    Args:
        queries: `[T, H, D]`.
        keys: `[T, K, D]`; head h of the queries uses head `h // (H / K)` of keys and values.
        values: `[T, K, E]`.
        weights: the feature map's learnt parts.
        features: the map's name.
        group_size: tokens of a group, by position.
        groups: groups before the query's own that its window holds.
        tokens: a window of exactly so many tokens instead, the query's own included; None for groups.
        sinks: first tokens that are near for ever.
        scale: factor of q·k.
        balance: `[H]` logarithm of the memory's factor.
        log_decays: `[T, K]` logarithms of each token's decay, None for no decay.
    """
    queries, keys, values = (np.asarray(each, np.float64) for each in (queries, keys, values))
    length, heads, _ = queries.shape
    share = heads // keys.shape[1]
    outputs = np.zeros((length, heads, values.shape[2]))
    for head in range(heads):
        kv = head // share
        query_bias = 0.0 if weights.query_bias is None else weights.query_bias[head]
        key_bias = 0.0 if weights.key_bias is None else weights.key_bias[kv]
        asked = [_features(row, weights.queries[head], query_bias, features, scale) for row in queries[:, head]]
        held = [_features(row, weights.keys[kv], key_bias, features, scale) for row in keys[:, kv]]
        for t in range(length):
            start = t - tokens + 1 if tokens is not None else (t // group_size - groups) * group_size
            total = 0.0
            for s in range(t + 1):
                if s >= start or s < sinks:
                    weight = np.exp(scale * queries[t, head] @ keys[s, kv])
                else:
                    decay = 1.0 if log_decays is None else np.exp(np.sum(log_decays[s + 1 : t + 1, kv]))
                    weight = np.exp(balance[head]) * decay * (asked[t] @ held[s])
                outputs[t, head] += weight * values[s, kv]
                total += weight
            outputs[t, head] /= total
    return outputs


def _features(row: np.ndarray, weight: Any, bias: Any, name: Features, scale: float) -> np.ndarray:
    if name == "hedgehog":
        raised = np.exp(np.concatenate([weight @ row, -weight @ row]))
        return raised / raised.sum()
    scaled = row * np.sqrt(scale)
    return np.exp(weight @ scaled + bias - scaled @ scaled / 2) / np.sqrt(len(weight))
