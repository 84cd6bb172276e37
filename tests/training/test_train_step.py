from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import some_of

from lin_jax.attention import AttentionConfig
from lin_jax.models import Llama, LlamaConfig, PathHead
from lin_jax.models.params import params_of
from lin_jax.training import OptimizerConfig
from lin_jax.training.distributed.mesh import MeshConfig, make_mesh
from lin_jax.training.objectives import Medusa, NextToken
from lin_jax.training.optimizer import build_optimizer, decays, learning_rate
from lin_jax.training.train_step import TrainState, accumulate_gradients, make_step
from pallas_kernels.implementations import targets_single_cpu

CONFIG = LlamaConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    attention=AttentionConfig(group_size=4, kernel_size=5, initial_alpha=0.5),
)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0)


def batch(rows=6, length=13):
    """Rows with very different numbers of targets, so that a mean of means would show."""
    chance = np.random.default_rng(0)
    segment_ids = np.sort(chance.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    for row in range(rows):
        segment_ids[row, length - 2 * row :] = 0
    return {"tokens": chance.integers(0, 23, (rows, length)).astype(np.int32), "segment_ids": segment_ids}


@partial(jax.jit, static_argnums=(0, 1))
def gradients(objective, parts, params, frozen, rows):
    return accumulate_gradients(objective, parts, params, frozen, rows)


def start(objective, base=None):
    params = objective.start(jax.random.key(0), base)
    return TrainState.new(params, build_optimizer(OPTIMIZER, 10), jax.random.key(1)), objective.frozen(base)


def test_accumulated_parts_are_the_gradient_of_the_whole_mean():
    objective = NextToken(CONFIG)
    state, frozen = start(objective)
    loss, sums, gradient = gradients(objective, 3, state.params, frozen, batch())

    def mean(params):
        whole = objective.sums(params, frozen, batch())
        return whole.loss[0] / whole.tokens[0], whole

    (expected, whole), expected_gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(state.params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(sums.tokens, whole.tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected_gradient)


@pytest.mark.thorough
def test_accumulation_weighs_every_head_by_its_own_targets():
    objective = Medusa(CONFIG, 3, 0.8)
    state, frozen = start(objective, Llama(CONFIG, rngs=nnx.Rngs(0)))
    whole, sums, gradient = gradients(objective, 1, state.params, frozen, batch())
    loss, part_sums, part_gradient = gradients(objective, 6, state.params, frozen, batch())
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(whole, np.dot([1.0, 0.8, 0.64], sums.loss / sums.tokens), rtol=1e-5)
    np.testing.assert_array_equal(part_sums.tokens, sums.tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), part_gradient, gradient)


def test_a_run_on_one_device_computes_what_a_program_without_a_mesh_does():
    # Runs lie along a mesh, of one device too: what is written for a single CPU counts there as well.
    objective = NextToken(CONFIG)
    params = jax.eval_shape(partial(objective.start, jax.random.key(0)), None)

    def program():
        traced = jax.make_jaxpr(partial(accumulate_gradients, objective, 1))(params, {}, batch())
        return [str(each.primitive) for each in jax.tree.leaves(traced.jaxpr.eqns)]

    alone = program()
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert targets_single_cpu()
        assert program() == alone
    if len(jax.devices()) > 1:
        with jax.set_mesh(make_mesh(MeshConfig())):
            assert not targets_single_cpu()


@pytest.fixture(scope="module")
def step():
    return make_step(NextToken(CONFIG), build_optimizer(OPTIMIZER, 10), 2)


def test_a_step_lowers_the_loss(step):
    state, frozen = start(NextToken(CONFIG))
    losses = []
    for _ in range(8):
        state, figures = step(state, frozen, batch())
        losses.append(float(figures.loss))
    assert figures.health.finite
    assert int(state.step) == 8
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_without_finite_numbers_nothing_changes(step, bad):
    state, frozen = start(NextToken(CONFIG))
    state, _ = step(state, frozen, batch())
    state.params["head"]["kernel"] = state.params["head"]["kernel"].at[0, 0].set(bad)
    before = jax.tree.map(np.array, (state.params, state.optimizer))
    state, figures = step(state, frozen, batch())
    assert not figures.health.finite
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer), before)


