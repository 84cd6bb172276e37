"""Operations on a mesh of eight devices, in a process of its own; prints the largest difference from one device each.

python tests/support/on_a_mesh.py packed|whole
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.augmented_attention import PackedRows, augmented_attention
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.windowed_attention import FeatureWeights, windowed_attention

ROWS, TOKENS, HEADS, SIZE = 4, 40, 4, 16
AXES = ("data", "fsdp", "tensor")


def main(documents):
    """Values and gradients of the operations, with documents or without."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), AXES)
    keys = jax.random.split(jax.random.key(0), 3)
    rows = [jax.random.normal(key, (ROWS, TOKENS, n, SIZE)) for key, n in zip(keys, (HEADS, 2, 2), strict=True)]
    alpha, taps = jnp.linspace(0.1, 0.5, HEADS), jnp.linspace(0, 0.2, HEADS * 4).reshape(HEADS, 4)
    ones = jnp.ones((ROWS, TOKENS), jnp.int32)
    packed = PackedRows(ones, jnp.cumsum(ones, 1) - 1, ones[:, 0], ones[:, 0], ones.sum(1))

    def augmented(implementation, packed):
        def total(queries, keys, values, alpha, taps):
            options = {"group_size": 8, "alpha": alpha, "taps": taps, "packed": packed}
            outputs = augmented_attention(queries, keys, values, **options, implementation=implementation)[0]
            return jnp.sum(jnp.square(outputs))

        return total, (*rows, alpha, taps)

    def linear(implementation, segment_ids):
        def total(*rows):
            outputs, memory = linear_attention(*rows, decay=jnp.array([0.9, 0.8]), segment_ids=segment_ids, **chosen)
            return jnp.sum(jnp.square(outputs)) + jnp.sum(memory.values)

        chosen = {"implementation": implementation}
        return total, rows

    def windowed(implementation, packed):
        def total(queries, keys, values, asked, held, balance, decays):
            options = {"features": "exponential", "scale": 0.25, "group_size": 8, "packed": packed}
            options |= {"balance": balance, "log_decays": decays}
            # There is none in XLA: the same program on one device.
            weights, name = FeatureWeights(asked, held), implementation.replace("xla", "tpu_interpreted")
            outputs, memory = windowed_attention(queries, keys, values, weights, **options, implementation=name)
            return jnp.sum(jnp.square(outputs)) + jnp.sum(memory.values)

        maps = [jax.random.normal(key, (n, 8, SIZE)) / 4 for key, n in zip(keys, (HEADS, 2), strict=False)]
        return total, (*rows, *maps, alpha, -jax.random.uniform(keys[2], (ROWS, TOKENS, 2)) / 20)

    whole = (augmented, None), (linear, None)
    for build, layout in ((augmented, packed), (linear, ones), (windowed, packed)) if documents else whole:
        total, arrays = build("xla", layout)
        expected = jax.tree.leaves(jax.jit(jax.value_and_grad(total, range(len(arrays))))(*arrays))
        total, arrays = build("tpu_interpreted", layout)
        with jax.set_mesh(mesh):
            here = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
            arrays = [jax.device_put(each, here) if each.ndim == 4 else each for each in arrays]
            found = jax.jit(jax.value_and_grad(total, range(len(arrays))))(*arrays)
        assert found[1][0].sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor"), found[1][0].sharding
        pairs = zip(jax.tree.leaves(found), expected, strict=True)
        print(max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs))


if __name__ == "__main__":
    main(documents=sys.argv[1] == "packed")
