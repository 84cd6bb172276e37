"""Meshes by configuration, what lies along them, and how processes find each other."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.logical_axes import axes_of
from lin_jax.models.lora import add_lora
from lin_jax.training.distributed.launch import Launch
from lin_jax.training.distributed.mesh import MeshConfig, make_mesh
from lin_jax.training.distributed.partitioning import Shardings

CONFIG = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=8, num_kv_heads=2)


def placement_on(model=None, **sizes):
    model = model or nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    named = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, **sizes}
    mesh = AbstractMesh(tuple(named.values()), tuple(named))
    return Shardings.of(mesh, axes_of(model), CONFIG)


def spec(shardings, *path, shape):
    return shardings.parameter(path, shape).spec


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 4, 1, 1)),
        (MeshConfig(tensor=2, sequence=2), 8, (2, 1, 2, 2)),
        (MeshConfig(data=1, fsdp=8), 8, (1, 8, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1, 1)),
    ],
)
def test_data_takes_the_devices_that_are_left(config, devices, expected):
    assert tuple(config.sizes(devices).values()) == expected


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(data=4, fsdp=4), MeshConfig(tensor=16)])
def test_devices_that_cannot_be_laid_out_are_named(config):
    with pytest.raises(UserError, match="does not make 8 devices; choose sizes whose product is 8"):
        config.sizes(8)


def test_sizes_are_positive():
    with pytest.raises(UserError, match=r"mesh.tensor is 0; give 1 or more"):
        MeshConfig(tensor=0)


def test_parameters_lie_along_the_axes_that_their_dimensions_name():
    shardings = placement_on(fsdp=4, tensor=2)
    query = ("layers", "layers", "attention", "query", "kernel")
    assert spec(shardings, *query, shape=(3, 32, 32)) == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert spec(shardings, "embed", "embedding", shape=(96, 32)) == PartitionSpec(("tensor",), ("fsdp",))
    down = ("layers", "layers", "feed_forward", "down", "kernel")
    assert spec(shardings, *down, shape=(3, 64, 32)) == PartitionSpec(None, ("tensor",), ("fsdp",))
    assert spec(shardings, "norm", "scale", shape=(32,)) == PartitionSpec(None)


def test_heads_are_never_cut_apart():
    """Two key/value heads lie along no axis of four, though their columns could be cut so."""
    shardings = placement_on(tensor=4)
    key = ("layers", "layers", "attention", "key", "kernel")
    assert spec(shardings, *key, shape=(3, 32, 8)) == PartitionSpec(None, None, None)


def test_what_does_not_divide_stays_whole():
    shardings = placement_on(fsdp=5)
    assert spec(shardings, "embed", "embedding", shape=(96, 32)) == PartitionSpec(None, None)


def test_moments_and_adapters_lie_like_their_parameters():
    adapted = nnx.eval_shape(_adapted)
    shardings = placement_on(adapted, fsdp=2)
    leaf = jax.ShapeDtypeStruct((3, 32, 4), "float32")
    tree = {"mu": {"layers": {"layers": {"attention": {"query": {"update": {"lora_a": leaf}}}}}}}
    assert jax.tree.leaves(shardings.tree(tree))[0].spec == PartitionSpec(None, ("fsdp",), None)


def test_a_module_lies_like_its_parameters():
    """A teacher is handed on as a module."""
    model = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    shardings = placement_on(model, fsdp=4)
    found = shardings.tree({"teacher": model})["teacher"]
    specs = {path[-2:]: where.spec for path, where in _leaves(found)}
    assert specs["query", "kernel"] == PartitionSpec(None, ("fsdp",), None)
    assert specs["embed", "embedding"] == PartitionSpec(None, ("fsdp",))


def _leaves(module):
    flat = jax.tree_util.tree_leaves_with_path(module)
    return [
        (tuple(str(part.name if hasattr(part, "name") else part.key) for part in path[:-1]), leaf)
        for path, leaf in flat
    ]


def _adapted():
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    add_lora(model, 4, 8.0, targets=("query",), rngs=nnx.Rngs(0))
    return model


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 3},
            "batch_size 8 is not a multiple of training.gradient_accumulation 1 times mesh.data x mesh.fsdp 3",
        ),
        ({"sequence": 5}, "sequence_length 64 is not a multiple of mesh.sequence 5"),
        ({"tensor": 3}, "num_heads 8 is not a multiple of mesh.tensor 3"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        placement_on(**sizes).check(8, 1, 64)


def test_a_mesh_of_this_machine_holds_whole_batches():
    mesh = make_mesh(MeshConfig())
    assert isinstance(mesh, Mesh)
    shardings = Shardings.of(mesh, {}, CONFIG)
    assert shardings.rows(8) == (0, 8)
    batch = shardings.batch({"tokens": np.arange(8).reshape(8, 1)})
    np.testing.assert_array_equal(batch["tokens"], np.arange(8).reshape(8, 1))


def test_options_of_a_launch_belong_together():
    with pytest.raises(UserError, match="belong together; give all three"):
        Launch(coordinator="127.0.0.1:1234")
    with pytest.raises(UserError, match=r"launch.process is 2; give a number from 0 to 1"):
        Launch(coordinator="127.0.0.1:1234", processes=2, process=2)


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_a_cluster_is_known_by_its_signs(environment, joins, monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *options: asked.append(options))
    Launch().join()
    assert asked == ([(None, None, None)] if joins else [])
    Launch(cluster="never").join()
    assert len(asked) == joins
    Launch(coordinator="127.0.0.1:1234", processes=2, process=1).join()
    assert asked[-1] == ("127.0.0.1:1234", 2, 1)


def test_processes_that_do_not_find_each_other_are_told_what_to_give(monkeypatch):
    def fail(*options):
        raise RuntimeError("deadline exceeded\nlong story")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"do not find each other: deadline exceeded; give --launch.coordinator"):
        Launch(cluster="always").join()
