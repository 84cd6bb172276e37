"""Measures the best tile sizes of kernels on the device at hand, and writes them into the table of tiles.

    python -m pallas_kernels.tune [--sizes 64 128] [--dtypes bfloat16] [--operations augmented_attention ...]

Kernel after kernel, a few ways to cut are compiled at once and timed one after another, each kernel alone; the fastest
is kept. Blocks are chosen last, by the whole operation. What cannot be compiled for the device is passed over.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from tqdm import tqdm

import pallas_kernels.augmented_attention.gpu
import pallas_kernels.linear_attention.gpu
import pallas_kernels.path_commit.gpu
import pallas_kernels.tree_verify.gpu
import pallas_kernels.window_verify.gpu
import pallas_kernels.windowed_attention.gpu
from pallas_kernels import tiles
from pallas_kernels.augmented_attention import PackedRows, augmented_attention
from pallas_kernels.gpu import memories as gpu_memories
from pallas_kernels.gpu.launch import launch
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.path_commit import commit_path
from pallas_kernels.tiles import COMMON, SIZES, TABLE, tile_bucket
from pallas_kernels.tree_verify import verify_tree
from pallas_kernels.types import AugmentedState, Nodes, TreeArrays, WindowedState
from pallas_kernels.window_verify import verify_window
from pallas_kernels.windowed_attention import FeatureWeights, windowed_attention

VERIFIED = ("tree_verify", "window_verify")
OPERATIONS = ("augmented_attention", "linear_attention", "windowed_attention", *VERIFIED, "path_commit")
# Those that have rows of their own for packed rows.
PLACED = ("augmented_attention", "windowed_attention")
PASSES = ("block", "memories", "outputs", "query_gradients", "key_gradients")
BLOCKS = (128, 256, 512)
# Kernels that are called otherwise than what is tuned.
NAMES = {
    "augmented_attention.memories": ("block_sums_kernel",),
    "linear_attention.memories": ("block_sums_kernel",),
    "windowed_attention.memories": ("block_sums_kernel",),
    "tree_verify": ("verify_kernel",),
    "window_verify": ("window_features_kernel", "window_verify_kernel"),
    "path_commit": ("fold_kernel",),
}
# Where kernels are launched from.
LAUNCHERS = (
    gpu_memories,
    pallas_kernels.augmented_attention.gpu,
    pallas_kernels.linear_attention.gpu,
    pallas_kernels.path_commit.gpu,
    pallas_kernels.tree_verify.gpu,
    pallas_kernels.window_verify.gpu,
    pallas_kernels.windowed_attention.gpu,
)
MOST_CALLS = 100
# Modules are patched while something is traced.
TRACING = threading.Lock()
GROUP, TAPS, NODES = 64, 32, 26
Program = Callable[[], Any]
# A row of the table, and the table: device, kernel, bucket, row.
Entry = dict[str, int]
Table = dict[str, dict[str, dict[str, Entry]]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows to be timed: B of T tokens, with H heads of one size; trees and paths take B only."""

    batch: int
    tokens: int
    heads: int
    size: int
    dtype: str
    placed: bool = False


class Timing(NamedTuple):
    """Seconds that one way to cut takes, and whether it is the shipped one."""

    seconds: float
    entry: Entry
    shipped: bool


