"""Attention over a window and a memory by the operation of `pallas_kernels`, for the feature maps that it knows."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.attention.feature_maps import Exponential, FeatureMap, Hedgehog
from lin_jax.attention.kernels import packed_row_arrays
from lin_jax.attention.layout import Layout
from lin_jax.attention.windowed_state import WindowedState, in_order
from pallas_kernels.linear_attention import Memory
from pallas_kernels.types import QKV
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
    if not isinstance(features, Exponential | Hedgehog) or window.tokens == 0 or layout.present is not None:
        return None
    # What no kernel computes, plain XLA does.
    return windowed_implementation(*qkv, features.size, asked if asked is None else (asked, "xla"))


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
        features="hedgehog" if isinstance(features, Hedgehog) else "exponential",
        group_size=window.group_size,
        groups=window.groups,
        tokens=window.tokens,
        sinks=window.sinks,
        scale=scale,
        balance=balance.reshape(-1),
        log_decays=decays,
        packed=None if layout.aligned and state is None else packed_row_arrays(layout),
        prior=None if state is None else _prior(window, state),
        implementation=name,
    )
    return outputs, jnp.concatenate([memory.values, memory.keys[..., None]], axis=-1)


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
