"""A training step on a CPU beside PyTorch's, in alternating turns, and where its time goes.

    python benchmarks/train_cpu.py                                   # the demo's LLaMA, two processors
    python benchmarks/train_cpu.py --threads 1 --documents --json FILE
    python benchmarks/train_cpu.py --attention softmax --without-peer

Ours is `lin_jax.training.train_step.make_step` with the next-token objective and AdamW; PyTorch's is transformers'
`LlamaForCausalLM` in float32 (softmax, by its fused attention) with fused AdamW and clipping. Sizes, batch and number
of threads are the same. Turns of a few steps alternate, so that whatever else the machine does meets both; the least of
each is compared, in seconds and in seconds of processor time, which other programs disturb less.

`--trace` tells by JAX's profiler where a whole step's time goes. The parts of a step are compiled alone, forward and
backward. They do not add up to the step exactly: a program of everything shares work that programs of the parts repeat.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lib.report import header, write
from lib.step_trace import traced_parts

from lin_jax.attention import QKV, AttentionConfig, packed_rows, whole_rows
from lin_jax.devices import keep_freed_memory
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.losses.cross_entropy import Targets, shifted_targets, token_sums
from lin_jax.models import LlamaConfig
from lin_jax.training.config import OptimizerConfig
from lin_jax.training.distributed.mesh import MeshConfig, make_mesh
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.optimizer import build_optimizer
from lin_jax.training.train_step import TrainState, accumulate_gradients, make_step

ATTENTIONS = {
    "softmax": AttentionConfig("softmax"),
    "augmented": AttentionConfig("augmented", group_size=64, kernel_size=31),
    "exponential+window": AttentionConfig("exponential+window", window=64),
}
PEER = "PyTorch"
Program = Callable[[], Any]


def main() -> int:
    """Measures, prints, and writes JSON if asked to."""
    options = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    keep_freed_memory()
    steps: dict[str, Program] = {} if options.without_peer else {PEER: peer_step(options)}
    parts: dict[str, dict[str, Program]] = {}
    texts: dict[str, str] = {}
    for name in options.attention:
        # Along the mesh that a run has, since models know of it.
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            steps[name], parts[name], texts[name] = our_step(name, options)
    report = header("train cpu") | {name: value for name, value in vars(options).items() if name != "json"}
    report["steps"] = in_turns(steps, options.turns, options.steps)
    tokens = options.rows * options.length
    for name, row in report["steps"].items():
        row["tokens_per_second"] = tokens / row["seconds"]
        if PEER in steps:
            row |= {f"{key}_ratio": report["steps"][PEER][key] / row[key] for key in ("seconds", "cpu_seconds")}
        print(told(name, row), flush=True)
    if not options.without_parts:
        report["parts"] = {name: in_turns(each, options.turns, 1) for name, each in parts.items()}
        for name, rows in report["parts"].items():
            print(f"\n{name}, parts of a step:")
            for part, row in rows.items():
                print(f"  {part:30} {1e3 * row['seconds']:8.1f} ms {1e3 * row['cpu_seconds']:8.1f} ms of processors")
    if options.trace:
        report["trace"] = {name: traced_parts(steps[name], text) for name, text in texts.items()}
        for name, rows in report["trace"].items():
            print(trace_told(name, rows), flush=True)
    if options.json is not None:
        write(report, options.json)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", choices=tuple(ATTENTIONS), default=("softmax", "augmented"))
    sizes = {"hidden": 256, "intermediate": 688, "vocab": 2048}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}-size", type=int, default=value)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--unroll", type=int, help="layers per step of the loop; all of them, if not given")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--documents", action="store_true", help="rows hold several documents, as runs have them")
    parser.add_argument("--threads", type=int, default=2, help="processors of both")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--without-peer", action="store_true", help="do not run PyTorch")
    parser.add_argument("--without-parts", action="store_true", help="do not time the parts of a step")
    parser.add_argument("--trace", action="store_true", help="tell where a whole step's time goes, by the profiler")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    for name in ("threads", "turns", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; give 1 or more")
    return options


def peer_step(options: argparse.Namespace) -> Program:
    """A step of transformers' LLaMA in PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {name: getattr(options, name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    config = transformers.LlamaConfig(
        **sizes,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_heads,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, options.vocab_size, (options.rows, options.length))

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def our_step(name: str, options: argparse.Namespace) -> tuple[Program, dict[str, Program], str]:
    """Our step, its parts, and its program's text."""
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        unroll=options.unroll or options.num_layers,
        attention=ATTENTIONS[name],
    )
    objective = NextToken(config)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.1), 10_000)
    begin = jax.jit(lambda key: TrainState.new(objective.start(key, None), optimizer, key))
    batch = batch_of(options)
    # The state is donated: parts have one of their own.
    state, other = begin(jax.random.key(0)), begin(jax.random.key(0))
    compiled = make_step(objective, optimizer).lower(state, {}, batch).compile()
    held = [state]

    def step() -> None:
        held[0], _ = jax.block_until_ready(compiled(held[0], {}, batch))

    parts = {} if options.without_parts else parts_of(objective, optimizer, other, batch)
    return step, parts, compiled.as_text() or ""


