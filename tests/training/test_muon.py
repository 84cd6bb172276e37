"""Muon against float64 loops over layers in NumPy; which parameters it takes; on a mesh; stopped and resumed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, PartitionSpec
from support.interrupted import lines_of, stopping_after

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.models import Gpt2Config, Llama, LlamaConfig
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.logical_axes import axes_of
from lin_jax.models.params import abstract_model, params_of
from lin_jax.training import MuonConfig, OptimizerConfig, load_model
from lin_jax.training.distributed.partitioning import Shardings
from lin_jax.training.objectives import NextToken
from lin_jax.training.optimizer import build_optimizer, learning_rate, takes_muon
from lin_jax.training.run import train
from pallas_kernels.mesh_axes import FSDP, TENSOR

CONFIG = LlamaConfig(
    vocab_size=23,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    attention=AttentionConfig(group_size=4, kernel_size=5),
)
OPTIMIZER = OptimizerConfig(
    learning_rate=0.01,
    warmup_steps=2,
    weight_decay=0.3,
    max_grad_norm=None,
    muon=MuonConfig(learning_rate=0.02, weight_decay=0.1, momentum=0.9),
)
# Jordan et al. 2024.
QUINTIC = (3.4445, -4.775, 2.0315)


def orthogonalized(matrix):
    """Five Newton-Schulz iterations on one matrix, in the plain form of the publication."""
    a, b, c = QUINTIC
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def muon_by_definition(gradients, start, config, steps):
    """Parameters `[L, I, O]` after a gradient a step: Nesterov momentum without bias, a layer at a time."""
    muon, found = config.muon, []
    for layer, values in enumerate(start):
        values, mean = values.copy(), np.zeros_like(values)
        for step, gradient in enumerate(gradients):
            mean = muon.momentum * mean + (1 - muon.momentum) * gradient[layer]
            ahead = muon.momentum * mean / (1 - muon.momentum ** (step + 2))
            ahead = ahead + (1 - muon.momentum) * gradient[layer] / (1 - muon.momentum ** (step + 1))
            update = orthogonalized(ahead) * 0.2 * max(values.shape) ** 0.5 + muon.weight_decay * values
            rate = float(learning_rate(replace(config, learning_rate=muon.learning_rate), steps, step))
            values = values - rate * update
        found.append(values)
    return np.stack(found)


@pytest.mark.parametrize("shape", [(2, 6, 4), (3, 4, 6)], ids=["tall", "wide"])
def test_each_layers_matrix_is_learnt_as_defined(shape, x64):
    chance = np.random.default_rng(0)
    start, gradients = chance.normal(size=shape), chance.normal(size=(3, *shape))
    optimizer = build_optimizer(OPTIMIZER, 10).transformation
    params = {"layers": {"query": {"kernel": jnp.asarray(start)}}}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"layers": {"query": {"kernel": jnp.asarray(gradient)}}}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    expected = muon_by_definition(gradients, start, OPTIMIZER, 10)
    # The learning rate is a float32.
    np.testing.assert_allclose(params["layers"]["query"]["kernel"], expected, rtol=1e-7)


def test_all_else_learns_as_without_it():
    params = params_of(Llama(CONFIG, rngs=nnx.Rngs(0)))
    chance = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(chance.normal(size=leaf.shape), leaf.dtype), params)
    updated = []
    for config in (OPTIMIZER, replace(OPTIMIZER, muon=None)):
        optimizer = build_optimizer(config, 10).transformation
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        updated.append(flatten_dict(updates))
    taken = {path for path, matrix in flatten_dict(takes_muon(params)).items() if matrix}
    assert {path[-2] for path in taken} == {"query", "key", "value", "out", "gate", "up", "down"}
    for path, update in updated[0].items():
        same = np.allclose(update, updated[1][path], rtol=1e-5, atol=1e-9)
        assert same == (path not in taken), path


def test_an_update_is_of_adamws_size_for_any_shape():
    optimizer = build_optimizer(replace(OPTIMIZER, warmup_steps=0, weight_decay=0.0, muon=MuonConfig()), 10)
    for shape in ((64, 16), (16, 64), (32, 32)):
        params = {"kernel": jnp.zeros(shape)}
        gradient = {"kernel": jax.random.normal(jax.random.key(0), shape)}
        updates, _ = jax.jit(optimizer.transformation.update)(gradient, optimizer.transformation.init(params), params)
        size = float(jnp.sqrt(jnp.mean(jnp.square(updates["kernel"])))) / OPTIMIZER.learning_rate
        # Singular values end between 0.7 and 1.2; all of them one make a root mean square of max(I, O)^-1/2.
        assert 0.2 * 0.7 < size < 0.2 * 1.2


def test_momenta_lie_along_the_mesh_like_their_matrices():
    model = abstract_model(CONFIG)
    mesh = AbstractMesh((2, 2), (FSDP, TENSOR))
    params = params_of(model)
    state = jax.eval_shape(build_optimizer(OPTIMIZER, 10).transformation.init, params)
    shardings = Shardings.of(mesh, axes_of(model), CONFIG)
    found = jax.tree_util.tree_leaves_with_path(shardings.tree(state))
    specs = {jax.tree_util.keystr(path): sharding.spec for path, sharding in found}
    momentum = next(spec for path, spec in specs.items() if ".mu" in path and "'query'" in path)
    assert momentum == shardings.tree(params)["layers"]["layers"]["attention"]["query"]["kernel"].spec
    assert momentum == PartitionSpec(None, (FSDP,), (TENSOR,))


def test_it_takes_adapters_and_joint_projections_and_no_biases():
    config = Gpt2Config(vocab_size=23, hidden_size=8, num_layers=1, num_heads=2, max_positions=16)
    objective = NextToken(config, AdapterConfig(rank=2, target_modules=("qkv",)))
    taken = {path for path, matrix in flatten_dict(takes_muon(objective.shapes())).items() if matrix}
    assert {path[-1] for path in taken} == {"kernel", "lora_a", "lora_b"}
    assert not any("embed" in name for path in taken for name in path)


@pytest.mark.thorough
def test_a_stopped_run_continues_exactly(tiny_run, tmp_path, monkeypatch):
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=2, muon=MuonConfig())
    whole, broken = (tiny_run(tmp_path / name, optimizer=optimizer, steps=6) for name in ("whole", "broken"))
    assert train(whole).status == 0
    with stopping_after(3, monkeypatch):
        assert train(broken).status == 143
    with pytest.raises(
        UserError, match=r"optimizer.muon cannot be left out of a run that goes on; give it as it was, or"
    ):
        train(replace(broken, optimizer=replace(optimizer, muon=None)), resume=True)
    assert train(broken, resume=True).status == 0
    assert lines_of(tmp_path / "broken") == lines_of(tmp_path / "whole")
    ours, theirs = (params_of(load_model(tmp_path / name)[0]) for name in ("broken", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "optimizer.muon.learning_rate is 0.0; give a positive number, or null"),
        ({"weight_decay": -1.0}, "optimizer.muon.weight_decay is -1.0; give 0 or more, or null"),
        ({"momentum": 1.0}, "optimizer.muon.momentum is 1.0; give 0 or more, and less than 1"),
        ({"iterations": 0}, "optimizer.muon.iterations is 0; give 1 or more"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(UserError, match=message):
        MuonConfig(**values)
