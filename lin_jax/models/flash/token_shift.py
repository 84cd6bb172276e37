"""Token shift: some features of every token come from the token before it, in the forms of a token mixer.

The state is what the next token will be given: those features of the last token, zeros before the first one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention import Layout, TreeArrays
from pallas_kernels.chunks import first_segment_id


def shift_rows(
    features: Float[Array, "B T F"], layout: Layout, before: Float[Array, "B F"] | None
) -> Float[Array, "B T F"]:
    """The features of each token's predecessor in its document, zeros where there is none.

    Args:
        features: `[B, T, F]`.
        layout: positions and segment ids. A present token is given nothing of one that is not.
        before: `[B, F]` the state, which the first document goes on from; None means zeros.
    """
    segment_ids, valid = layout.segment_ids, layout.valid
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)))
    seen = jnp.pad(valid[:, :-1], ((0, 0), (1, 0))) | ~valid
    previous = jnp.pad(features, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    shifted = jnp.where((same & seen)[..., None], previous, 0)
    if before is None:
        return shifted
    goes_on = ~same & (segment_ids == first_segment_id(segment_ids)[:, None])
    return jnp.where(goes_on[..., None], before[:, None].astype(features.dtype), shifted)


def shift_nodes(
    features: Float[Array, "B N F"], tree: TreeArrays, before: Float[Array, "B F"]
) -> Float[Array, "B N F"]:
    """The features of each node's parent; the root's parent is the last token, whose features the state holds."""
    parents = tree.ancestors & (tree.depth[..., None, :] == tree.depth[..., :, None] - 1)
    index = jnp.broadcast_to(jnp.argmax(parents, axis=-1), features.shape[:2])
    found = jnp.take_along_axis(features, index[..., None], axis=1)
    return jnp.where(jnp.any(parents, axis=-1)[..., None], found, before[:, None].astype(features.dtype))


def after_rows(features: Float[Array, "B T F"], layout: Layout, before: Float[Array, "B F"]) -> Float[Array, "B F"]:
    """The state after whole rows: the features of each row's last present token; a row without one keeps its state."""
    index = jnp.max(jnp.where(layout.valid, jnp.arange(features.shape[1]), -1), axis=1)
    return after_path(features, index + 1, before)


def after_path(
    features: Float[Array, "B P F"], length: Int[Array, " B"], before: Float[Array, "B F"]
) -> Float[Array, "B F"]:
    """The state after the first `length` tokens of a path, row by row; zero leaves a row as it is."""
    last = jnp.take_along_axis(features, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((length > 0)[:, None], last.astype(before.dtype), before)
