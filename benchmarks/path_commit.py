"""Commits of accepted paths, one after another in place: against float64, to the bit when repeated, and their time.

    python benchmarks/path_commit.py [--implementations gpu xla] [--json FILE]

`commit_path` writes the memory of a finished group where it lies, and a kernel that wrote in place once lost a part of
it on a GPU. So many commits go over one state, donated from call to call and carried by one loop inside a program, as
decoding has it; both must hold what float64 holds of the same tokens, and the same bits whenever it is done again.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lib.report import header, write
from lib.tiles_option import add_tiles_option, use_tiles

from lin_jax.errors import OptionParser, UserError, exit_cleanly
from pallas_kernels.implementations import PREFERRED
from pallas_kernels.path_commit import commit_path
from pallas_kernels.types import AugmentedState, Nodes

# Of the largest number of the memory: sums in another order, and products of bfloat16 that are exact in float32.
MOST = 1e-5
TAPS = 32


class Paths(NamedTuple):
    """Paths that are committed one after another: keys and values `[R, B, P, H, D]`, accepted tokens `[R, B]`."""

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array


def main() -> int:
    """Measures, prints, and writes JSON if asked to, cell by cell."""
    options = parse()
    use_tiles(options)
    report: dict[str, Any] = header("path commit") | {"correct": True, "results": []}
    for dtype in options.dtypes:
        for batch in options.batches:
            state, paths = drawn(batch, dtype, options)
            expected = oracle(state, paths)
            for name in options.implementations:
                row = measured(name, state, paths, expected, options) | {"batch": batch, "dtype": dtype}
                report["results"].append(row)
                report["correct"] &= row["correct"]
                print(line(row), flush=True)
                if options.json not in (None, "-"):
                    write(report, options.json)
    if options.json == "-":
        write(report, "-")
    return 0 if report["correct"] else 1


def parse() -> argparse.Namespace:
    """The command line."""
    platform = jax.default_backend()
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=PREFERRED.get(platform, ("xla",)), metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 32), metavar="B")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--group", type=int, default=64, help="tokens of a group")
    parser.add_argument("--path", type=int, default=8, help="nodes of a path")
    parser.add_argument("--commits", type=int, default=64, help="one after another")
    parser.add_argument("--rounds", type=int, default=5, help="the same commits again; the median time is taken")
    add_tiles_option(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    if options.path > options.group:
        raise UserError(f"--path {options.path} is longer than --group {options.group}; give a shorter one")
    if min(options.commits, options.rounds, *options.batches) < 1:
        raise UserError("--commits, --rounds and --batches must be 1 or more")
    return options


def drawn(batch: int, dtype: str, options: argparse.Namespace) -> tuple[AugmentedState, Paths]:
    """A state in whose rows groups stand at different places, and paths, at random."""
    rng = np.random.default_rng(batch)
    heads, size = options.heads, options.size

    def random(*shape: int, kind: str = dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), kind)

    state = AugmentedState(
        random(batch, heads, size, size, kind="float32"),
        random(batch, options.group, heads, size),
        random(batch, options.group, heads, size),
        random(batch, TAPS - 1, heads, size),
        jnp.asarray(rng.integers(0, 4 * options.group, batch), jnp.int32),
    )
    rows = options.commits, batch, options.path, heads, size
    lengths = rng.integers(0, options.path + 1, (options.commits, batch))
    return state, Paths(random(*rows), random(*rows), jnp.asarray(lengths, jnp.int32))


def oracle(state: AugmentedState, paths: Paths) -> np.ndarray:
    """The memory after all paths in float64, from whole groups of all tokens."""
    memory = np.asarray(state.memory, np.float64)
    keys, values, lengths = (np.asarray(each) for each in paths)
    group = state.keys.shape[1]
    for row, position in enumerate(np.asarray(state.position)):
        begun = position % group
        held = [np.asarray(each[row, :begun], np.float64) for each in (state.keys, state.values)]
        new = [
            np.concatenate([part[step, row, :count] for step, count in enumerate(lengths[:, row])]).astype(np.float64)
            for part in (keys, values)
        ]
        told, said = (np.concatenate(pair) for pair in zip(held, new, strict=True))
        whole = len(told) // group * group
        memory[row] += told[:whole].transpose(1, 2, 0) @ said[:whole].transpose(1, 0, 2)
    return memory


def measured(
    name: str, state: AugmentedState, paths: Paths, expected: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """An implementation in both ways to use it."""
    one = jax.jit(lambda state, path, length: commit_path(state, path, length, implementation=name), donate_argnums=0)

    def all_of_them(state: AugmentedState, paths: Paths) -> AugmentedState:
        def step(state: AugmentedState, each: Paths) -> tuple[AugmentedState, None]:
            return commit_path(state, Nodes(each.keys, each.values), each.lengths, implementation=name), None

        return jax.lax.scan(step, state, paths)[0]

    looped = jax.jit(all_of_them, donate_argnums=0)

    def by_calls(state: AugmentedState) -> AugmentedState:
        for keys, values, length in zip(*paths, strict=True):
            state = one(state, Nodes(keys, values), length)
        return state

    found = {"calls": repeated(by_calls, state, 2), "loop": repeated(lambda s: looped(s, paths), state, options.rounds)}
    largest = float(np.abs(expected).max())
    errors = {way: float(np.abs(each[0] - expected).max()) / largest for way, each in found.items()}
    return {
        "implementation": name,
        "commits": options.commits,
        "errors": errors,
        "same_bits": all(each[1] for each in found.values()),
        "microseconds": 1e6 * found["loop"][2] / options.commits,
        "correct": all(np.isfinite(each) and each <= MOST for each in errors.values())
        and all(each[1] for each in found.values()),
    }


def repeated(
    run: Callable[[AugmentedState], AugmentedState], state: AugmentedState, rounds: int
) -> tuple[np.ndarray, bool, float]:
    """The memory after a run, whether all further runs end with the same bits, and their median seconds."""
    memories, taken = [], []
    for _ in range(rounds + 1):
        # The run takes the buffers that it is given.
        own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        began = time.perf_counter()
        after = jax.block_until_ready(run(own))
        taken.append(time.perf_counter() - began)
        memories.append(np.asarray(after.memory))
    same = all(np.array_equal(memories[0], each) for each in memories[1:])
    return memories[0].astype(np.float64), same, float(np.median(taken[1:]))


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    where = f"{row['dtype']:8} {row['batch']:>2} rows  {row['implementation']:16}"
    errors = ", ".join(f"{way} {error:.1e}" for way, error in row["errors"].items())
    repeats = "same bits again" if row["same_bits"] else "OTHER BITS AGAIN"
    told = f"{row['microseconds']:.1f} us a commit" if row["correct"] else "WRONG"
    return f"{where} {told}, errors: {errors}, {repeats}"


if __name__ == "__main__":
    exit_cleanly(main)