def main() -> int:
    """Tunes and writes."""
    options = parse()
    device = jax.devices()[0].device_kind
    if options.implementation not in ("gpu", "tpu", "gpu_interpreted"):
        print("error: this machine has neither a GPU nor a TPU to tune for; run it where one is", file=sys.stderr)
        return 2
    table = json.loads(options.table.read_text())
    found = table.setdefault(device, {})
    jobs = list(itertools.product((False, True), options.dtypes, options.operations, options.sizes))
    jobs = [job for job in jobs if not job[0] or job[2] in PLACED]
    with tqdm(jobs, unit="row", disable=None) as bar:
        for placed, dtype, operation, size in bar:
            shape = Shape(options.batch, options.tokens, options.heads, size, dtype, placed)
            bar.set_postfix_str(f"{operation}, heads of {size}, {dtype}")
            if options.verbose:
                print(f"{row_of(shape)}, {options.deadline - time.monotonic():.0f} s left", flush=True)
            for kernel, entry in tuned(operation, shape, table, device, options).items():
                found.setdefault(kernel, {})[row_of(shape)] = entry
            # Whatever has been found is kept if the rest is interrupted.
            written = options.table.with_suffix(".part")
            written.write_text(table_text(table))
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
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing after them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="that compile")
    parser.add_argument("--verbose", action="store_true", help="print the times of every kernel")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="what is read and written")
    parser.add_argument("--implementation", default=jax.default_backend(), help=argparse.SUPPRESS)
    parser.add_argument("--candidates", type=int, metavar="N", help="try the first N ways to cut only")
    options = parser.parse_args()
    options.deadline = time.monotonic() + options.limit
    return options


def tunable_kernels(operation: str, implementation: str) -> list[str]:
    """The kernels of an operation that have rows in the table; on TPU only blocks are to be chosen."""
    if operation in (*VERIFIED, "path_commit"):
        return [] if implementation == "tpu" else [operation]
    return [f"{operation}.{each}" for each in (PASSES[:1] if implementation == "tpu" else PASSES)]


def tuned(operation: str, shape: Shape, table: Table, device: str, options: argparse.Namespace) -> dict[str, Entry]:
    """The fastest way to cut the work of each of an operation's kernels."""
    best: dict[str, Entry] = {}
    row = row_of(shape)
    kernels = tunable_kernels(operation, options.implementation)
    for kernel in (each for each in kernels if not each.endswith(".block")):
        shipped = shipped_row(table, device, kernel, shape)
        if shipped is None or time.monotonic() > options.deadline:
            continue
        ways = candidates(kernel, shipped, shape)[: options.candidates]

        def prepared(entry: Entry, kernel: str = kernel) -> list[Program]:
            with replaced(table, device, row, {kernel: entry}):
                return kernel_programs(operation, kernel, shape, options.implementation)

        keep_fastest(best, kernel, timed(ways, prepared, options), options)
    block = f"{operation}.block"
    shipped = shipped_row(table, device, block, shape) if block in kernels and not shape.placed else None
    if shipped is not None and time.monotonic() < options.deadline:
        ways = candidates(block, shipped, shape)[: options.candidates]

        def whole(entry: Entry) -> list[Program]:
            with replaced(table, device, row, best | {block: entry}):
                return [compiled(*call(operation, shape, options.implementation))]

        keep_fastest(best, block, timed(ways, whole, options), options)
    return best


def table_text(table: Table) -> str:
    """JSON with a line for each row."""
    whole = re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), json.dumps(table, indent=2))
    return re.sub(r"\{ (.*?) \}", r"{\1}", whole) + "\n"


def row_of(shape: Shape) -> str:
    """The name of a shape's row of the table."""
    return tile_bucket(shape.size, shape.size, shape.dtype) + (" placed" if shape.placed else "")


def shipped_row(table: Table, device: str, kernel: str, shape: Shape) -> Entry | None:
    """The row that the table has for a kernel, the device's own one first."""
    rows = [table.get(each, {}).get(kernel, {}) for each in (device, COMMON)]
    names = (row_of(shape), tile_bucket(shape.size, shape.size, shape.dtype))
    return next((each[name] for each in rows for name in names if name in each), None)


def keep_fastest(best: dict[str, Entry], kernel: str, found: list[Timing], options: argparse.Namespace) -> None:
    """Puts the fastest way among the best, and prints it beside the shipped one, which is the first."""
    if not found:
        return
    fastest = min(found, key=lambda each: each.seconds)
    best[kernel] = fastest.entry
    if options.verbose:
        shipped = f"{found[0].seconds * 1e6:.0f}" if found[0].shipped else "-"
        print(f"{kernel}: {fastest.seconds * 1e6:.0f} us (as it was: {shipped}) {fastest.entry}", flush=True)
        for each in sorted(found, key=lambda each: each.seconds)[1:4]:
            print(f"    {each.seconds * 1e6:.0f} us {tuple(each.entry.values())}", flush=True)


