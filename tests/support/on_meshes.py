"""Losses and gradients on meshes of eight devices, in a process of its own; prints the largest differences from one.

    python tests/support/on_meshes.py [--models llama ...] [--meshes fsdp ...]

A line for every model and mesh: names, how many parameters are cut up, and the largest difference of the loss and of
any gradient, relative to the largest number of that gradient.
"""

import argparse
import json
import os

if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.losses.cross_entropy import shifted_targets, token_sums
from lin_jax.models import T5, Flash, FlashConfig, Gpt2, Gpt2Config, Llama, LlamaConfig, T5Config
from lin_jax.models.logical_axes import axes_of
from lin_jax.models.params import filled, params_of
from lin_jax.training.distributed.mesh import MeshConfig, make_mesh
from lin_jax.training.distributed.partitioning import Shardings

ATTENTION = AttentionConfig("augmented", group_size=8, kernel_size=7, initial_alpha=0.3)
WINDOWED = AttentionConfig("exponential+window+convolution", group_size=8, kernel_size=7, features=12, decay="token")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2}
MODELS = {
    "llama": (Llama, LlamaConfig(**SIZES, intermediate_size=48, num_heads=4, num_kv_heads=2, attention=ATTENTION)),
    "mix": (
        Llama,
        LlamaConfig(
            **{**SIZES, "num_layers": 4},
            intermediate_size=48,
            num_heads=4,
            num_kv_heads=2,
            attention=replace(ATTENTION, pattern=("augmented", {"name": "softmax", "window": 6})),
        ),
    ),
    "windowed": (Llama, LlamaConfig(**SIZES, intermediate_size=48, num_heads=4, num_kv_heads=2, attention=WINDOWED)),
    "gpt2": (Gpt2, Gpt2Config(**SIZES, num_heads=4, max_positions=64, attention=ATTENTION)),
    "flash": (Flash, FlashConfig(**SIZES, query_key_size=16, attention=ATTENTION)),
    "t5": (
        T5,
        T5Config(
            **SIZES,
            head_dim=8,
            num_heads=4,
            intermediate_size=48,
            encoder_attention=ATTENTION,
            decoder_attention=ATTENTION,
            cross_attention=AttentionConfig("flash_global", group_size=8),
        ),
    ),
}
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(data=4, tensor=2),
    "sequence": MeshConfig(data=2, sequence=4),
    "mixed": MeshConfig(fsdp=2, tensor=2, sequence=2),
    "whole": MeshConfig(tensor=4),
}
ROWS, TOKENS = 8, 64


def batch_of(packed):
    """Rows of documents that end anywhere, the last with padding; or rows that are whole."""
    chance = np.random.default_rng(0)
    tokens = chance.integers(3, 64, (ROWS, TOKENS + 1)).astype(np.int32)
    if not packed:
        return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    borders = np.sort(chance.integers(1, TOKENS, (ROWS, 2)), axis=1)
    segment_ids = 1 + sum(np.arange(TOKENS + 1) >= border[:, None] for border in borders.T).astype(np.int32)
    segment_ids[-1, -9:] = 0
    return {"tokens": tokens, "segment_ids": segment_ids}


def loss_of(model, batch):
    """Mean cross entropy of the next token; T5 reads the same tokens as the text to condition on."""
    inputs, segment_ids = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    logits = model(inputs, inputs) if isinstance(model, T5) else model(inputs, segment_ids)
    targets = shifted_targets(batch, 1)
    sums = token_sums(logits[..., None, :], type(targets)(*(part[..., None] for part in targets)))
    return sums.loss[0] / sums.tokens[0]


def difference(one, other):
    """The largest of two arrays, relative to the largest number of the second."""
    return float(np.abs(one - other).max() / (np.abs(other).max() + 1e-12))


def main():
    """Models and meshes that are named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=list(MESHES))
    options = parser.parse_args()
    for name in options.models:
        kind, config = MODELS[name]
        model = kind(config, rngs=nnx.Rngs(0))
        shapes = nnx.eval_shape(lambda kind=kind, config=config: kind(config, rngs=nnx.Rngs(0)))
        # Filters begin at zero: without noise their neighbours' gradients would show nothing of them.
        noise = np.random.default_rng(1).standard_normal
        params = jax.tree.map(lambda leaf, noise=noise: leaf + 0.02 * noise(leaf.shape), params_of(model))
        params = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
        batch = batch_of(packed=name != "t5")

        def value(params, batch, shapes=shapes):
            return loss_of(filled(shapes, params), batch)

        both = jax.jit(jax.value_and_grad(value))
        expected = jax.device_get(both(params, batch))
        for mesh_name in options.meshes:
            # One head on a device of its own, or all devices.
            mesh_config, devices = MESHES[mesh_name], jax.devices()[: 4 if mesh_name == "whole" else 8]
            mesh = make_mesh(mesh_config, devices)
            shardings = Shardings.of(mesh, axes_of(shapes), config)
            shardings.check(ROWS, 1, TOKENS)
            with jax.set_mesh(mesh):
                placed = shardings.place(params)
                where = (shardings.whole, shardings.tree(params))
                sharded = jax.jit(jax.value_and_grad(value), out_shardings=where)
                found = sharded(placed, shardings.batch(batch))
            cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
            report = {
                "model": name,
                "mesh": mesh_name,
                "cut": cut,
                "loss": abs(float(found[0]) - float(expected[0])) / float(expected[0]),
                "gradient": max(jax.tree.leaves(jax.tree.map(difference, jax.device_get(found[1]), expected[1]))),
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
