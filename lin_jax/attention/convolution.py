"""The depthwise convolution: one filter per head, over time, on the values."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.layout import Layout
from lin_jax.attention.pairs import accumulation_dtype, weighted_values


class Convolution(nnx.Module):
    """`o_t = sum_j w_j v_{t-j}` over lags j from `-ahead` to `width - 1`; ahead is 0 in the masked convolution.

    A centred kernel of odd size whose future half is masked away leaves `width = (kernel_size + 1) / 2` taps. Only the
    taps that are left are parameters, the most negative lag first, one row per query head. They start at zero, so that
    a converted model starts as it was.

    Args:
        kernel_size: odd size of the kernel.
        heads: query heads H.
        kv_heads: key/value heads K.
        centred: keep the future half (encoders only).
        read_padding: let a bidirectional convolution see tokens that are not present.
        param_dtype: type of the taps.
    """

    def __init__(
        self,
        kernel_size: int,
        heads: int,
        kv_heads: int,
        *,
        centred: bool = False,
        read_padding: bool = False,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.width = (kernel_size + 1) // 2
        self.ahead = self.width - 1 if centred else 0
        self.kv_heads = kv_heads
        self.read_padding = read_padding
        self.taps = nnx.Param(jnp.zeros((heads, self.ahead + self.width), param_dtype))

    def parallel(
        self,
        values: Float[Array, "B T K E"],
        layout: Layout,
        window: Float[Array, "B W_1 K E"] | None = None,
    ) -> Float[Array, "B T K R E"]:
        """Filters whole rows causally, as products with banded matrices of one chunk by two.

        Args:
            values: `[B, T, K, E]`.
            layout: positions; a token sees no further back than the start of its document.
            window: `[B, W-1, K, E]` the values before the row, newest last; None means zeros.
        """
        values = self.readable(values, layout)
        batch, length = values.shape[:2]
        chunk = max(self.width - 1, min(32, length), 1)
        count = -(-length // chunk)
        before = jnp.zeros((batch, chunk, *values.shape[2:]), values.dtype)
        if window is not None and self.width > 1:
            before = before.at[:, chunk - self.width + 1 :].set(window.astype(values.dtype))
        padding = ((0, 0), (0, count * chunk - length), (0, 0), (0, 0))
        chunks = jnp.concatenate([before, jnp.pad(values, padding)], axis=1)
        chunks = chunks.reshape(batch, count + 1, chunk, *values.shape[2:])
        windows = jnp.concatenate([chunks[:, :-1], chunks[:, 1:]], axis=2)

        lag = jnp.arange(chunk)[:, None] + chunk - jnp.arange(2 * chunk)
        band = self._taps_at(lag, values.dtype)
        if not layout.aligned:
            positions = jnp.pad(layout.positions, padding[:2]).reshape(batch, count, chunk)
            reach = lag <= positions[..., None]
            band = jnp.where(reach[:, :, None, None], band, 0)
        else:
            band = jnp.broadcast_to(band, (batch, count, *band.shape))
        outputs = weighted_values(band, windows)
        return outputs.reshape(batch, count * chunk, *outputs.shape[3:])[:, :length]

    def verify(
        self,
        values: Float[Array, "B N K E"],
        depth: Int[Array, "*#B N"],
        ancestors: Bool[Array, "*#B N N"],
        window: Float[Array, "B W_1 K E"],
    ) -> Float[Array, "B N K R E"]:
        """Filters tree nodes: up the ancestors of each, then into the saved window.

        Args:
            values: `[B, N, K, E]` values of the nodes.
            depth: `[N]` or `[B, N]` depth of each node.
            ancestors: `[N, N]` or `[B, N, N]`, whether node j is node i or above it.
            window: `[B, W-1, K, E]` the last committed values, newest last.
        """
        apart = depth[..., :, None] - depth[..., None, :]
        among_nodes = self._taps_at(jnp.where(ancestors, apart, -1), values.dtype)
        into_window = self._taps_at(depth[..., :, None] + self.width - 1 - jnp.arange(self.width - 1), values.dtype)
        weights = jnp.concatenate([into_window, among_nodes], axis=-1)
        weights = jnp.broadcast_to(weights, (values.shape[0], *weights.shape[-4:]))
        return weighted_values(weights, jnp.concatenate([window.astype(values.dtype), values], axis=1))

    def bidirectional(self, values: Float[Array, "B T K E"], layout: Layout) -> Float[Array, "B T K R E"]:
        """Filters an encoder's rows; rows that hold several documents as one matrix of pairs."""
        values = self.readable(values, layout)
        batch, length, kv_heads, size = values.shape
        if not layout.aligned:
            lag = jnp.arange(length)[:, None] - jnp.arange(length)
            same = layout.documents[:, :, None] == layout.documents[:, None, :]
            band = jnp.where(same[:, None, None], self._taps_at(lag, values.dtype), 0)
            return weighted_values(band, values)
        kernel = jnp.flip(self.taps[...], axis=1).astype(values.dtype)[:, None, :]
        filtered = jax.lax.conv_general_dilated(
            jnp.moveaxis(values, 3, 1).reshape(batch * size, length, kv_heads),
            kernel,
            window_strides=(1,),
            padding=[(self.width - 1, self.ahead)],
            dimension_numbers=("NWC", "OIW", "NWC"),
            feature_group_count=kv_heads,
            preferred_element_type=accumulation_dtype(values.dtype),
        )
        return jnp.moveaxis(filtered.reshape(batch, size, length, kv_heads, -1), 1, 4)

    def readable(self, values: Float[Array, "B T K E"], layout: Layout) -> Float[Array, "B T K E"]:
        """Values as they are filtered: zero where tokens are not present."""
        if layout.present is None or self.read_padding:
            return values
        return jnp.where(layout.present[:, :, None, None], values, 0)

    def _taps_at(self, lag: Int[Array, "*batch T S"], dtype: jnp.dtype) -> Float[Array, "*batch K R T S"]:
        """The filter's value at each lag, zero where the lag is beyond the filter."""
        taps = self.taps[...].astype(dtype)
        taps = taps.reshape(self.kv_heads, -1, taps.shape[1])
        index = lag + self.ahead
        inside = (index >= 0) & (index < taps.shape[2])
        found = jnp.moveaxis(taps[:, :, jnp.clip(index, 0, taps.shape[2] - 1)], (0, 1), (-4, -3))
        return jnp.where(inside[..., None, None, :, :], found, 0)