def timed(ways: list[Entry], prepare: Callable[[Entry], list[Program]], options: argparse.Namespace) -> list[Timing]:
    """Times of the ways that can be compiled, all of them at once, and run, one after another."""

    def attempt(entry: Entry) -> list[Program] | None:
        try:
            return prepare(entry)
        except Exception as error:
            # Too much shared memory, for instance.
            failed(entry, error, options)
            return None

    found = []
    with ThreadPoolExecutor(options.threads) as pool:
        for index, (entry, programs) in enumerate(zip(ways, pool.map(attempt, ways), strict=True)):
            if programs is None:
                continue
            try:
                spent = sum(seconds(each, options.seconds) for each in programs)
            except Exception as error:
                failed(entry, error, options)
            else:
                found.append(Timing(spent, entry, index == 0))
    return found


def failed(entry: Entry, error: Exception, options: argparse.Namespace) -> None:
    """Prints in one line a way that did not work."""
    if options.verbose:
        print(f"    {tuple(entry.values())}: {' '.join(str(error).split())[:120]}", flush=True)


def candidates(kernel: str, shipped: Entry, shape: Shape) -> list[Entry]:
    """Ways to cut a kernel's work, the shipped one first: few, of which experience says that one will do."""
    if "part" not in shipped:
        return [shipped, *({"rows": rows} for rows in BLOCKS if rows != shipped["rows"])]
    half = max(shape.size // 2, 16)
    if shape.dtype == "float32":
        ways = [(rows, part, 32, warps, 2) for rows in (16, 32) for part in (shape.size, half) for warps in (4, 8)]
    elif kernel.endswith(".memories"):
        ways = [(64, shape.size, 16, warps, stages) for warps in (8, 4) for stages in (2, 3, 4)]
        ways += [(64, half, 16, 4, 3), (32, shape.size, 16, 4, 3)]
    else:
        # Tiles of 64 rows are the least that a group of four warps multiplies as one.
        shapes = [(shape.size, 32, 8), (shape.size, 32, 4), (half, 32, 4)]
        ways = [(64, *each, stages) for each in shapes for stages in (2, 3)]
        ways += [(64, shape.size, 64, 8, 2), (64, shape.size, 64, 4, 2), (64, shape.size, 32, 8, 1)]
    others = [dict(zip(("rows", "part", "piece", "warps", "stages"), way, strict=True)) for way in ways]
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
    """Seconds of one call, of several in flight together, so that the host's work hides behind the device's."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    calls = min(1 + int(least / (time.perf_counter() - began)), MOST_CALLS)
    began = time.perf_counter()
    for _ in range(calls):
        last = run()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / calls


def compiled(function: Callable[..., Any], arrays: Sequence[Any]) -> Program:
    """A call of a compiled function."""
    ready = jax.jit(function).lower(*arrays).compile()
    return lambda: ready(*arrays)


def kernel_programs(operation: str, kernel: str, shape: Shape, implementation: str) -> list[Program]:
    """Every launch of one kernel within an operation, alone, on numbers at random."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(function: Any, arguments: Any, outputs: Any, **options: Any) -> list[jax.Array]:
        shapes = [each if isinstance(each, int) else jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arguments]
        seen.append((function, tuple(shapes), options | {"outputs": outputs}))
        return [jnp.zeros(each.shape, each.dtype) for each in outputs]

    with TRACING, contextlib.ExitStack() as stack:
        for module in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, "launch", note))
        # A function of its own: JAX keeps what it has traced.
        function, arrays = call(operation, shape, implementation)
        jax.eval_shape(lambda *arrays: function(*arrays), *arrays)
    names = NAMES.get(kernel, (f"{kernel.partition('.')[2]}_kernel",))
    return [alone(*each) for each in seen if each[0].__name__ in names]