def batch_of(options: argparse.Namespace) -> dict[str, jax.Array]:
    """Rows of random tokens; of two documents each if asked for."""
    rng = np.random.default_rng(0)
    shape = (options.rows, options.length + 1)
    batch = {"tokens": jnp.asarray(rng.integers(0, options.vocab_size, shape), jnp.int32)}
    if options.documents:
        ends = rng.integers(1, options.length, (options.rows, 1))
        batch["segment_ids"] = jnp.asarray(1 + (np.arange(shape[1]) >= ends), jnp.int32)
    return batch


def parts_of(objective: NextToken, optimizer: Any, state: TrainState, batch: Any) -> dict[str, Program]:
    """Programs of a step's parts. All but the first and the last are forward and backward."""
    segment_ids = batch.get("segment_ids")
    rows, length = batch["tokens"][:, :-1].shape
    layout = whole_rows(rows, length) if segment_ids is None else packed_rows(segment_ids[:, :-1])
    targets = Targets(*(part[..., None] for part in shifted_targets(batch, 1)))
    model = objective.parts(state.params, {})[0]
    x = jax.random.normal(jax.random.key(1), (rows, length, model.config.hidden_size))

    def through(apply: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array) -> jax.Array:
        own = objective.parts(params, {})[0]
        return jnp.sum(own.run(lambda block, x, _: (apply(block, x), None), x, None)[0])

    def attention(params: Any, x: jax.Array) -> jax.Array:
        def apply(block: Any, x: jax.Array) -> jax.Array:
            heads = x.reshape(rows, length, -1, block.attention.head_dim)
            return block.attention.mixer.parallel(QKV(heads, heads, heads), layout)[0].reshape(x.shape)

        return through(apply, params, x)

    def head(params: Any, x: jax.Array) -> jax.Array:
        own = objective.parts(params, {})[0]
        return token_sums(own.logits(x)[..., None, :], targets).loss[0]

    def optimise(gradients: Any, state: TrainState) -> Any:
        updates, moments = optimizer.transformation.update(gradients, state.optimizer, state.params)
        return optax.apply_updates(state.params, updates), moments, optax.tree.norm(gradients)

    forward = jax.jit(lambda params, batch: objective.sums(params, {}, batch))
    gradient = jax.jit(lambda params, batch: accumulate_gradients(objective, 1, params, {}, batch))
    feed_forward = jax.grad(lambda params, x: through(lambda block, x: block.feed_forward(x), params, x), (0, 1))
    calls = {
        "forward": (forward, (state.params, batch)),
        "forward and backward": (gradient, (state.params, batch)),
        "of it, attention": (jax.jit(jax.grad(attention, (0, 1))), (state.params, x)),
        "of it, feed-forward layers": (jax.jit(feed_forward), (state.params, x)),
        "of it, head and cross entropy": (jax.jit(jax.grad(head, (0, 1))), (state.params, x)),
        "optimiser": (jax.jit(optimise), (state.params, state)),
    }
    return {
        part: lambda program=program, arguments=arguments: jax.block_until_ready(program(*arguments))
        for part, (program, arguments) in calls.items()
    }


def in_turns(programs: dict[str, Program], turns: int, steps: int) -> dict[str, dict[str, Any]]:
    """Seconds and processor seconds of each program, by turns: the least, the median, and all of them."""
    for program in programs.values():
        program()
        program()
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for turn in range(turns):
        names = list(programs)
        for name in names if turn % 2 == 0 else reversed(names):
            began, worked = time.perf_counter(), time.process_time()
            for _ in range(steps):
                programs[name]()
            taken = time.perf_counter() - began, time.process_time() - worked
            spent[name].append((taken[0] / steps, taken[1] / steps))
    found = {}
    for name, each in spent.items():
        least, median = np.min(each, axis=0), np.median(each, axis=0)
        found[name] = {"seconds": float(least[0]), "cpu_seconds": float(least[1]), "all": each}
        found[name] |= {"median_seconds": float(median[0]), "median_cpu_seconds": float(median[1])}
    return found


def told(name: str, row: dict[str, Any]) -> str:
    """A row in words."""
    ratio = ""
    if "seconds_ratio" in row and name != PEER:
        ratio = f"; {row['seconds_ratio']:.2f} times {PEER}'s rate, {row['cpu_seconds_ratio']:.2f} by processor time"
    return (
        f"{name:20} {row['tokens_per_second']:7,.0f} tokens/s, {row['seconds']:.3f} s a step (median "
        f"{row['median_seconds']:.3f}), {row['cpu_seconds']:.3f} s of processors{ratio}"
    )


def trace_told(name: str, rows: list[dict[str, Any]]) -> str:
    """A trace in words."""
    lines = [f"\n{name}, trace of a step ({sum(row['ms'] for row in rows):.0f} ms):"]
    for row in rows:
        split = ", ".join(f"{what} {ms:.1f}" for what, ms in sorted(row["split"].items()))
        lines.append(f"  {row['part']:26} {row['ms']:7.1f} ms  ({split})")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_cleanly(main)
