"""Attention over a window and a memory by the operations of `pallas_kernels`, where kernels for it run."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.attention.feature_maps import Exponential, FeatureMap, Hedgehog
from lin_jax.attention.kernels import packed_row_arrays
from lin_jax.attention.layout import Layout
from lin_jax.attention.windowed_state import WindowedState, in_order
from pallas_kernels.linear_attention import Memory
from pallas_kernels.types import QKV, TreeArrays
from pallas_kernels.window_verify.api import verify_implementation, verify_window
from pallas_kernels.windowed_attention import FeatureWeights, WindowedPrior, windowed_attention, windowed_implementation
from pallas_kernels.windows.window import AttentionWindow


def windowed_program(
    features: FeatureMap, window: AttentionWindow, qkv: QKV, layout: Layout, asked: str | None
) -> str | None:
    """The name of the operation's implementation to run; None for an attention that it does not know.

    Args:
        features: the memory's map.
        window: of each query.
        qkv: queries, keys and values.
        layout: of the rows.
        asked: the implementation that the configuration names, or None.
    """
    if not _has_kernels(features, window) or layout.present is not None:
        return None
    # What no kernel computes, plain XLA does.
    return windowed_implementation(*qkv, features.size, asked if asked is None else (asked, "xla"))


def verify_program(
    features: FeatureMap, window: AttentionWindow, qkv: QKV, state: WindowedState, asked: str | None
) -> str | None:
    """The name of the kernels that compute a draft tree's nodes; None where plain XLA does.

    Args:
        features: the memory's map.
        window: of each query.
        qkv: queries, keys and values of the nodes.
        state: which they stand on.
        asked: the implementation that the configuration names, or None.
    """
    if not _has_kernels(features, window):
        return None
    name = verify_implementation(*qkv, state, asked if asked is None else (asked, "xla"))
    return None if name == "xla" else name


def windowed_by_program(
    name: str,
    features: FeatureMap,
    window: AttentionWindow,
    qkv: QKV,
    decays: Float[Array, "B T K"] | None,
    layout: Layout,
    state: WindowedState | None,
    *,
    scale: float,
    balance: Float[Array, "K R"],
) -> tuple[Float[Array, "B T H E"], Float[Array, "B K M E_1"]]:
    """Outputs, and the memory after the rows, which has a meaning with a state only.

    Args:
        name: of the implementation.
        features: the memory's map.
        window: of each query.
        qkv: queries, keys and values.
        decays: logarithms of the tokens' decay, None without decay.
        layout: of the rows.
        state: before the rows, or None.
        scale: factor of q·k.
        balance: logarithm of the memory's factor.
    """
    outputs, memory = windowed_attention(
        *qkv,
        _weights(features),
        **_options(features, window),
        sinks=window.sinks,
        scale=scale,
        balance=balance.reshape(-1),
        log_decays=decays,
        packed=None if layout.aligned and state is None else packed_row_arrays(layout),
        prior=None if state is None else _prior(window, state),
        implementation=name,
    )
    return outputs, jnp.concatenate([memory.values, memory.keys[..., None]], axis=-1)


def verify_by_program(
    name: str,
    features: FeatureMap,
    window: AttentionWindow,
    qkv: QKV,
    decays: Float[Array, "B N K"] | None,
    tree: TreeArrays,
    state: WindowedState,
    *,
    scale: float,
    balance: Float[Array, "K R"],
) -> Float[Array, "B N H E"]:
    """Outputs of a draft tree's nodes.

    Args:
        name: of the implementation.
        features: the memory's map.
        window: of each query.
        qkv: queries, keys and values of the nodes.
        decays: logarithms of the nodes' decay, None without decay.
        tree: the tree.
        state: which it stands on.
        scale: factor of q·k.
        balance: logarithm of the memory's factor.
    """
    options = _options(features, window) | {"scale": scale, "balance": balance.reshape(-1), "log_decays": decays}
    return verify_window(*qkv, _weights(features), tree, state, **options, implementation=name)


def has_window_kernels(features: FeatureMap) -> bool:
    """True for the feature maps that kernels know behind a window."""
    return isinstance(features, Exponential | Hedgehog)


def _has_kernels(features: FeatureMap, window: AttentionWindow) -> bool:
    return has_window_kernels(features) and window.tokens != 0


def _options(features: FeatureMap, window: AttentionWindow) -> dict[str, Any]:
    """The map's name and the window, as the operations take them."""
    name = "hedgehog" if isinstance(features, Hedgehog) else "exponential"
    return {"features": name, "group_size": window.group_size, "groups": window.groups, "tokens": window.tokens}


def _weights(features: FeatureMap) -> FeatureWeights:
    assert isinstance(features, Exponential | Hedgehog), "the operation knows the map"
    queries, keys = features.query_map[...], features.key_map[...]
    queries = queries.reshape(-1, *queries.shape[2:])
    if isinstance(features, Hedgehog):
        return FeatureWeights(queries, keys)
    bias = features.query_bias[...]
    return FeatureWeights(queries, keys, bias.reshape(-1, bias.shape[2]), features.key_bias[...])


def _prior(window: AttentionWindow, state: WindowedState) -> WindowedPrior:
    tokens, slots = in_order(window, state)
    memory = Memory(state.memory[..., :-1], state.memory[..., -1])
    positions = jnp.where(slots.mask, slots.positions, -1)
    return WindowedPrior(memory, *tokens, positions, state.sink_keys, state.sink_values)
