"""What a token costs after contexts of different length, and how large the state is: it should not matter.

    python benchmarks/decode_speed.py --json [FILE] [--model runs/demo] [--contexts 64 4096 32768]

Contexts are measured in turn, round after round, and medians taken; the last line says how the costs compare. The
tokens that were timed are checked against a forward pass over the whole text, at the shortest context.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import lin_jax
from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator
from lin_jax.decoding.generator import GREEDY, state_bytes
from lin_jax.decoding.plan import device_kind
from lin_jax.errors import exit_cleanly
from lin_jax.models import Llama, LlamaConfig


def main() -> int:
    """Measures, prints, and writes JSON if asked to."""
    options = parse()
    model = load(options)
    results = measure(model, options.contexts, options.tokens, options.rounds)
    first = results[0]
    for result in results:
        result["ratio"] = result["milliseconds_per_token"] / first["milliseconds_per_token"]
        print(
            f"after {result['context']:>7,} tokens: {result['milliseconds_per_token']:.3f} ms a token "
            f"({result['ratio']:.3f} of the first), state {result['state_bytes']:,} bytes"
        )
    report = {
        "benchmark": "decode_speed",
        "attention": model.config.attention.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "device": device_kind(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "lin_jax": lin_jax.__version__,
        "commit": commit(),
        "rounds": options.rounds,
        "tokens_per_round": options.tokens,
        "correct": bool(check(model, min(options.contexts))),
        "results": results,
        "largest_ratio": max(result["ratio"] for result in results),
    }
    if options.json is not None:
        text = json.dumps(report, indent=1)
        print(text) if options.json == "-" else Path(options.json).write_text(text + "\n")
    return 0 if report["correct"] else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    parser.add_argument("--model", metavar="RUN", help="run folder; default: a model of the demo's size")
    parser.add_argument("--attention", default="augmented", help="token mixer, where no run folder is given")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 4096, 32768], metavar="N")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are timed in each round")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def load(options: argparse.Namespace) -> Llama:
    """The model of a run, or one with random weights: they make no difference to the speed."""
    if options.model:
        from lin_jax.decoding.session import Session

        return Session.load(options.model).model
    attention = AttentionConfig(options.attention, 64, 31, initial_alpha=0.1)
    return Llama(LlamaConfig(vocab_size=2048, num_heads=4, attention=attention), rngs=nnx.Rngs(0))


def prompt_of(model: Llama, length: int) -> list[int]:
    """A prompt of random tokens."""
    return np.random.default_rng(0).integers(0, model.config.vocab_size or 1, length).tolist()


def measure(model: Llama, contexts: Sequence[int], tokens: int, rounds: int) -> list[dict[str, float]]:
    """Cost per token and size of the state at every context."""
    generator = Generator(model, piece=512)
    # All contexts run the same compiled loop: its buffers are as large as the longest of them asks for.
    total = max(contexts) + (rounds + 1) * tokens + 1
    states = []
    for context in tqdm(contexts, desc="reading prompts", file=sys.stderr):
        state = generator.begin([prompt_of(model, context)], total - context, GREEDY, 0, 0)
        states.append(jax.block_until_ready(state))
    seconds = np.zeros((rounds + 1, len(contexts)))
    for turn in tqdm(range(rounds + 1), desc="timing", file=sys.stderr):
        for index, state in enumerate(states):
            began = time.perf_counter()
            states[index] = jax.block_until_ready(generator.advance(state, GREEDY, tokens))
            seconds[turn, index] = time.perf_counter() - began
    medians = np.median(seconds[1:], axis=0) / tokens * 1e3
    return [
        {
            "context": context,
            "milliseconds_per_token": float(median),
            "tokens_per_second": 1e3 / float(median),
            "state_bytes": state_bytes(state.model, 1),
        }
        for context, median, state in zip(contexts, medians, states, strict=True)
    ]


def check(model: Llama, context: int, count: int = 16) -> bool:
    """Whether decoded tokens are those of forward passes over the whole text."""
    text = prompt_of(model, context)
    found = Generator(model, piece=512).generate([text], count).tokens[0]
    logits = model(jnp.asarray([text + found]))[0, context - 1 : -1]
    return np.argmax(logits, axis=-1).tolist() == found


def commit() -> str | None:
    """The commit that is checked out, if this is a checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    exit_cleanly(main)
