"""Operations of `pallas_kernels` over shapes and implementations: time, share of the roofline, memory, error; one run.

    python benchmarks/kernels.py [--json FILE]            # what suits this device
    python benchmarks/kernels.py --sweep                  # 65,536 tokens, from 128 rows of 512 to one row
    python benchmarks/kernels.py --traffic                # what the TPU programs move, from their grids: no device

The roofline is measured in the same run: bytes per second of a copy, operations per second of a matrix product. Outputs
and gradients of a few heads are held against the XLA implementation in float64, which the tests hold against loops over
tokens; what is wrong has no speed. Beside them: softmax attention, and flash-linear-attention where it is installed.
Verifying a tree is held against as many single steps as it has nodes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lib.kernel_cases import (
    OPERATIONS,
    Operation,
    Shape,
    forward,
    forward_and_backward,
    least_bytes,
    least_operations,
    verify,
    verify_inputs,
)
from lib.kernel_peers import PEERS, Call
from lib.kernel_traffic import traffic_of
from lib.report import header, write
from lib.tiles_option import add_tiles_option, use_tiles
from tqdm import tqdm

from lin_jax.errors import OptionParser, UserError, exit_cleanly
from pallas_kernels.implementations import PREFERRED

ACCELERATOR = ("1,8192,96,128", "2,16384,16,128", "4,2048,16,128", "4,4096,64,128", "8,2048,32,256", "8,1024,8,64")
CPU = ("1,1024,4,64", "2,500,4,32")
SWEEP = tuple(f"{65536 // length},{length},16,64" for length in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536))
NODES, BATCHES, TREES = (1, 8, 26, 64), (1, 8, 64), ("augmented", "windowed")
# Of the largest number: rounding of what comes out, and of sums over weights that are rounded like it.
ERRORS = {"bfloat16": 2e-2, "float32": 1e-4}
CHECKED_HEADS = 2


def main() -> int:
    """Measures, prints, and writes JSON if asked to."""
    options = parse()
    use_tiles(options)
    shapes = [parse_shape(text) for text in (SWEEP if options.sweep else options.shapes)]
    if options.traffic:
        results = [row for name in options.operations for shape in shapes for row in moved(name, shape, options.dtype)]
        report = header("kernel traffic") | {"dtype": options.dtype, "results": results}
    else:
        report = measured(shapes, options)
    print_summary(report)
    if options.json is not None:
        write(report, options.json)
    return 0 if report.get("correct", True) else 1


def measured(shapes: list[Shape], options: argparse.Namespace) -> dict[str, Any]:
    """Times and errors of operations and trees; whatever has been found is kept if the rest is interrupted."""
    report: dict[str, Any] = header("kernels") | {"dtype": options.dtype, "correct": True, "results": [], "verify": []}
    jobs = [(OPERATIONS[name], shape) for name in options.operations for shape in shapes]
    if jobs:
        report["roofline"] = roofline(options.dtype)
        moves, computes = (report["roofline"][f"{each}_per_second"] for each in ("bytes", "operations"))
        print(f"copy {moves / 1e9:,.0f} GB/s, product {computes / 1e12:,.2f} TFLOP/s", flush=True)
    rows = tqdm(compared(jobs, report.get("roofline", {}), options), "rows", len(jobs), file=sys.stderr)
    found = [("results", rows)] + ([] if options.without_verify else [("verify", verified(options))])
    for kind, cells in found:
        for each in cells:
            report[kind].append(each)
            errors = [way["error"] for way in each.get("implementations", {"": each}).values() if "error" in way]
            report["correct"] &= "failed" not in each and max(errors) <= ERRORS[options.dtype]
            if options.json not in (None, "-"):
                write(report, options.json)
    return report


def parse() -> argparse.Namespace:
    """The command line."""
    platform = jax.default_backend()
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=(*OPERATIONS, "none"), default=tuple(OPERATIONS))
    parser.add_argument("--shapes", nargs="+", metavar="B,T,H,D", default=CPU if platform == "cpu" else ACCELERATOR)
    parser.add_argument("--sweep", action="store_true", help="65,536 tokens in rows of many lengths instead")
    parser.add_argument("--implementations", nargs="+", default=PREFERRED.get(platform, ("xla",)), metavar="NAME")
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="what else is timed in the same run")
    parser.add_argument("--dtype", choices=tuple(ERRORS), default="float32" if platform == "cpu" else "bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="all implementations take turns; medians are taken")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of one timing")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="rows that are compiled at a time")
    parser.add_argument("--without-verify", action="store_true", help="leave draft trees out")
    parser.add_argument("--trees", nargs="+", choices=TREES, default=TREES, help="attentions whose trees are verified")
    parser.add_argument("--nodes", nargs="+", type=int, default=NODES, metavar="N", help="of draft trees")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="B", help="rows with a tree each")
    parser.add_argument("--traffic", action="store_true", help="bytes that the TPU programs move; nothing is run")
    add_tiles_option(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; give 1 or more")
    if min(*options.nodes, *options.batches) < 1:
        raise UserError("--nodes and --batches must be 1 or more")
    if "none" in options.operations:
        options.operations = []
    return options


def parse_shape(text: str) -> Shape:
    """A shape from `B,T,H,D`."""
    try:
        shape = Shape(*(int(part) for part in text.split(",")))
    except (ValueError, TypeError):
        raise UserError(f"the shape '{text}' is not understood; give B,T,H,D such as 4,2048,16,128") from None
    if min(shape.batch, shape.length, shape.heads, shape.size) < 1:
        raise UserError(f"the shape '{text}' has a size below 1")
    return shape


def roofline(dtype: str) -> dict[str, float]:
    """The device's roofline: bytes per second of a copy, operations per second of a matrix product."""
    big = jax.default_backend() != "cpu"
    size = 8192 if big else 1024
    matrix = jnp.ones((size, size), dtype)
    rows = jnp.ones((2**28 if big else 2**24,), jnp.float32)
    copy, square = jax.jit(lambda rows: -rows), jax.jit(lambda matrix: matrix @ matrix)
    copied = min(seconds(copy, (rows,), 0.2) for _ in range(5))
    multiplied = min(seconds(square, (matrix,), 0.2) for _ in range(5))
    return {"bytes_per_second": 2 * rows.nbytes / copied, "operations_per_second": 2 * size**3 / multiplied}


