"""Compiles the operations with the real TPU compiler, in a process of its own: `compile_for_tpu.py TOPOLOGY [CASES]`.

Of windows and memories, a case fewer is compiled, but one at least; of trees, two beside a single case, all otherwise.
Prints a line for each program; a program that the compiler refuses ends the process with its message.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.augmented_attention import PackedRows, PriorContext, augmented_attention
from pallas_kernels.implementations import compiling_for
from pallas_kernels.linear_attention import Memory, linear_attention
from pallas_kernels.path_commit import commit_path
from pallas_kernels.tree_verify import verify_tree
from pallas_kernels.types import AugmentedState, Nodes, TreeArrays, WindowedState
from pallas_kernels.window_verify import verify_window
from pallas_kernels.windowed_attention import FeatureWeights, WindowedPrior, windowed_attention

# Rows, tokens, query heads, key/value heads, sizes of keys and values, type, with documents and a start.
CASES = [
    (2, 1000, 8, 4, 64, 64, jnp.bfloat16, True),
    (1, 8192, 8, 8, 128, 128, jnp.bfloat16, False),
    (1, 63, 4, 4, 64, 64, jnp.float32, False),
    (1, 65, 4, 1, 32, 32, jnp.float32, True),
    (1, 500, 2, 2, 256, 256, jnp.bfloat16, True),
]
# Likewise, with the number of features, their map, and the tokens of a sliding window or None.
WINDOWED = [
    (2, 1000, 8, 4, 64, 64, jnp.bfloat16, True, 128, "hedgehog", 100),
    (1, 8192, 8, 8, 128, 128, jnp.bfloat16, False, 256, "exponential", None),
    (1, 63, 4, 4, 64, 64, jnp.float32, False, 64, "exponential", 16),
    (1, 500, 4, 1, 32, 32, jnp.float32, True, 64, "exponential", None),
    (1, 1000, 2, 2, 256, 256, jnp.bfloat16, True, 256, "hedgehog", None),
]
# Rows, nodes, query heads, key/value heads, sizes of keys and values, type, with a tree for each row.
TREES = [
    (1, 1, 32, 32, 128, 128, jnp.bfloat16, False),
    (8, 64, 32, 32, 128, 128, jnp.bfloat16, False),
    (3, 26, 8, 4, 64, 64, jnp.float32, True),
]


def main(topology: str, cases: int = len(CASES)) -> None:
    """Compiles so many cases, forward and backward, and trees."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())

    def struct(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for rows, tokens, heads, kv_heads, key_size, value_size, dtype, placed in CASES[:cases]:
        queries, keys, values = (
            struct((rows, tokens, *tail), dtype)
            for tail in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
        )
        packed = prior = None
        if placed:
            packed = PackedRows(*(struct((rows, tokens)),) * 2, *(struct((rows,)),) * 3)
            prior = PriorContext(
                struct((rows, kv_heads, key_size, value_size), jnp.float32),
                struct((rows, 64, kv_heads, key_size), dtype),
                struct((rows, 64, kv_heads, value_size), dtype),
                struct((rows, 64)),
                struct((rows, 64), bool),
            )

        def loss(arrays, packed, prior):
            queries, keys, values, alpha, taps = arrays
            call = partial(augmented_attention, group_size=64, alpha=alpha, taps=taps, packed=packed)
            outputs, memory = call(queries, keys, values, prior=prior)
            return jnp.sum(jnp.square(outputs.astype(jnp.float32))) + jnp.sum(memory)

        arrays = queries, keys, values, struct((heads,), jnp.float32), struct((heads, 32), jnp.float32)
        for name, program in (("forward", loss), ("backward", jax.grad(loss))):
            kernels = compiled_kernels(program, arrays, packed, prior)
            print(f"{topology} {queries.shape} {keys.shape} {dtype.__name__} {name}: {kernels} kernels", flush=True)

        def linear_loss(arrays, segment_ids, start, decay, floor=0.0 if placed else None):
            outputs, memory = linear_attention(*arrays, decay=decay, floor=floor, segment_ids=segment_ids, start=start)
            return jnp.sum(jnp.square(outputs.astype(jnp.float32))) + jnp.sum(memory.values) + jnp.sum(memory.keys)

        segment_ids = decay = start = None
        if placed:
            segment_ids, decay = struct((rows, tokens)), struct((kv_heads,), jnp.float32)
            shape = (rows, kv_heads, key_size)
            start = Memory(struct((*shape, value_size), jnp.float32), struct(shape, jnp.float32))
        for name, program in (("forward", linear_loss), ("backward", jax.grad(linear_loss))):
            kernels = compiled_kernels(program, (queries, keys, values), segment_ids, start, decay)
            print(
                f"{topology} {queries.shape} {keys.shape} {dtype.__name__} linear {name}: {kernels} kernels", flush=True
            )

    for case in WINDOWED[: cases - 1] or WINDOWED[2:3]:
        _windowed(topology, struct, *case)

    for rows, nodes, heads, kv_heads, key_size, value_size, dtype, own in TREES if cases > 1 else TREES[::2]:
        shape = (rows,) if own else ()
        tree = TreeArrays(struct((*shape, nodes)), struct((*shape, nodes, nodes), bool))
        state = AugmentedState(
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
        kernels = compiled_kernels(_verify, queries, keys, values, tree, state, alpha, taps)
        print(f"{topology} {queries.shape} {keys.shape} {dtype.__name__} verify: {kernels} kernels", flush=True)
        kernels = compiled_kernels(_commit, state, Nodes(keys, values), struct((rows,)))
        print(f"{topology} {keys.shape} {dtype.__name__} commit: {kernels} kernels", flush=True)
        _verified_window(topology, struct, rows, nodes, heads, kv_heads, key_size, value_size, dtype, own)


def _verified_window(topology, struct, rows, nodes, heads, kv_heads, key_size, value_size, dtype, own):
    """Compiles the verification of a tree by a window and a memory; trees for each row decay, and have sinks."""
    wide, shape = partial(struct, dtype=jnp.float32), (rows,) if own else ()
    tree = TreeArrays(struct((*shape, nodes)), struct((*shape, nodes, nodes), bool))
    ring = [struct((rows, 128 - own, kv_heads, size), dtype) for size in (key_size, value_size)]
    held, decays = (wide((rows, 127, kv_heads)), wide((rows, nodes, kv_heads))) if own else (None, None)
    memory = wide((rows, kv_heads, 2 * key_size, value_size + 1))
    sinks = [struct((rows, 4, kv_heads, size), dtype) for size in (key_size, value_size)] if own else ()
    state = WindowedState(memory, *ring, held, None, struct((rows,)), *sinks)
    directions = key_size if own else 2 * key_size
    biases = (None, None) if own else (wide((heads, directions)), wide((kv_heads, directions)))
    weights = FeatureWeights(wide((heads, directions, key_size)), wide((kv_heads, directions, key_size)), *biases)
    options = {"features": "hedgehog" if own else "exponential", "tokens": 128 if own else None}

    def verify(nodes, weights, tree, state, balance, decays):
        named = options | {"scale": key_size**-0.5, "balance": balance, "log_decays": decays}
        return verify_window(*nodes, weights, tree, state, **named)

    queries, keys, values = (
        struct((rows, nodes, *tail), dtype)
        for tail in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
    )
    kernels = compiled_kernels(verify, (queries, keys, values), weights, tree, state, wide((heads,)), decays)
    print(f"{topology} {queries.shape} {keys.shape} {dtype.__name__} windowed verify: {kernels} kernels", flush=True)


def _windowed(topology, struct, rows, tokens, heads, kv_heads, key_size, value_size, dtype, placed, size, name, window):
    """Compiles attention over a window and a memory, forward and backward; placed rows decay, and have sinks."""
    wide = partial(struct, dtype=jnp.float32)
    directions = size // 2 if name == "hedgehog" else size
    biases = (wide((heads, size)), wide((kv_heads, size))) if name == "exponential" else (None, None)
    weights = FeatureWeights(wide((heads, directions, key_size)), wide((kv_heads, directions, key_size)), *biases)
    queries, keys, values = (
        struct((rows, tokens, *tail), dtype)
        for tail in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
    )
    packed = prior = decays = None
    if placed:
        packed = PackedRows(*(struct((rows, tokens)),) * 2, *(struct((rows,)),) * 3)
        memory = Memory(wide((rows, kv_heads, size, value_size)), wide((rows, kv_heads, size)))
        held = [struct((rows, 64, kv_heads, each), dtype) for each in (key_size, value_size)]
        sinks = [struct((rows, 4, kv_heads, each), dtype) for each in (key_size, value_size)]
        prior = WindowedPrior(memory, *held, wide((rows, 64, kv_heads)), struct((rows, 64)), *sinks)
        decays = wide((rows, tokens, kv_heads))

    def loss(arrays, packed, prior):
        queries, keys, values, weights, balance, decays = arrays
        outputs, memory = windowed_attention(
            queries,
            keys,
            values,
            weights,
            features=name,
            tokens=window,
            sinks=4 if placed else 0,
            scale=key_size**-0.5,
            balance=balance,
            log_decays=decays,
            packed=packed,
            prior=prior,
        )
        return jnp.sum(jnp.square(outputs.astype(jnp.float32))) + sum(map(jnp.sum, memory))

    arrays = queries, keys, values, weights, wide((heads,)), decays
    for label, program in (("forward", loss), ("backward", jax.grad(loss))):
        kernels = compiled_kernels(program, arrays, packed, prior)
        print(
            f"{topology} {queries.shape} {keys.shape} {dtype.__name__} windowed {label}: {kernels} kernels", flush=True
        )


def _commit(state, path, length):
    return commit_path(state, path, length)


def _verify(queries, keys, values, tree, state, alpha, taps):
    return verify_tree(queries, keys, values, tree, state, alpha=alpha, taps=taps)


def compiled_kernels(program, *arguments):
    """How many kernels a program holds once it is compiled."""
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(*arguments)
    return lowered.compile().as_text().count('custom_call_target="tpu_custom_call"')


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
