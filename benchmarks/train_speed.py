"""Training LLaMAs by the package's own step on one device, at many lengths: tokens per second, share of the peak.

    python benchmarks/train_speed.py --size 1b --lengths 2048 8192 32768 [--json FILE]  # on a GPU
    python benchmarks/train_speed.py --size tiny --lengths 64 128 --tokens 512          # anywhere
    python benchmarks/train_speed.py --size 1b --peers fla                              # PyTorch beside it

A step is `lin_jax.training.train_step.make_step` with the next-token objective and AdamW, on rows that are one
document each, in as many parts as memory asks for. Operations are those of `lin_jax.evaluation.flops`: products that
the mathematics needs, causal attention at half, nothing for what is computed twice. MFU is their
rate over the data sheet's peak for bfloat16; a product of two square matrices, measured in the same run, is the other
yardstick.

Attention that is wrong has no speed: loss and gradient of a short row are held against plain XLA's before anything is
timed. The loss of a repeated batch has to fall.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from kernels import seconds
from lib.report import header, write
from lib.tiles_option import add_tiles_option, use_tiles

from lin_jax.attention import AttentionConfig
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.evaluation.flops import peak_flops, step_flops
from lin_jax.models import LlamaConfig
from lin_jax.training.config import OptimizerConfig
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.optimizer import build_optimizer
from lin_jax.training.train_step import TrainState, accumulate_gradients, make_step

SIZES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 16, "vocab_size": 32_000},
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32_000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "vocab_size": 512},
}
# Relative; loss and gradient of bfloat16 activations differ by their rounding.
ERRORS = {"bfloat16": (5e-3, 6e-2), "float32": (1e-5, 1e-3)}
CHECKED = 1024
WARM_UP = 2
PEER = Path(__file__).with_name("train_peer.py")


def main() -> int:
    """Measures, prints, and writes JSON if asked to, row by row."""
    options = parse()
    use_tiles(options)
    results = peer_rows(options) if options.peers else []
    report = header("train speed") | {"size": options.size, "tokens": options.tokens, "dtype": options.dtype}
    report |= {"peak_flops": peak_flops(), "product_flops": product_flops(), "results": results}
    peak, product = _tera(report["peak_flops"]), _tera(report["product_flops"])
    print(f"{report['device']}: peak {peak}, product {product}", flush=True)
    for name in options.attention:
        for row in measured(name, options, report):
            print(told(row), flush=True)
            results.append(row)
            # Whatever has been found is kept if the rest is interrupted.
            if options.json not in (None, "-"):
                write(report, options.json)
    if options.json == "-":
        write(report, "-")
    return 0 if all("tokens_per_second" in row for row in results) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="1b")
    parser.add_argument("--lengths", nargs="+", type=int, default=(2048, 8192, 32768), metavar="T", help="of rows")
    parser.add_argument("--attention", nargs="+", default=("augmented", "softmax"), metavar="NAME")
    parser.add_argument("--implementation", help="of attention; what suits the device, if not given")
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--part", type=int, default=16384, metavar="TOKENS", help="of a part of a step, at least a row")
    parser.add_argument("--steps", type=int, default=6, help="that are timed; the median is taken")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="steps that are compiled at a time")
    parser.add_argument("--dtype", choices=tuple(ERRORS), default="bfloat16", help="of activations")
    parser.add_argument("--param-dtype", choices=tuple(ERRORS), default="float32", help="of parameters")
    parser.add_argument("--remat", choices=("off", "products", "nothing"), default="products", help="what it keeps")
    parser.add_argument("--without-check", action="store_true", help="do not hold attention against plain XLA")
    parser.add_argument("--peers", nargs="*", default=(), choices=("fla",), help="PyTorch models, timed before")
    add_tiles_option(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    for length in options.lengths:
        if length < 2 or options.tokens % length:
            raise UserError(f"--lengths {length} does not divide --tokens {options.tokens}; give one that does")
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; give 1 or more")
    return options


def peer_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What PyTorch does, in a process of its own that ends before JAX takes the device's memory."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES[options.size].items()]
    lengths = [str(length) for length in options.lengths]
    words = [f"--tokens={options.tokens}", f"--part={options.part}", f"--steps={options.steps}", "--lengths", *lengths]
    done = subprocess.run([sys.executable, PEER, *sizes, *words], stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    return [json.loads(line.removeprefix("json ")) for line in done.stdout.splitlines() if line.startswith("json ")]


def product_flops() -> float:
    """Operations per second of a product of two square bfloat16 matrices."""
    size = 8192 if jax.default_backend() != "cpu" else 512
    matrix = jnp.ones((size, size), jnp.bfloat16)
    square = jax.jit(lambda matrix: matrix @ matrix)
    return 2 * size**3 / min(seconds(square, (matrix,), 0.2) for _ in range(3))


def config_for(name: str, options: argparse.Namespace, implementation: str | None) -> LlamaConfig:
    """The model's configuration."""
    return LlamaConfig(
        **SIZES[options.size],
        attention=AttentionConfig(name, implementation=implementation),
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        remat=options.remat != "off",
        remat_keeps=options.remat if options.remat != "off" else "nothing",
    )