def alone(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Program:
    """One launch as a program."""
    key = jax.random.key(0)

    def drawn(like: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(like.dtype, jnp.floating):
            return jax.random.normal(key, like.shape, like.dtype)
        return jnp.ones(like.shape, like.dtype)

    arrays = [drawn(each) for each in arguments if not isinstance(each, int)]

    def run(*arrays: jax.Array) -> list[jax.Array]:
        rest = iter(arrays)
        return launch(kernel, [each if isinstance(each, int) else next(rest) for each in arguments], **options)

    return compiled(run, arrays)


def call(operation: str, shape: Shape, implementation: str) -> tuple[Callable[..., Any], list[Any]]:
    """A function, forward and backward where there is a backward pass, and its arguments."""
    keys = jax.random.split(jax.random.key(0), 4)

    def rows(tokens: int) -> list[jax.Array]:
        return [jax.random.normal(key, (shape.batch, tokens, shape.heads, shape.size), shape.dtype) for key in keys[:3]]

    alpha, taps = jnp.full((shape.heads,), 0.5), jnp.full((shape.heads, TAPS), 0.1)
    memory = jax.random.normal(keys[3], (shape.batch, shape.heads, shape.size, shape.size))
    group_keys, group_values, _ = rows(GROUP)
    state = AugmentedState(memory, group_keys, group_values, rows(TAPS - 1)[0], jnp.full((shape.batch,), GROUP - 1))
    tree = TreeArrays(jnp.arange(NODES), jnp.tril(jnp.ones((NODES, NODES), bool)))
    if operation == "window_verify":
        learnt = FeatureWeights(*(jax.random.normal(key, (shape.heads, shape.size, shape.size)) for key in keys[:2]))
        sums = jnp.abs(jax.random.normal(keys[3], (shape.batch, shape.heads, 2 * shape.size, shape.size + 1)))
        ring_keys, ring_values, _ = rows(2 * GROUP)
        held = WindowedState(sums, ring_keys, ring_values, None, None, state.position)
        options = {"features": "hedgehog", "scale": shape.size**-0.5, "implementation": implementation}
        return partial(verify_window, weights=learnt, tree=tree, state=held, **options), rows(NODES)
    if operation == "tree_verify":
        verify = partial(verify_tree, tree=tree, state=state, alpha=alpha, taps=taps, implementation=implementation)
        return verify, rows(NODES)
    if operation == "path_commit":
        path = Nodes(*rows(4)[:2])
        length = jnp.full((shape.batch,), 4)
        return partial(commit_path, implementation=implementation), [state, path, length]
    packed, maps = whole_document(shape) if shape.placed else None, jax.random.split(keys[3])

    def total(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        if operation == "linear_attention":
            outputs = linear_attention(queries, keys, values, implementation=implementation)[0]
        elif operation == "windowed_attention":
            # As many features as a head has numbers, so that all its kernels are of one row of the table.
            weights = FeatureWeights(*(jax.random.normal(key, (shape.heads, shape.size, shape.size)) for key in maps))
            windowed = partial(windowed_attention, features="exponential", scale=shape.size**-0.5, packed=packed)
            outputs = windowed(queries, keys, values, weights, implementation=implementation)[0]
        else:
            augmented = partial(augmented_attention, group_size=GROUP, alpha=alpha, taps=taps, packed=packed)
            outputs = augmented(queries, keys, values, implementation=implementation)[0]
        return jnp.sum(jnp.square(outputs.astype(jnp.float32)))

    return jax.grad(total, range(3)), rows(shape.tokens)


def whole_document(shape: Shape) -> PackedRows:
    """Packed rows of one document each, for kernels that do not know that they are whole."""
    tokens = jnp.full((shape.batch,), shape.tokens)
    one = jnp.ones((shape.batch,), jnp.int32)
    place = jnp.broadcast_to(jnp.arange(shape.tokens), (shape.batch, shape.tokens))
    return PackedRows(jnp.ones_like(place), place, one, one, tokens)


if __name__ == "__main__":
    sys.exit(main())
