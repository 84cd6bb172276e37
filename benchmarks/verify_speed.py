"""Decode steps of one node and of several, by attention: milliseconds, ratios, and the parts that they go to.

    python benchmarks/verify_speed.py [--attentions augmented clustered+window ...] [--nodes 1 2 4 8 16] [--drafting]
        [--weights int8] [--rounds 9] [--trace] [--json FILE]

A LLaMA of the story teller's sizes (`configs/stories.yaml`; others by options) with random weights, which take as long
as learnt ones. A step verifies a chain of so many nodes of which none is accepted, accepts its root and commits that;
one node is plain decoding. With --drafting the nodes are guessed by a path head as large as the story teller's. Numbers
of nodes take turns, round after round; medians are told, and the ratio is the median of the rounds' ratios. With
--trace, a step's operations are added up by part of the model; those that run side by side count one by one, and
products of a single row, which XLA leaves without a name, count as the rest.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from lib.attention_names import attention_of
from lib.report import header, write
from lib.step_trace import traced_parts

from lin_jax.decoding import Generator
from lin_jax.decoding.autotune.costs import NullDrafter
from lin_jax.decoding.drafting.drafters import build_drafter
from lin_jax.decoding.drafting.tree import chain
from lin_jax.decoding.engine.decode_loop import run
from lin_jax.decoding.scheduler import Scheduler
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.path_head import PathHead
from lin_jax.models.stored_weights import WeightStorage
from lin_jax.session.loading import draft_parts

VOCABULARY, HEAD_WIDTH, WARM_UP = 2048, 192, 4


def main() -> int:
    """Runs the command line; returns the exit status."""
    options = _options()
    about = header("verify_speed")
    print(f"{about['device']}, jax {about['jax']}, {options.weights} weights", file=sys.stderr)
    found = {}
    for name in options.attentions:
        contenders = contenders_of(name, options)
        found[name] = timed(contenders, options)
        _print(name, found[name])
        if options.trace:
            found[name]["parts"] = {
                str(nodes): _print_parts(nodes, parts_of_step(generator, options.steps, options.rows))
                for nodes, generator in contenders.items()
            }
    if options.json:
        sizes = {name: getattr(options, name) for name in ("hidden_size", "layers", "heads", "weights", "drafting")}
        write({**about, **sizes, "attentions": found}, options.json)
    return 0


def contenders_of(name: str, options: argparse.Namespace) -> dict[int, Generator]:
    """A generator for each number of nodes, all of one model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        intermediate_size=27 * options.hidden_size // 10,
        num_layers=options.layers,
        num_heads=options.heads,
        attention=attention_of(name, kernel_size=31),
    )
    heads = []
    if options.drafting:
        layers = tuple(sorted({options.layers * part // 4 for part in (1, 2, 3)}))
        width = min(HEAD_WIDTH, options.hidden_size)
        heads = [PathHead(options.hidden_size, width, VOCABULARY, layers=layers, rngs=nnx.Rngs(1))]
    storage = WeightStorage("int8" if options.weights == "int8" else "stored")
    parts = draft_parts(Llama(config, rngs=nnx.Rngs(0)), heads, storage=storage)

    def generator(nodes: int) -> Generator:
        if nodes == 1:
            return Generator(parts.target)
        drafter = build_drafter("path", parts) if options.drafting else NullDrafter(1, nodes - 1)
        return Generator(parts.target, drafter=drafter, tree=chain(nodes - 1))

    return {nodes: generator(nodes) for nodes in options.nodes}


def begun(generator: Generator, steps: int, rows: int) -> Scheduler:
    """Texts with room for as many steps, behind some that are not timed; each is a few tokens ahead of the next."""
    depth = generator.tree_for(rows).depth
    prompts = [list(range(1, 17 + 3 * row)) for row in range(rows)]
    scheduler = generator.stream(prompts, (steps + WARM_UP) * (depth + 1) + 1, slots=rows)
    scheduler.advance(WARM_UP)
    return scheduler


def seconds_per_step(generator: Generator, steps: int, rows: int) -> float:
    """Seconds of one step."""
    scheduler = begun(generator, steps, rows)
    before = scheduler.decode_seconds
    scheduler.advance(steps)
    return (scheduler.decode_seconds - before) / steps


def timed(contenders: dict[int, Generator], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step by number of nodes, and how many plain steps that is, with its spread over rounds."""
    for generator in contenders.values():
        seconds_per_step(generator, 1, options.rows)
    rounds = [
        [seconds_per_step(generator, options.steps, options.rows) for generator in contenders.values()]
        for _ in range(options.rounds)
    ]
    times = np.array(rounds)
    ratios = times / times[:, :1]
    return {
        str(nodes): {
            "milliseconds": float(1e3 * np.median(times[:, at])),
            "plain_steps": float(np.median(ratios[:, at])),
            "spread": [float(ratios[:, at].min()), float(ratios[:, at].max())],
        }
        for at, nodes in enumerate(contenders)
    }


def parts_of_step(generator: Generator, steps: int, rows: int) -> list[dict[str, Any]]:
    """Milliseconds of a step by part of the model, the longest first."""
    scheduler = begun(generator, steps, rows)
    options = scheduler.spec.options[scheduler.steering.needed]
    program = run.lower(
        scheduler.modules, scheduler.state, None, np.int32(steps), np.bool_(False), options=options
    ).compile()
    found = traced_parts(lambda: scheduler.advance(steps), program.as_text(), 1)
    return [{"part": each["part"], "ms": each["ms"] / steps} for each in found]


def _print(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}\n  nodes   ms a step   plain steps")
    for nodes, each in found.items():
        low, high = each["spread"]
        print(f"  {nodes:>5}{each['milliseconds']:>12.3f}{each['plain_steps']:>14.2f}  ({low:.2f} to {high:.2f})")
    sys.stdout.flush()


def _print_parts(nodes: int, parts: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    print(f"  {nodes} nodes, ms: " + ", ".join(f"{each['part']} {each['ms']:.3f}" for each in parts))
    return parts


def _options() -> argparse.Namespace:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attentions", nargs="+", default=["augmented", "clustered+window"], metavar="NAME")
    parser.add_argument("--nodes", nargs="+", type=int, metavar="N", help="1 comes first; default: 1 2 4 8 16")
    parser.add_argument(
        "--drafting", action="store_true", help="by a path head, in chains of up to 9 nodes; default: 1 2 4 8"
    )
    parser.add_argument("--weights", choices=("float32", "int8"), default="float32")
    parser.add_argument("--hidden-size", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="texts at a time")
    parser.add_argument("--steps", type=int, default=64, help="steps of a timing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trace", action="store_true", help="tell where a step's time goes")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    options = parser.parse_args()
    options.nodes = options.nodes or [1, 2, 4, 8, *([] if options.drafting else [16])]
    if options.nodes[0] != 1 or any(nodes < 2 for nodes in options.nodes[1:]):
        raise UserError(f"--nodes is {' '.join(map(str, options.nodes))}; give 1 first, then larger numbers")
    for name in ("rows", "rounds", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be positive")
    return options


if __name__ == "__main__":
    exit_cleanly(main)
