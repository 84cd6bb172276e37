"""Sums in lanes against NumPy in float64, and what keeps them fast: weights that are widened where they are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cells import cells

from lin_jax.models import lane_sums as module
from lin_jax.models.lane_sums import has_lanes, lane_sums, lanes_for
from lin_jax.models.products import ProductPlan, StoredMatrix


def numbers(outputs: int, inputs: int, weights: str) -> jax.Array:
    rng = np.random.default_rng(outputs)
    if weights == "int8":
        return jnp.asarray(rng.integers(-127, 128, (outputs, inputs), dtype=np.int8))
    return jnp.asarray(rng.normal(size=(outputs, inputs))).astype(weights)


@pytest.mark.parametrize(
    ("inputs", "outputs", "weights"),
    cells(
        always=[(512, 33, "int8"), (256, 8, "bfloat16"), (96, 1, "int8")],
        # Sizes of SmolLM, Qwen2 and LLaMA, and a single output.
        thorough=[
            (size, outputs, weights)
            for size in (576, 896, 960, 2048, 11008)
            for outputs in (1, 7, 40)
            for weights in ("int8", "bfloat16")
        ],
    ),
)
def test_sums_are_the_product(inputs, outputs, weights):
    weight = numbers(outputs, inputs, weights)
    for compute in ("float32", "bfloat16"):
        for rows in (1, 2):
            x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, inputs))).astype(compute)
            expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
            found = jax.jit(lane_sums)(x, weight)
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max() * inputs**0.5)


def test_blocks_of_outputs_are_the_whole(monkeypatch):
    x, weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 128)), jnp.float32), numbers(50, 128, "int8")
    whole = lane_sums(x, weight)
    # 16 numbers are held for an output: blocks of 8, and one of 2.
    monkeypatch.setattr(module, "_HELD", 8 * 2 * 16)
    assert lanes_for(128, "int8", 2).turns * lanes_for(128, "int8", 2).vectors == 8
    np.testing.assert_array_equal(lane_sums(x, weight), whole)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_lanes_divide_the_inputs(weights):
    for size in range(32, 2100, 32):
        for rows in (1, 2):
            lanes = lanes_for(size, weights, rows)
            assert lanes is None or size % (lanes.turns * lanes.vectors * lanes.width) == 0
    assert has_lanes(2048, weights)
    assert not has_lanes(2050, weights)
    assert not has_lanes(32, weights)


def test_there_are_none_for_many_rows_and_for_wide_weights():
    assert lanes_for(2048, "int8", 3) is None
    assert not has_lanes(2048, "float32")
    with pytest.raises(ValueError, match="no lanes for 1 rows of 70 inputs with weights in int8"):
        lane_sums(jnp.ones((1, 70)), numbers(4, 70, "int8"))


@pytest.mark.users_settings
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_no_wide_copy_of_the_weights_is_made(weights):
    """Also in a loop, out of which a conversion of all weights could be moved."""

    def steps(x, weight):
        matrix = StoredMatrix(weight, ProductPlan("oi", ((1, "lanes"),)))
        return jax.lax.fori_loop(0, 3, lambda _, x: matrix(x)[:, : x.shape[1]], x)

    weight = jax.ShapeDtypeStruct((2048, 1024), weights)
    compiled = jax.jit(steps).lower(jax.ShapeDtypeStruct((1, 1024), "float32"), weight).compile()
    # What the lanes hold is a quarter of such a copy, or less.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2048 * 1024 / 3
