"""Compiles the operations with the real TPU compiler, in a process of its own: `compile_for_tpu.py TOPOLOGY [CASES]`.

Prints a line for each program; a program that the compiler refuses ends the process with its message.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.augmented_attention import Placement, Start, augmented_attention
from pallas_kernels.implementations import compiling_for
from pallas_kernels.linear_attention import Memory, linear_attention
from pallas_kernels.path_commit import commit_path
from pallas_kernels.tree_verify import Held, Tree, verify_tree

# Rows, tokens, query heads, key/value heads, sizes of keys and values, type, with documents and a start.
CASES = [
    (2, 1000, 8, 4, 64, 64, jnp.bfloat16, True),
    (1, 8192, 8, 8, 128, 128, jnp.bfloat16, False),
    (1, 63, 4, 4, 64, 64, jnp.float32, False),
    (1, 65, 4, 1, 32, 32, jnp.float32, True),
    (1, 500, 2, 2, 256, 256, jnp.bfloat16, True),
]
# Rows, nodes, query heads, key/value heads, sizes of keys and values, type, with a tree for each row.
TREES = [
    (1, 1, 32, 32, 128, 128, jnp.bfloat16, False),
    (8, 64, 32, 32, 128, 128, jnp.bfloat16, False),
    (3, 26, 8, 4, 64, 64, jnp.float32, True),
]


def main(topology: str, cases: int = len(CASES)) -> None:
    """Compiles so many cases, forward and backward, and all trees."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())

    def struct(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for rows, tokens, heads, kv_heads, key_size, value_size, dtype, placed in CASES[:cases]:
        queries, keys, values = (
            struct((rows, tokens, *tail), dtype)
            for tail in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
        )
        placement = start = None
        if placed:
            placement = Placement(*(struct((rows, tokens)),) * 2, *(struct((rows,)),) * 3)
            start = Start(
                struct((rows, kv_heads, key_size, value_size), jnp.float32),
                struct((rows, 64, kv_heads, key_size), dtype),
                struct((rows, 64, kv_heads, value_size), dtype),
                struct((rows, 64)),
                struct((rows, 64), bool),
            )

        def loss(arrays, placement, start):
            queries, keys, values, alpha, taps = arrays
            call = partial(augmented_attention, group_size=64, alpha=alpha, taps=taps, placement=placement)
            outputs, memory = call(queries, keys, values, start=start)
            return jnp.sum(jnp.square(outputs.astype(jnp.float32))) + jnp.sum(memory)

        arrays = queries, keys, values, struct((heads,), jnp.float32), struct((heads, 32), jnp.float32)
        for name, program in (("forward", loss), ("backward", jax.grad(loss))):
            kernels = compiled_kernels(program, arrays, placement, start)
            print(f"{topology} {queries.shape} {keys.shape} {dtype.__name__} {name}: {kernels} kernels", flush=True)

        def linear_loss(arrays, documents, start, decay, floor=0.0 if placed else None):
            outputs, memory = linear_attention(*arrays, decay=decay, floor=floor, documents=documents, start=start)
            return jnp.sum(jnp.square(outputs.astype(jnp.float32))) + jnp.sum(memory.values) + jnp.sum(memory.keys)

        documents = decay = start = None
        if placed:
            documents, decay = struct((rows, tokens)), struct((kv_heads,), jnp.float32)
            shape = (rows, kv_heads, key_size)
            start = Memory(struct((*shape, value_size), jnp.float32), struct(shape, jnp.float32))
        for name, program in (("forward", linear_loss), ("backward", jax.grad(linear_loss))):
            kernels = compiled_kernels(program, (queries, keys, values), documents, start, decay)
            print(
                f"{topology} {queries.shape} {keys.shape} {dtype.__name__} linear {name}: {kernels} kernels", flush=True
            )

    for rows, nodes, heads, kv_heads, key_size, value_size, dtype, own in TREES:
        shape = (rows,) if own else ()
        tree = Tree(struct((*shape, nodes)), struct((*shape, nodes, nodes), bool))
        held = Held(
            struct((rows, kv_heads, key_size, value_size), jnp.float32),
            struct((rows, 64, kv_heads, key_size), dtype),
            struct((rows, 64, kv_heads, value_size), dtype),
            struct((rows, 31, kv_heads, value_size), dtype),
            struct((rows,)),
        )
        queries, keys, values = (
            struct((rows, nodes, *tail), dtype)
            for tail in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
        )
        alpha, taps = struct((heads,), jnp.float32), struct((heads, 32), jnp.float32)
        kernels = compiled_kernels(_verify, queries, keys, values, tree, held, alpha, taps)
        print(f"{topology} {queries.shape} {keys.shape} {dtype.__name__} verify: {kernels} kernels", flush=True)
        kernels = compiled_kernels(_commit, held, keys, values, struct((rows,)))
        print(f"{topology} {keys.shape} {dtype.__name__} commit: {kernels} kernels", flush=True)


def _commit(held, keys, values, length):
    return commit_path(held, keys, values, length)


def _verify(queries, keys, values, tree, held, alpha, taps):
    return verify_tree(queries, keys, values, tree, held, alpha=alpha, taps=taps)


def compiled_kernels(program, *arguments):
    """How many kernels a program holds once it is compiled."""
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(*arguments)
    return lowered.compile().as_text().count('custom_call_target="tpu_custom_call"')


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
