"""Sinks beside outputs that lack them: softmax over a few keys, merged by the logarithms of both sums of weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pairs import merge_heads, split_heads
from pallas_kernels.windows.normaliser import extended, normalised
from pallas_kernels.windows.rows import Before, Pairs, Sinks, TokenPlaces, WindowedRows, WindowNodes
from pallas_kernels.windows.window import AttentionWindow, NearFarMasks


def add_sinks(
    queries: Float[Array, "B T H D"],
    tokens: WindowNodes,
    places: TokenPlaces,
    early: Sinks | None,
    outputs: Float[Array, "B T H E"],
    totals: Float[Array, "B H T"],
    *,
    sinks: int,
    scale: float,
) -> Float[Array, "B T H E"]:
    """Outputs over sinks as well.

    Args:
        queries: all of them.
        tokens: keys and values of the rows.
        places: of the tokens.
        early: sinks of what came before the rows, None for nothing.
        outputs: over all that is no sink.
        totals: logarithms of the sums of weights that these were divided by; of no meaning for queries that see sinks
            alone.
        sinks: how many a document has.
        scale: factor of q·k.
    """
    kv_heads = tokens.keys.shape[2]
    log_scale = jnp.where((places.positions < sinks)[:, None], jnp.finfo(totals.dtype).min, totals)
    parts = split_heads(queries, kv_heads), split_heads(outputs, kv_heads), jnp.moveaxis(log_scale, 1, 2)
    queries, others, log_scale = *parts[:2], parts[2].reshape(*parts[2].shape[:2], kv_heads, -1)
    if places.aligned:
        count = min(sinks, queries.shape[1])
        near = jnp.tri(queries.shape[1], count, dtype=bool)[None]
        first = WindowNodes(tokens.keys[:, :count], tokens.values[:, :count], None)
        found = normalised(
            queries, Pairs(first, NearFarMasks(near, None), None, None), extended(others), log_scale, scale
        )
        return merge_heads(found).astype(outputs.dtype)
    before = None
    if early is not None:
        nothing = WindowNodes(tokens.keys[:, :0], tokens.values[:, :0], None)
        before = Before(nothing, places.positions[:, :0], early)
    # In chunks with nothing before them: sinks are among a chunk's own tokens, or of the document that goes on in it.
    rows = WindowedRows.of(AttentionWindow(1, sinks=sinks), queries, tokens._replace(decays=None), places, before)
    pairs = rows.pairs()
    near = pairs.masks.near & (rows.key_positions < sinks)[..., None, :]
    pairs = pairs._replace(masks=NearFarMasks(near, None))
    found = normalised(rows.queries, pairs, extended(rows.chunks(others)), rows.chunks(log_scale), scale)
    return merge_heads(rows.flatten(found)).astype(outputs.dtype)
