"""Measures how kernels should cut their work on the device at hand, and writes it into the table of tiles.

    python -m pallas_kernels.tune [--sizes 64 128] [--dtypes bfloat16] [--operations augmented_attention ...]

Kernel after kernel, every way to cut is timed inside its operation, forward and backward, with all others as the table
has them; the fastest is kept. What cannot be compiled for the device is passed over.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from pallas_kernels import tiles
from pallas_kernels.augmented_attention import augmented_attention
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.path_commit import commit_path
from pallas_kernels.tiles import COMMON, SIZES, TABLE, bucket
from pallas_kernels.tree_verify import Held, Tree, verify_tree

OPERATIONS = ("augmented_attention", "linear_attention", "tree_verify", "path_commit")
PASSES = ("block", "memories", "outputs", "query_gradients", "key_gradients")
BLOCKS = (128, 256, 512, 1024)
GROUP, TAPS, NODES = 64, 32, 26
Program = Callable[[], Any]
# A row of the table, and the table: device, kernel, bucket, row.
Entry = dict[str, int]
Table = dict[str, dict[str, dict[str, Entry]]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is timed: rows B of T tokens, with heads H of one size; `tree_verify` and `path_commit` take B only."""

    batch: int
    tokens: int
    heads: int
    size: int
    dtype: str


def main() -> int:
    """Tunes and writes."""
    options = parse()
    device = jax.devices()[0].device_kind
    if options.implementation not in ("gpu", "tpu", "gpu_interpreted"):
        print("error: this machine has neither a GPU nor a TPU to tune for; run it where one is", file=sys.stderr)
        return 2
    table = json.loads(options.table.read_text())
    found = table.setdefault(device, {})
    jobs = list(itertools.product(options.sizes, options.dtypes, options.operations))
    with tqdm(jobs, unit="row", disable=None) as bar:
        for size, dtype, operation in bar:
            shape = Shape(options.batch, options.tokens, options.heads, size, dtype)
            bar.set_postfix_str(f"{operation}, heads of {size}, {dtype}")
            for kernel, entry in tuned(operation, shape, table, device, options).items():
                found.setdefault(kernel, {})[bucket(size, size, dtype)] = entry
            # Whatever has been found is kept if the rest is interrupted.
            written = options.table.with_suffix(".part")
            written.write_text(json.dumps(table, indent=1) + "\n")
            written.replace(options.table)
    print(f"{options.table} has {sum(map(len, found.values()))} rows for {device}")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=(64, 128, 256), help="of heads")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16",))
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="rows")
    parser.add_argument("--tokens", type=int, default=4096, metavar="T", help="of a row")
    parser.add_argument("--heads", type=int, default=16, metavar="H")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of one timing")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="what is read and written")
    parser.add_argument("--implementation", default=jax.default_backend(), help=argparse.SUPPRESS)
    parser.add_argument("--candidates", type=int, metavar="N", help="try the first N ways to cut only")
    return parser.parse_args()


def kernels_of(operation: str, implementation: str) -> list[str]:
    """What of an operation has rows in the table; on TPU only blocks are to be chosen."""
    if operation in ("tree_verify", "path_commit"):
        return [] if implementation == "tpu" else [operation]
    return [f"{operation}.{each}" for each in (PASSES[:1] if implementation == "tpu" else PASSES)]


def tuned(operation: str, shape: Shape, table: Table, device: str, options: argparse.Namespace) -> dict[str, Entry]:
    """The fastest way to cut the work of each of an operation's kernels."""
    best: dict[str, Entry] = {}
    row = bucket(shape.size, shape.size, shape.dtype)
    for kernel in kernels_of(operation, options.implementation):
        shipped = table.get(device, {}).get(kernel, {}).get(row) or table[COMMON][kernel].get(row)
        if shipped is None:
            continue
        timed: list[tuple[float, Entry]] = []
        for entry in candidates(shipped)[: options.candidates]:
            try:
                with replaced(table, device, row, best | {kernel: entry}):
                    spent = seconds(program(operation, shape, options.implementation), options.seconds)
            except Exception:
                # Too much shared memory, for instance; but what is shipped must run.
                if entry == shipped:
                    raise
            else:
                timed.append((spent, entry))
        best[kernel] = min(timed, key=lambda each: each[0])[1]
    return best


def candidates(shipped: Entry) -> list[Entry]:
    """Ways to cut a kernel's work, the shipped one first."""
    if "part" not in shipped:
        others = [{"rows": rows} for rows in BLOCKS]
    else:
        ways = itertools.product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3))
        others = [
            shipped | {"rows": rows, "part": part, "warps": warps, "stages": stages}
            for rows, part, warps, stages in ways
        ]
    return [shipped, *(each for each in others if each != shipped)]


@contextlib.contextmanager
def replaced(table: Table, device: str, row: str, entries: dict[str, Entry]) -> Iterator[None]:
    """Kernels with other rows of the table, while programs are traced."""
    mine = {name: dict(rows) for name, rows in table.get(device, {}).items()}
    for kernel, entry in entries.items():
        mine.setdefault(kernel, {})[row] = entry
    with tiles.using({**table, device: mine}):
        yield


def seconds(run: Program, least: float) -> float:
    """Seconds of one call."""
    jax.block_until_ready(run())
    calls, spent, began = 0, 0.0, time.perf_counter()
    while spent < least:
        jax.block_until_ready(run())
        calls += 1
        spent = time.perf_counter() - began
    return spent / calls


def program(operation: str, shape: Shape, implementation: str) -> Program:
    """A compiled call of an operation, forward and backward where there is one."""
    keys = jax.random.split(jax.random.key(0), 4)

    def rows(tokens: int) -> list[jax.Array]:
        return [jax.random.normal(key, (shape.batch, tokens, shape.heads, shape.size), shape.dtype) for key in keys[:3]]

    alpha, taps = jnp.full((shape.heads,), 0.5), jnp.full((shape.heads, TAPS), 0.1)
    memory = jax.random.normal(keys[3], (shape.batch, shape.heads, shape.size, shape.size))
    group_keys, group_values, _ = rows(GROUP)
    held = Held(memory, group_keys, group_values, rows(TAPS - 1)[0], jnp.full((shape.batch,), GROUP - 1))
    if operation == "tree_verify":
        tree = Tree(jnp.arange(NODES), jnp.tril(jnp.ones((NODES, NODES), bool)))
        verify = partial(verify_tree, tree=tree, held=held, alpha=alpha, taps=taps, implementation=implementation)
        compiled, nodes = jax.jit(verify), rows(NODES)
        return lambda: compiled(*nodes)
    if operation == "path_commit":
        path_keys, path_values, _ = rows(4)
        length = jnp.full((shape.batch,), 4)
        commit = jax.jit(partial(commit_path, implementation=implementation))
        return lambda: commit(held, path_keys, path_values, length)

    def total(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        if operation == "linear_attention":
            outputs = linear_attention(queries, keys, values, implementation=implementation)[0]
        else:
            outputs = augmented_attention(
                queries, keys, values, group_size=GROUP, alpha=alpha, taps=taps, implementation=implementation
            )[0]
        return jnp.sum(jnp.square(outputs.astype(jnp.float32)))

    both, arrays = jax.jit(jax.grad(total, range(3))), rows(shape.tokens)
    return lambda: both(*arrays)


if __name__ == "__main__":
    sys.exit(main())
