"""Slow, plain float64 NumPy versions of every attention, one query at a time: what the forms are checked against."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lin_jax.attention import AttentionConfig, parse_name

Attend = Callable[..., np.ndarray]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def performer_features(x: np.ndarray, mixer: Any) -> np.ndarray:
    x = x / x.shape[-1] ** 0.25
    return np.exp(x @ directions(mixer).T - np.sum(x**2, axis=-1, keepdims=True) / 2)


def rfa_features(x: np.ndarray, mixer: Any) -> np.ndarray:
    angles = unit(x) @ directions(mixer).T
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1) * np.sqrt(1 / angles.shape[-1])


def positive_features(base: str, features: Any, kv_head: int, share: int | None) -> Attend:
    """Features of a query (by its head's place among those that share a key head) or of keys, as a function."""
    side = "key" if share is None else "query"
    place = (kv_head,) if share is None else (kv_head, share)

    def exponential(x: np.ndarray) -> np.ndarray:
        x = x / x.shape[-1] ** 0.25
        weights, bias = (
            np.asarray(getattr(features, f"{side}_{part}")[...], np.float64)[place] for part in ("map", "bias")
        )
        half = np.sum(x**2, axis=-1, keepdims=True) / 2
        return np.exp(np.minimum(x @ weights.T + bias - half, np.inf if share is not None else 40)) / len(bias) ** 0.5

    def clustered(x: np.ndarray) -> np.ndarray:
        x = x / x.shape[-1] ** 0.25
        weights, bias = (
            np.asarray(getattr(features, f"{side}_{part}")[...], np.float64)[place] for part in ("map", "bias")
        )
        powers = np.exp(x @ weights.T + bias)
        return powers if share is not None else powers / powers.sum(axis=-1, keepdims=True)

    def hedgehog(x: np.ndarray) -> np.ndarray:
        projected = x @ np.asarray(getattr(features, f"{side}_map")[...], np.float64)[place].T
        powers = np.exp(np.concatenate([projected, -projected], axis=-1))
        return powers / powers.sum(axis=-1, keepdims=True)

    def performer(x: np.ndarray) -> np.ndarray:
        x = x / x.shape[-1] ** 0.25
        weights = np.asarray(features.projection[...], np.float64)
        return np.exp(x @ weights.T - np.sum(x**2, axis=-1, keepdims=True) / 2) / len(weights) ** 0.5

    def rfa(x: np.ndarray) -> np.ndarray:
        angles = unit(x) @ np.asarray(features.projection[...], np.float64).T
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1) * np.sqrt(1 / angles.shape[-1])

    maps: dict[str, Attend] = {
        "clustered": clustered,
        "exponential": exponential,
        "hedgehog": hedgehog,
        "performer": performer,
        "rfa": rfa,
        "relu": lambda x: np.maximum(x, 0),
        "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1,
    }
    return maps.get(base, unit)


def directions(mixer: Any) -> np.ndarray:
    return np.asarray(mixer.linear.features.projection[...], np.float64)