def test_the_old_state_gives_its_memory_away(step):
    state, frozen = start(NextToken(CONFIG))
    step(state, frozen, batch())
    assert state.params["head"]["kernel"].is_deleted()


def test_weight_decay_acts_on_matrices_alone():
    params = params_of(nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))))
    decaying = decays(params)
    assert decaying["embed"]["embedding"]
    assert decaying["head"]["kernel"]
    layers = decaying["layers"]["layers"]
    assert layers["attention"]["query"]["kernel"]
    assert layers["feed_forward"]["down"]["kernel"]
    assert not layers["attention_norm"]["scale"]
    assert not decaying["norm"]["scale"]
    assert not layers["attention"]["mixer"]["alpha"]
    assert not layers["attention"]["mixer"]["convolution"]["taps"]
    medusa = decays({"weight": 0, "bias": 0, "output": 0})
    assert medusa == {"weight": True, "bias": False, "output": True}
    path = decays(params_of(PathHead(16, 8, 23, rngs=nnx.Rngs(0))))
    matrices = dict.fromkeys(("projection", "embedding", "inner", "outer", "output"), True)
    assert path == matrices | {"bias": False, "norm": {"scale": False}}


def test_weight_decay_and_clipping_do_what_they_say():
    optimizer = build_optimizer(replace(OPTIMIZER, weight_decay=0.5, max_grad_norm=1.0, beta1=0.0, beta2=0.0), 10)
    params = {"kernel": jnp.full((2, 2), 4.0), "scale": jnp.full((2,), 4.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.transformation.update(zero, optimizer.transformation.init(params), params)
    rate = float(learning_rate(replace(OPTIMIZER), 10, 0))
    np.testing.assert_allclose(updates["kernel"], -rate * 0.5 * 4.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0)


def test_learning_rate_rises_then_falls_along_a_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [float(learning_rate(config, 20, step)) for step in range(20)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    expected = [2.0 * (0.1 + 0.45 * (1 + np.cos(np.pi * (step - 3) / 16))) for step in range(4, 20)]
    np.testing.assert_allclose(rates[4:], expected, rtol=1e-5)
    np.testing.assert_allclose(rates[-1], 0.2, rtol=1e-5)
    assert float(learning_rate(replace(config, warmup_steps=0), 1, 0)) == pytest.approx(0.2)


@pytest.mark.parametrize(("dtype", "param_dtype"), some_of([("bfloat16", "float32"), ("float32", "bfloat16")], 1))
def test_low_precision_keeps_wide_moments(dtype, param_dtype):
    objective = NextToken(replace(CONFIG, dtype=dtype, param_dtype=param_dtype))
    state, frozen = start(objective)
    step = make_step(objective, build_optimizer(OPTIMIZER, 10), 2)
    losses = []
    for _ in range(6):
        state, figures = step(state, frozen, batch())
        losses.append(float(figures.loss))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(param_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert figures.loss.dtype == jnp.float32
    assert losses[-1] < losses[0]


@pytest.mark.thorough
def test_float64_is_float64_throughout():
    with jax.enable_x64(True):
        objective = NextToken(replace(CONFIG, dtype="float64", param_dtype="float64"))
        state, frozen = start(objective)
        sums = jax.jit(objective.sums)(state.params, frozen, batch())
        state, figures = make_step(objective, build_optimizer(OPTIMIZER, 10), 3)(state, frozen, batch())
        assert figures.loss.dtype == jnp.float64
        np.testing.assert_allclose(figures.loss, sums.loss[0] / sums.tokens[0], rtol=1e-13)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float64")}