def measured(name: str, options: argparse.Namespace, report: dict[str, Any]) -> Any:
    """A row of figures for every length."""
    config = config_for(name, options, options.implementation)
    objective = NextToken(config)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=3e-4, warmup_steps=10), 10_000)

    @jax.jit
    def begin(key: jax.Array) -> TrainState:
        return TrainState.new(objective.start(key, None), optimizer, key)

    state = begin(jax.random.key(0))
    tried = {"attention": name, "implementation": options.implementation or "default"}
    if not options.without_check:
        tried |= checked(name, options, state.params)
        if not tried["correct"]:
            yield tried
            return
    compiled = compiled_steps(config, objective, optimizer, state, options)
    for length in options.lengths:
        try:
            state, row = timed(config, compiled[length], state, length, options)
        except Exception as problem:
            # Too little memory, for instance; what was donated is gone.
            yield tried | {"length": length, "failed": f"{type(problem).__name__}: {str(problem)[:1500]}"}
            state = None
            state = begin(jax.random.key(0))
            continue
        spent = row["step_seconds"]
        flops = step_flops(config, state.params, {}, options.tokens // length, length)
        rates = {"tokens_per_second": options.tokens / spent, "model_flops": flops}
        rates["share_of_product"] = flops / spent / report["product_flops"]
        rates["mfu"] = None if report["peak_flops"] is None else flops / spent / report["peak_flops"]
        yield tried | {"length": length} | row | rates


def checked(name: str, options: argparse.Namespace, params: Any) -> dict[str, Any]:
    """Loss and gradient of one short row against plain XLA's."""
    # Fresh augmented models have neither convolution nor memory: give both something to do.
    params = jax.tree_util.tree_map_with_path(_stirred, params)
    length = min(CHECKED, min(options.lengths))
    batch = {"tokens": tokens(1, length, SIZES[options.size]["vocab_size"])}
    found = []
    for implementation in (options.implementation, "xla"):
        objective = NextToken(config_for(name, options, implementation))
        run = jax.jit(lambda params, batch, objective=objective: accumulate_gradients(objective, 1, params, {}, batch))
        loss, _, gradient = run(params, batch)
        found.append((float(loss), gradient))
    (loss, gradient), (expected, gradients) = found

    @jax.jit
    def distance(one: Any, other: Any) -> jax.Array:
        return optax.tree.norm(jax.tree.map(jnp.subtract, one, other)) / optax.tree.norm(other)

    errors = abs(loss - expected) / abs(expected), float(distance(gradient, gradients))
    right = all(error <= most for error, most in zip(errors, ERRORS[options.dtype], strict=True))
    return {"loss_error": errors[0], "gradient_error": errors[1], "correct": right}


def _stirred(path: Any, leaf: jax.Array) -> jax.Array:
    return leaf + 0.1 if getattr(path[-1], "key", None) in ("alpha", "taps") else leaf


def tokens(rows: int, length: int, vocabulary: int) -> np.ndarray:
    """Rows `[B, T + 1]` whose tokens are as unequal as words are (Zipf), in runs that come again."""
    rng = np.random.default_rng(rows + length)
    drawn = np.minimum(rng.zipf(1.2, (rows, length + 1)) - 1, vocabulary - 1).astype(np.int32)
    half = (length + 1) // 2
    drawn[:, half : 2 * half : 2] = drawn[:, :half:2]
    return drawn


def compiled_steps(
    config: LlamaConfig, objective: Any, optimizer: Any, state: TrainState, options: argparse.Namespace
) -> dict[int, tuple[Any, float] | Exception]:
    """A step for every length and the seconds that it took to compile, or why there is none; some at a time."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def one(length: int) -> tuple[Any, float] | Exception:
        batch = {"tokens": jax.ShapeDtypeStruct((options.tokens // length, length + 1), jnp.int32)}
        began = time.perf_counter()
        try:
            compiled = make_step(objective, optimizer, parts_of(length, options)).lower(shapes, {}, batch).compile()
        except Exception as problem:
            return problem
        return compiled, time.perf_counter() - began

    with ThreadPoolExecutor(options.threads) as pool:
        return dict(zip(options.lengths, pool.map(one, options.lengths), strict=True))


def parts_of(length: int, options: argparse.Namespace) -> int:
    """Parts that a step is taken in."""
    return int(min(options.tokens // length, max(1, options.tokens // options.part)))


def timed(
    config: LlamaConfig,
    program: tuple[Any, float] | Exception,
    state: TrainState,
    length: int,
    options: argparse.Namespace,
) -> tuple[TrainState, dict[str, Any]]:
    """Steps on one batch again and again: what they take, and the state after them."""
    if isinstance(program, Exception):
        raise program
    compiled, compiling = program
    batch = {"tokens": jax.device_put(tokens(options.tokens // length, length, config.vocab_size or 0))}
    losses, taken = [], []
    for _ in range(WARM_UP + options.steps):
        began = time.perf_counter()
        state, figures = jax.block_until_ready(compiled(state, {}, batch))
        taken.append(time.perf_counter() - began)
        losses.append(float(figures.loss))
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    row = {
        "parts": parts_of(length, options),
        "compile_seconds": compiling,
        "step_seconds": float(np.median(taken[WARM_UP:])),
        "all_seconds": taken,
        "losses": losses,
        "learns": bool(np.all(np.isfinite(losses)) and losses[-1] < losses[0]),
        "program_bytes": held + memory.temp_size_in_bytes,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    return state, row


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    where = f"{row['attention']:10} {row.get('length', ''):>6}"
    if "step_seconds" not in row:
        return f"{where} {row.get('failed') or 'WRONG'} ({ {k: row.get(k) for k in ('loss_error', 'gradient_error')} })"
    mfu = "" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f}%, "
    learns = "" if row["learns"] else "LOSS DOES NOT FALL, "
    return (
        f"{where} {row['tokens_per_second']:,.0f} tokens/s, {mfu}{learns}{100 * row['share_of_product']:.1f}% of a "
        f"product, {row['step_seconds']:.3f} s in {row['parts']} parts, {row['program_bytes'] / 2**30:.1f} GiB, "
        f"compiled in {row['compile_seconds']:.0f} s, loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
    )


def _tera(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate / 1e12:,.0f} TFLOP/s"


if __name__ == "__main__":
    exit_cleanly(main)
