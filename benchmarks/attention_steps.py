"""Training steps of a LLaMA with one attention and another, in turn: seconds, and memory by XLA's own account.

    python benchmarks/attention_steps.py [--attentions augmented exponential+window ...] [--lengths 1024 4096 16384]
        [--rounds 7] [--timed-length 1024] [--against FOLDER] [--json FILE]

Options stand behind a name, as in `exponential+window/window=32/decay=token`. The first attention is the one that all
others are compared with: in each round every attention takes one step on the same rows, forwards and backwards through
the list by turns, and the ratio is the median of the rounds' ratios. A step is that of `train_speed.py`. Memory is what
XLA sets aside for the compiled step of one row of each length beyond parameters and moments; nothing is run for it. The
status is 1 where memory grows faster than the text (by more than a tenth between the last two lengths).

With `--against FOLDER`, another checkout of this repository, each attention's step is compared with that of the code
there instead: each in a process of its own, in turn, by the processor time of all its threads.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from lib.attention_names import attention_of
from lib.report import header, write
from train_speed import tokens

from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.models import LlamaConfig
from lin_jax.training.config import OptimizerConfig
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.optimizer import build_optimizer
from lin_jax.training.train_step import TrainState, make_step

WARM_UP = 2
MOST_GROWTH = 1.1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("augmented", "exponential+window", "hedgehog+window", "exponential+window/decay=token")
    parser.add_argument("--attentions", nargs="+", default=names, metavar="NAME", help="the first is the yardstick")
    parser.add_argument("--lengths", nargs="*", type=int, default=(1024, 4096, 16384), metavar="T", help="for memory")
    parser.add_argument("--timed-length", type=int, default=1024, metavar="T", help="of the rows of timed steps")
    parser.add_argument("--rows", type=int, default=2, help="of timed steps")
    parser.add_argument("--rounds", type=int, default=7, help="that are timed; 0 times nothing")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--against", metavar="FOLDER", help="compare with the code there instead")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    if options.rounds < 0:
        raise UserError(f"--rounds is {options.rounds}; give zero or more")
    return options


def config_of(name: str, options: argparse.Namespace) -> LlamaConfig:
    """The model's configuration."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_layers=options.layers,
        num_heads=options.heads,
        attention=attention_of(name),
    )


class Contender:
    """An attention's model, optimizer and compiled step."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.objective = NextToken(config)
        self.optimizer = build_optimizer(OptimizerConfig(learning_rate=3e-4, warmup_steps=10), 10_000)

    def begin(self) -> TrainState:
        """The state before the first step."""
        key = jax.random.key(0)
        return TrainState.new(self.objective.start(key, None), self.optimizer, key)

    def batch(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """Rows of one document each."""
        return {"tokens": tokens(rows, length, self.config.vocab_size or 0)}

    def compiled(self, rows: int, length: int) -> Any:
        """The step for a batch of this shape."""
        state = jax.eval_shape(self.begin)
        return make_step(self.objective, self.optimizer, 1).lower(state, {}, self.batch(rows, length)).compile()

    def stepper(self, rows: int, length: int) -> Callable[[], float]:
        """A function that takes a step and returns its seconds."""
        compiled, batch = self.compiled(rows, length), jax.device_put(self.batch(rows, length))
        state = jax.jit(self.begin)()

        def step() -> float:
            nonlocal state
            began = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, {}, batch))
            return time.perf_counter() - began

        return step


def timed(contenders: dict[str, Contender], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of a step of each, and the ratio to the first, by medians of rounds."""
    steps = {name: each.stepper(options.rows, options.timed_length) for name, each in contenders.items()}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(steps[name]())
    yardstick = np.array(taken[next(iter(steps))])
    return {
        name: {
            "step_seconds": float(np.median(seconds)),
            "times_the_first": float(np.median(np.array(seconds) / yardstick)),
            "all_seconds": seconds,
        }
        for name, seconds in taken.items()
    }


def serve(options: argparse.Namespace) -> int:
    """Takes a step of the first attention for each line that comes in, and prints its seconds of processor time."""
    step = Contender(config_of(options.attentions[0], options)).stepper(options.rows, options.timed_length)
    for _ in range(WARM_UP):
        step()
    for _ in sys.stdin:
        began = time.process_time()
        step()
        print(time.process_time() - began, flush=True)
    return 0


def against(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of processor time of an attention's steps here and by the other code, in turn."""
    sizes = ("rows", "timed_length", "hidden_size", "layers", "heads")
    flags = [f"--{size.replace('_', '-')}={getattr(options, size)}" for size in sizes]
    command = [sys.executable, __file__, "--serve", "--attentions", name, *flags]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    places = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.abspath(options.against)]
    servers = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": place}, **pipes) for place in places]
    taken: list[list[float]] = [[], []]
    for number in range(options.rounds):
        for at in (0, 1) if number % 2 == 0 else (1, 0):
            servers[at].stdin.write("step\n")
            servers[at].stdin.flush()
            taken[at].append(float(servers[at].stdout.readline()))
    for server in servers:
        server.stdin.close()
        server.wait()
    here, there = np.array(taken)
    return {
        "attention": name,
        "processor_seconds": float(np.median(here)),
        "times_the_other": float(np.median(here / there)),
        "least_times_the_other": float(here.min() / there.min()),
    }


def beside(options: argparse.Namespace) -> int:
    """Compares all attentions with the other code, and writes JSON if asked to."""
    rows = []
    for name in options.attentions:
        row = against(name, options)
        rows.append(row)
        ratios = f"{row['times_the_other']:.3f} times the other's (least: {row['least_times_the_other']:.3f})"
        print(f"{name:44} {row['processor_seconds']:.3f} s of processor time a step, {ratios}", flush=True)
    if options.json:
        write(header("attention steps") | {**vars(options), "results": rows}, options.json)
    return 0


def memory(contender: Contender, lengths: list[int]) -> dict[int, int]:
    """Bytes that XLA sets aside for a step of one row of each length, beyond what goes in and comes out."""
    return {length: contender.compiled(1, length).memory_analysis().temp_size_in_bytes for length in lengths}


def growth(sizes: dict[int, int]) -> float | None:
    """Growth of bytes between the last two lengths, as a multiple of the text's; None of fewer than two."""
    if len(sizes) < 2:
        return None
    (short, little), (long, much) = sorted(sizes.items())[-2:]
    return (much / little) / (long / short)


def main() -> int:
    """Measures, prints, and writes JSON if asked to; 1 if memory grows faster than the text."""
    options = parse()
    if options.serve:
        return serve(options)
    if options.against:
        return beside(options)
    contenders = {name: Contender(config_of(name, options)) for name in options.attentions}
    found: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    if options.rounds:
        for name, row in timed(contenders, options).items():
            found[name] |= row
            print(f"{name:44} {row['step_seconds']:.3f} s a step, {row['times_the_first']:.2f} times", flush=True)
    for name, each in contenders.items():
        sizes = memory(each, list(options.lengths))
        grown = growth(sizes)
        found[name] |= {"temporary_bytes": sizes, "growth": grown}
        told = ", ".join(f"{size / 2**20:,.0f} MiB at {length:,}" for length, size in sizes.items())
        print(f"{name:44} {told}" + ("" if grown is None else f"; grows {grown:.2f} times as the text"), flush=True)
    rows = [{"attention": name} | row for name, row in found.items()]
    if options.json:
        write(header("attention steps") | {**vars(options), "results": rows}, options.json)
    return int(any(row.get("growth") and row["growth"] > MOST_GROWTH for row in rows))


if __name__ == "__main__":
    exit_cleanly(main)
