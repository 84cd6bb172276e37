"""Programs that are compiled in advance, on arrays that stand for those to come."""

import jax
import jax.numpy as jnp
import pytest

from lin_jax.decoding.engine.programs import blank, shapes_of


@pytest.mark.parametrize("bound", [True, False])
def test_compiled_in_advance_is_compiled_once(bound):
    """Arrays of a checkpoint are bound to a device; what is compiled for blank ones serves them, too."""
    state = {"numbers": jnp.arange(3.0), "mask": jnp.ones((2, 2), bool)}
    if bound:
        state = jax.device_put(state, jax.devices()[0])
    run = jax.jit(lambda state: {"numbers": state["numbers"] + 1, "mask": ~state["mask"]}, donate_argnums=0)
    empty = blank(shapes_of(state))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.committed), empty) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.committed), state
    )
    run(empty)
    assert run(state)["numbers"].tolist() == [1, 2, 3]
    assert run._cache_size() == 1