def seconds(program: Callable[..., Any], arguments: Sequence[Any], least: float) -> float:
    """Seconds of one call, over as many calls as take `least` seconds together."""
    jax.block_until_ready(program(*arguments))
    calls, spent = 0, 0.0
    began = time.perf_counter()
    while spent < least:
        # The queue is kept short, so that results are freed.
        jax.block_until_ready(program(*arguments))
        calls += 1
        spent = time.perf_counter() - began
    return spent / calls


@dataclass(frozen=True)
class Row:
    """An operation on one shape, compiled and checked.

    Attributes:
        operation: the operation.
        shape: the shape.
        arrays: inputs.
        ways: error and memory of each implementation.
        calls: forward, and forward and backward, of those that are not wrong.
    """

    operation: Operation
    shape: Shape
    arrays: list[jax.Array]
    ways: dict[str, dict[str, Any]]
    calls: dict[str, tuple[Call, Call]]


def compared(
    jobs: Sequence[tuple[Operation, Shape]], roof: dict[str, float], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Results row by row; some rows are compiled at a time, and timed one after another when that is done."""
    with ThreadPoolExecutor(options.threads) as pool:
        for begin in range(0, len(jobs), options.threads):
            some = jobs[begin : begin + options.threads]
            for job, row in zip(some, pool.map(lambda job: prepared(job, options), some), strict=True):
                yield told_failure(*job, row) if isinstance(row, Exception) else timed(row, roof, options)


def prepared(job: tuple[Operation, Shape], options: argparse.Namespace) -> Row | Exception:
    """An operation on one shape by our implementations, or why that cannot be."""
    operation, shape = job
    try:
        row = Row(operation, shape, operation.inputs(shape, options.dtype), {}, {})
        for name in options.implementations:
            row.ways[name] = {"error": error(operation, name, row.arrays), "peak_memory_bytes": None}
            if row.ways[name]["error"] <= ERRORS[options.dtype]:
                programs = (each(operation, name) for each in (forward, forward_and_backward))
                one, both = (each.lower(*row.arrays).compile() for each in programs)
                row.ways[name]["peak_memory_bytes"] = memory(both)
                row.calls[name] = partial(one, *row.arrays), partial(both, *row.arrays)
    except Exception as problem:
        # Too little memory, for instance.
        return problem
    return row


def told_failure(operation: Operation, shape: Shape, problem: Exception) -> dict[str, Any]:
    """The result of a row that could not be computed."""
    return {"operation": operation.name, "shape": str(shape), "implementations": {}, "failed": reason_of(problem)}


def reason_of(problem: Exception) -> str:
    """An error in one line; of a long one, how it begins and ends."""
    words = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return words if len(words) <= 400 else f"{words[:200]} ... {words[-200:]}"


def timed(row: Row, roof: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """All implementations of an operation on one shape, in turns."""
    try:
        calls = row.calls | peers_of(row.operation, row.arrays, row.ways, options)
        taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, pair in calls.items():
                taken[name].append(tuple(seconds(each, (), options.seconds) for each in pair))
    except Exception as problem:
        return told_failure(row.operation, row.shape, problem)
    itemsize = jnp.dtype(options.dtype).itemsize
    for name, rounds in taken.items():
        for index, label in enumerate(("forward", "forward_and_backward")):
            spent = float(np.median([each[index] for each in rounds]))
            least = max(
                least_bytes(row.shape, itemsize, index == 1) / roof["bytes_per_second"],
                least_operations(row.shape, index == 1) / roof["operations_per_second"],
            )
            row.ways[name][label] = {
                "milliseconds": 1e3 * spent,
                "tokens_per_second": row.shape.tokens / spent,
                "share_of_roofline": least / spent,
            }
    return {"operation": row.operation.name, "shape": str(row.shape), "implementations": row.ways}


def peers_of(
    operation: Operation, arrays: list[jax.Array], ways: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, tuple[Call, Call]]:
    """Calls of the peers that are there and not wrong; their errors go to `ways`."""
    calls = {}
    for peer in PEERS:
        if operation.name not in peer.operations or peer.name not in options.peers:
            continue
        if (missing := peer.missing()) is not None:
            tqdm.write(f"{peer.name} is left out: {missing}", file=sys.stderr)
            continue
        off = 0.0
        try:
            if operation.name in peer.same:
                few = operation.few_heads(arrays, CHECKED_HEADS)
                expected = forward(operation, "xla")(*jax.tree.map(_wider, few))
                off = difference(peer.build(few, operation.name)[0](), expected)
            pair = peer.build(arrays, operation.name)
            for call in pair:
                jax.block_until_ready(call())
        except Exception as problem:
            # Heads that are too large for it, for instance.
            tqdm.write(f"{peer.name} is left out of {operation.name}: {reason_of(problem)}", file=sys.stderr)
            continue
        ways[peer.name] = {"error": off, "checked": operation.name in peer.same, "peak_memory_bytes": None}
        if off <= ERRORS[options.dtype]:
            calls[peer.name] = pair
    return calls


def error(operation: Operation, implementation: str, arrays: list[jax.Array]) -> float:
    """The largest error of outputs and gradients of a few heads against float64, relative to the largest number."""
    few = operation.few_heads(arrays, CHECKED_HEADS)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(each, np.float64)) for each in few]
        expected = [np.asarray(each) for each in jax.tree.leaves(forward_and_backward(operation, "xla")(*wide))]
    found = jax.tree.leaves(forward_and_backward(operation, implementation)(*few))
    return max(
        float(np.abs(np.asarray(one, np.float64) - other).max() / max(np.abs(other).max(), 1e-30))
        for one, other in zip(found, expected, strict=True)
    )


def memory(compiled: Any) -> int | None:
    """Bytes that a compiled program needs at the most: arguments, results and what lies between."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)


def verified(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trees of several sizes on several rows, against one node, with the heads of a LLaMA of 7 billion parameters."""
    cells = [
        (attention, nodes, batch, name)
        for attention in options.trees
        for batch in options.batches
        for name in options.implementations
        for nodes in options.nodes
    ]
    single: dict[tuple[str, int, str], float] = {}
    with ThreadPoolExecutor(options.threads) as pool, tqdm(total=len(cells), desc="trees", file=sys.stderr) as bar:
        for begin in range(0, len(cells), options.threads):
            some = cells[begin : begin + options.threads]
            for key, (program, off) in zip(some, pool.map(lambda key: tree(key, options), some), strict=True):
                attention, nodes, batch, name = key
                cell: dict[str, Any] = {"attention": attention, "nodes": nodes, "batch": batch}
                cell |= {"implementation": name, "error": off}
                if off <= ERRORS[options.dtype]:
                    spent = float(np.median([seconds(program, (), options.seconds) for _ in range(options.rounds)]))
                    cell["milliseconds"] = 1e3 * spent
                    if nodes == 1:
                        single[attention, batch, name] = spent
                    if (attention, batch, name) in single:
                        cell["times_one_node"] = spent / single[attention, batch, name]
                bar.update()
                yield cell


def tree(cell: tuple[str, int, int, str], options: argparse.Namespace) -> tuple[Call, float]:
    """Verification of a tree, compiled, and its error."""
    attention, nodes, batch, name = cell
    heads, size = (32, 128) if jax.default_backend() != "cpu" else (2, 32)
    inputs = verify_inputs(attention, nodes, batch, heads, size, options.dtype)
    program = verify(attention, name).lower(*inputs).compile()
    off = difference(program(*inputs), verify(attention, "xla")(*jax.tree.map(_wider, inputs)))
    return partial(program, *inputs), off


def difference(found: jax.Array, expected: jax.Array) -> float:
    """The largest error, relative to the largest number."""
    one, other = (np.asarray(each, np.float64) for each in (found, expected))
    return float(np.abs(one - other).max() / np.abs(other).max())


def _wider(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def moved(name: str, shape: Shape, dtype: str) -> list[dict[str, Any]]:
    """Bytes that the TPU programs of an operation move, and how many times the least that is."""
    operation = OPERATIONS[name]
    arrays = operation.structs(shape, dtype)
    rows = []
    for backward, program in ((False, forward), (True, forward_and_backward)):
        traffic = traffic_of(program(operation, "tpu_interpreted"), *arrays)
        total = sum(each.read + each.written for each in traffic)
        least = least_bytes(shape, jnp.dtype(dtype).itemsize, backward)
        label = "forward_and_backward" if backward else "forward"
        rows.append(
            {"operation": name, "shape": str(shape), "pass": label, "bytes": total, "times_least": total / least}
        )
    return rows


def print_summary(report: dict[str, Any]) -> None:
    """The report in words."""
    for each in report["results"]:
        if "times_least" in each:
            where = f"{each['operation']:10} {each['shape']:18} {each['pass']:21}"
            print(f"{where} {each['times_least']:.2f} times the least")
            continue
        if "failed" in each:
            print(f"{each['operation']:10} {each['shape']:18} FAILED, {each['failed']}")
        for name, way in each["implementations"].items():
            told = f"WRONG by {way['error']:.1e}"
            if "forward" in way:
                told = ", ".join(
                    f"{label.replace('_', ' ')} {way[label]['milliseconds']:,.3f} ms "
                    f"({100 * way[label]['share_of_roofline']:.0f}% of the roofline)"
                    for label in ("forward", "forward_and_backward")
                )
            print(f"{each['operation']:10} {each['shape']:18} {name:16} {told}, error {way['error']:.1e}")
    for each in report.get("verify", ()):
        told = "WRONG"
        if "milliseconds" in each:
            told = f"{each['milliseconds']:.3f} ms"
        if "times_one_node" in each:
            told += f", {each['times_one_node']:.2f} times one node"
        where = f"{each['nodes']:>2} nodes, {each['batch']:>2} rows"
        print(f"verify     {each['attention']:9} {where}  {each['implementation']:16} {told}")


if __name__ == "__main__":
    exit_cleanly(main)
