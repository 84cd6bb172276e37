"""The depthwise convolution: one filter per head, over time, on the values."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.layout import Layout
from pallas_kernels.pairs import weighted_values


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
        bands = _Bands.of(values, self.width, window)
        band = self._taps_at(bands.lag, values.dtype)
        if layout.aligned:
            return bands.filtered(band)
        reach = bands.lag <= bands.cut(layout.positions)[..., None]
        return bands.filtered(jnp.where(reach[:, :, None, None], band, 0))

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
        if not layout.aligned:
            lag = jnp.arange(values.shape[1])[:, None] - jnp.arange(values.shape[1])
            same = layout.segment_ids[:, :, None] == layout.segment_ids[:, None, :]
            band = jnp.where(same[:, None, None], self._taps_at(lag, values.dtype), 0)
            return weighted_values(band, values)
        # Seen from `ahead` tokens later, the whole filter looks back.
        later = jnp.pad(values, ((0, 0), (0, self.ahead), (0, 0), (0, 0)))
        bands = _Bands.of(later, self.ahead + self.width, None)
        return bands.filtered(self._taps_at(bands.lag - self.ahead, values.dtype))[:, self.ahead :]

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


class _Bands(NamedTuple):
    """Rows cut into `n` chunks of C tokens, each beside the chunk before it, that a filter reaches no further than.

    Attributes:
        windows: `[B, n, 2C, K, E]`.
        lag: `[C, 2C]` how far back each token of a window lies from each of its chunk's.
        length: tokens of a row.
    """

    windows: Float[Array, "B n C2 K E"]
    lag: Int[Array, "C C2"]
    length: int

    @classmethod
    def of(cls, values: Float[Array, "B T K E"], width: int, before: Float[Array, "B W_1 K E"] | None) -> "_Bands":
        """The windows of rows, for a filter of `width` taps; `before` the row are zeros, or the given values."""
        length = values.shape[1]
        chunk = max(width - 1, min(32, length), 1)
        first = jnp.zeros((values.shape[0], chunk, *values.shape[2:]), values.dtype)
        if before is not None and width > 1:
            first = first.at[:, chunk - width + 1 :].set(before.astype(values.dtype))
        chunks = jnp.concatenate([first, jnp.pad(values, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))], axis=1)
        chunks = chunks.reshape(values.shape[0], -1, chunk, *values.shape[2:])
        lag = jnp.arange(chunk)[:, None] + chunk - jnp.arange(2 * chunk)
        return cls(jnp.concatenate([chunks[:, :-1], chunks[:, 1:]], axis=2), lag, length)

    def cut(self, rows: Int[Array, "B T"]) -> Int[Array, "B n C"]:
        """Numbers of tokens, by chunks."""
        padded = jnp.pad(rows, ((0, 0), (0, -self.length % self.lag.shape[0])))
        return padded.reshape(rows.shape[0], -1, self.lag.shape[0])

    def filtered(self, band: Float[Array, "*#Bn K R C C2"]) -> Float[Array, "B T K R E"]:
        """Rows filtered by the taps between each token and its window's."""
        band = jnp.broadcast_to(band, (*self.windows.shape[:2], *band.shape[-4:]))
        outputs = weighted_values(band, self.windows)
        return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])[:, : self.length]
