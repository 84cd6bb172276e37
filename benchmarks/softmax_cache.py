"""A token of softmax attention over a long cache: block by block of what is in use, beside all slots at once.

    python benchmarks/softmax_cache.py                                # 4,096 and 16,384 slots, nearly full
    python benchmarks/softmax_cache.py --slots 16384 --used 1000 --json FILE

Four layers of the demo's size (4 heads of 64) score a token against their caches and write it there, in a compiled loop
as decoding has it. Both ways take turns; the least seconds of a token are compared, and those of processor time, which
other programs disturb less. Only CPUs read caches in blocks.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lib.report import header, write

from lin_jax.attention import softmax_cache, tree_arrays
from lin_jax.attention.config import Conventions
from lin_jax.attention.full import CacheState, FullAttention
from lin_jax.errors import OptionParser, exit_cleanly
from pallas_kernels.types import QKV

LAYERS, HEADS, SIZE = 4, 4, 64
WAYS = {"blocks": 1, "all slots": 2**31}
Step = Callable[[int], Any]


def main() -> int:
    """Measures, prints, and writes JSON if asked to."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[4096, 16384], metavar="N", help="room of the cache")
    parser.add_argument("--used", type=int, metavar="N", help="tokens in it (default: all but those that are written)")
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="tokens that are written in a turn")
    parser.add_argument("--turns", type=int, default=5, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    report = header("softmax cache") | {name: value for name, value in vars(options).items() if name != "json"}
    report["rows"] = [measured(slots, options) for slots in options.slots]
    for row in report["rows"]:
        told = ", ".join(f"{way} {1e3 * row[way]['cpu_seconds']:.1f} ms of processors" for way in WAYS)
        print(f"{row['slots']:,} slots, {row['used']:,} used: {told} ({row['cpu_ratio']:.2f} times)")
    if options.json is not None:
        write(report, options.json)
    return 0


def measured(slots: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a token, the least of all turns, by both ways."""
    used = slots - options.tokens if options.used is None else options.used
    steps = {way: compiled(slots, used, least) for way, least in WAYS.items()}
    best = {way: {"seconds": float("inf"), "cpu_seconds": float("inf")} for way in WAYS}
    for _ in range(options.turns):
        for way, step in steps.items():
            # What a call costs beside its tokens, copies of the cache above all, is in both.
            wall, processors = (np.subtract(spent(step, 1 + options.tokens), spent(step, 1))) / options.tokens
            best[way]["seconds"] = min(best[way]["seconds"], wall)
            best[way]["cpu_seconds"] = min(best[way]["cpu_seconds"], processors)
    ratio = best["all slots"]["cpu_seconds"] / best["blocks"]["cpu_seconds"]
    return {"slots": slots, "used": used, **best, "cpu_ratio": ratio}


def spent(step: Step, tokens: int) -> tuple[float, float]:
    """Seconds, and seconds of processor time."""
    began, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(step(tokens))
    return time.perf_counter() - began, time.process_time() - cpu


def compiled(slots: int, used: int, least: int) -> Step:
    """A function that writes so many tokens, compiled; caches of `least` slots and more are read in blocks."""
    rng = np.random.default_rng(0)
    caches = [jnp.asarray(rng.standard_normal((LAYERS, 1, slots, HEADS, SIZE)), jnp.float32) for _ in range(2)]
    token = [jnp.asarray(rng.standard_normal((LAYERS, 1, 1, HEADS, SIZE)), jnp.float32) for _ in range(3)]
    mixer = FullAttention(HEADS, SIZE, SIZE, weights="softmax", conventions=Conventions(softmax_scale="root"))
    state = CacheState(*caches, jnp.full((LAYERS, 1), used, jnp.int32))

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, x, state = carry
        layers = [jax.tree.map(lambda leaf, at=at: leaf[at], state) for at in range(LAYERS)]
        written = []
        for at, layer in enumerate(layers):
            outputs, nodes = mixer.verify(QKV(x + token[0][at], token[1][at], token[2][at]), tree_arrays((-1,)), layer)
            x = x + outputs
            written.append(nodes)
        nodes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *written)
        state = jax.vmap(mixer.commit, in_axes=(0, 0, None))(state, nodes, jnp.ones(1, jnp.int32))
        return count - 1, x, state

    @jax.jit
    def run(count: Any, state: CacheState) -> tuple[Any, ...]:
        return jax.lax.while_loop(lambda carry: carry[0] > 0, one, (count, jnp.zeros_like(token[0][0]), state))

    before, softmax_cache.LEAST = softmax_cache.LEAST, least
    jax.block_until_ready(run(1, state))
    softmax_cache.LEAST = before
    return lambda tokens: run(tokens, state)


if __name__ == "__main__":
    raise SystemExit(exit_cleanly(main))