def all_pairs(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum()


class Oracle:
    """One attention with the parameters of a mixer.

    Args:
        config: name and sizes.
        mixer: the mixer, for its parameters.
        layer: number of the layer.
        tables: whether yoso reads hash tables, as from a state, or takes the expectation.
    """

    def __init__(self, config: AttentionConfig, mixer: Any, layer: int = 0, *, tables: bool = True) -> None:
        self.config, self.layer, self.tables = config, layer, tables
        self.name = parse_name(config.name)
        self.base_mixer = getattr(mixer, "base", mixer)
        around = getattr(mixer, "around", mixer)
        self.alpha = 1.0 if getattr(mixer, "alpha", None) is None else float(mixer.alpha[0])
        convolution = getattr(around, "convolution", None)
        self.taps = None if convolution is None else np.asarray(convolution.taps[...], np.float64)

    def causal(
        self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, parents: np.ndarray | None = None
    ) -> np.ndarray:
        """Outputs `[T, H, E]`; token t follows `parents[t]`, by default the one before it."""
        parents = np.arange(-1, len(queries) - 1) if parents is None else parents
        outputs = []
        for t in range(len(queries)):
            history = [t]
            while parents[history[0]] >= 0:
                history.insert(0, int(parents[history[0]]))
            place = np.arange(len(history))
            outputs.append(self._query(queries[t], keys[history], values[history], place[-1], place, values[t]))
        return np.stack(outputs)

    def bidirectional(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Outputs `[T, H, E]` of an encoder."""
        place = np.arange(len(queries))
        outputs = [self._query(q, keys, values, t, place, values[t], both=True) for t, q in enumerate(queries)]
        return np.stack(outputs)

    def cross(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Outputs `[T, H, E]` of a decoder that reads an encoder."""
        place = np.arange(len(keys))
        return np.stack([self._query(q, keys, values, t, place, None, both=True) for t, q in enumerate(queries)])

    def _query(
        self,
        query: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        here: int,
        place: np.ndarray,
        own: np.ndarray | None,
        both: bool = False,
    ) -> np.ndarray:
        heads = len(query)
        share = heads // keys.shape[1]
        same = place // self.config.group_size == here // self.config.group_size
        outputs = np.zeros((heads, values.shape[2]))
        local = np.zeros_like(outputs)
        for head in range(heads):
            q, k, v = query[head], keys[:, head // share], values[:, head // share]
            if self.name.window or self.config.decay != "none":
                outputs[head] = self._window(q, k, v, place, here, both, (head // share, head % share), own is None)
            else:
                outputs[head] = self._base(q, k, v, same, place, here, both, (head // share, head % share))
            if self.name.local:
                local[head] = np.maximum(unit(k[same]) @ unit(q), 0) ** 2 @ v[same]
        if self.name.base == "transnormer" and self.layer >= self.config.diagonal_layers:
            outputs = outputs / np.sqrt(np.mean(outputs**2) + 1e-6)
        outputs = local + self.alpha * outputs if self.name.local else outputs
        if self.name.base == "linear_angular" and own is not None:
            outputs = unit(np.repeat(own, share, axis=0) / 2 + outputs / np.pi)
        if self.taps is not None and own is not None:
            ahead = self.taps.shape[1] // 2 if both else 0
            for head in range(heads):
                for tap, weight in enumerate(self.taps[head]):
                    at = here - (tap - ahead)
                    if 0 <= at < len(values):
                        outputs[head] += weight * values[at, head // share]
        return outputs

    def _window(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        place: np.ndarray,
        here: int,
        both: bool,
        head: tuple[int, int],
        cross: bool,
    ) -> np.ndarray:
        """A window, a memory that decays, or both."""
        config, base, mixer = self.config, self.name.base, self.base_mixer
        groups, features = place // config.group_size, mixer.linear.features
        if cross:
            near = np.zeros_like(place, bool)
        elif not self.name.window:
            near = np.zeros_like(place, bool) if base not in ("flash", "flash_global") else groups == groups[here]
        elif config.window is None:
            near = np.abs(groups - here // config.group_size) <= config.window_groups
        else:
            near = np.abs(place - here) < config.window
        near = near | (place < config.sinks) & (not cross)
        decays = np.ones(len(place))
        if config.decay == "constant":
            decays = np.exp(-np.exp(float(mixer.decay.rate[head[0]]))) * decays
        elif config.decay == "token":
            weight, bias = (np.asarray(getattr(mixer.decay, part)[head[0]], np.float64) for part in ("weight", "bias"))
            decays = (1 / (1 + np.exp(-(v @ weight + bias)))) ** (1 / 16)
        since = np.array([np.prod(decays[s + 1 :]) for s in range(len(place))])
        query_features = positive_features(base, features, head[0], head[1])(q)
        far = positive_features(base, features, head[0], None)(k) @ query_features * since
        if base in ("flash", "flash_global"):
            local = np.maximum(unit(k) @ unit(q), 0) ** 2 if base == "flash" else np.zeros_like(far)
            return np.where(near, local, far) @ v
        if not self.name.window or cross:
            total = max(far.sum(), 1e-2) if base == "rfa" else far.sum()
            return far @ v / total if far.any() else np.zeros(v.shape[1])
        balance = np.exp(float(mixer.balance[head]))
        weights = np.where(near, np.exp(k @ q / np.sqrt(len(q))), balance * far)
        return weights @ v / weights.sum()

    def _base(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        same: np.ndarray,
        place: np.ndarray,
        here: int,
        both: bool,
        head: tuple[int, int],
    ) -> np.ndarray:
        base, root = self.name.base, np.sqrt(len(q))
        cosines = unit(k) @ unit(q)
        squared = np.maximum(cosines, 0) ** 2
        grouped = np.ones_like(same) if both else ~same
        if base == "softmax":
            seen = np.ones_like(same) if self.config.window is None else place > here - self.config.window
            seen = seen | (place < self.config.sinks)
            return softmax(k[seen] @ q / root) @ v[seen]
        if base == "square":
            return squared @ v / len(k)
        if base == "flash_local":
            return squared[same] @ v[same]
        if base == "flash_global":
            return cosines[grouped] @ v[grouped]
        if base == "flash":
            return squared[same] @ v[same] + cosines[grouped] @ v[grouped]
        if base == "linear_angular":
            return squared[same] @ v[same] + self.alpha * (cosines[grouped] @ v[grouped])
        if base == "relu":
            weights = np.maximum(k, 0) @ np.maximum(q, 0)
            return weights @ v / weights.sum() if weights.any() else np.zeros(v.shape[1])
        if base in ("elu", "hedgehog", "exponential", "clustered"):
            features = self.base_mixer.linear.features
            return all_pairs(
                positive_features(base, features, head[0], None)(k) @ positive_features(base, features, *head)(q), v
            )
        if base == "performer":
            return all_pairs(performer_features(k, self.base_mixer) @ performer_features(q, self.base_mixer), v)
        if base == "rfa":
            weights = rfa_features(k, self.base_mixer) @ rfa_features(q, self.base_mixer)
            return weights @ v / max(weights.sum(), 1e-2)
        if base == "transnormer":
            if self.layer < self.config.diagonal_layers:
                return softmax(k[same] @ q / root) @ v[same]
            positive = [np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1 for x in (q, k)]
            return positive[1] @ positive[0] @ v
        if base == "yoso":
            return self._yoso(q, k, v, cosines)
        return self._linformer(q, k, v, place, here, both)

    def _yoso(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cosines: np.ndarray) -> np.ndarray:
        bits, hashes = self.config.hash_bits, self.config.hashes
        if not self.tables:
            chance = (1 - np.arccos(np.clip(cosines, -1 + 1e-6, 1 - 1e-6)) / np.pi) ** bits
            return unit(chance @ v)
        projection = directions(self.base_mixer.tables)
        signs = [(x @ projection.T > 0).reshape(*x.shape[:-1], hashes, bits) for x in (q, k)]
        collide = np.all(signs[0] == signs[1], axis=-1)
        total = np.mean(collide, axis=-1) @ v
        return unit(total) if total.any() else total

    def _linformer(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, place: np.ndarray, here: int, both: bool
    ) -> np.ndarray:
        size = self.config.group_size
        to_key, to_value = (
            np.asarray(p[...], np.float64) for p in (self.base_mixer.key_projection, self.base_mixer.value_projection)
        )
        own = place // size == here // size
        all_keys, all_values = ([], []) if both else ([k[own]], [v[own]])
        for group in range(len(k) // size + 1 if both else here // size):
            mine = place // size == group
            if mine.any():
                all_keys.append(to_key[place[mine] % size].T @ k[mine])
                all_values.append(to_value[place[mine] % size].T @ v[mine])
        return softmax(np.concatenate(all_keys) @ q / np.sqrt(len(q))) @ np.concatenate(all_values)
