"""Recall that no window reaches: two-layer models from scratch on associative recall and passkeys, by distance.

    python benchmarks/recall.py [--task pairs|passkey] [--attention NAME ...] [--json FILE]

`pairs` is multi-query associative recall (Arora et al. 2024, Zoology): rows begin with pairs of a key and its value;
further on, among filler, each key comes once more, and the model is to say its value. `passkey`: one pair stands at a
random place of a row of filler, and its key comes again at the end. Accuracy is that of the most likely token, over
rows never seen in training, by the distance between a key and its question, in windows. Every attention is trained
alike, from the same seed on the same rows; `window` is softmax over the window alone, what a memory has to beat, and
`softmax` sees everything. The state's size is that of both layers for one row.

So that this measures memories, and not how soon a layer learns to look back by one token, every token brings the one
before it along (smeared keys, Olsson et al. 2022), and training begins with rows of a quarter of the length. Matrices
are trained with Muon: AdamW alone leaves even softmax at chance for as long.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lib.report import header
from tqdm import tqdm

from lin_jax.attention import AttentionConfig
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.models import Llama, LlamaConfig

ATTENTIONS = (
    "softmax",
    "window",
    "augmented",
    "elu",
    "hedgehog+window",
    "clustered+window",
    "exponential+window",
    "exponential+window+convolution",
)
KEYS, VALUES, FILLERS = 64, 64, 64
VOCABULARY = KEYS + VALUES + FILLERS
# Distances between a key and its question, in windows, at which a bin ends.
BINS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Rows:
    """Rows of a task: tokens `[B, T]`, and the distances `[B, T]` of questions from their keys, 0 elsewhere."""

    tokens: np.ndarray
    distances: np.ndarray


def pairs(rng: np.random.Generator, rows: int, length: int, count: int) -> Rows:
    """Rows of `count` pairs, filler, and a question for each."""
    tokens = rng.integers(KEYS + VALUES, VOCABULARY, (rows, length))
    distances = np.zeros((rows, length), int)
    for row in range(rows):
        keys, values = rng.permutation(KEYS)[:count], rng.integers(KEYS, KEYS + VALUES, count)
        tokens[row, : 2 * count] = np.stack([keys, values], axis=1).ravel()
        places = 2 * count + 2 * rng.permutation((length - 2 * count) // 2)[:count]
        tokens[row, places], tokens[row, places + 1] = keys, values
        distances[row, places] = places - 2 * np.arange(count)
    return Rows(tokens, distances)


def passkey(rng: np.random.Generator, rows: int, length: int, count: int) -> Rows:
    """Rows of filler with one pair at a random place, and its question at the end."""
    del count
    tokens = rng.integers(KEYS + VALUES, VOCABULARY, (rows, length))
    distances = np.zeros((rows, length), int)
    keys, values = rng.integers(0, KEYS, rows), rng.integers(KEYS, KEYS + VALUES, rows)
    places, every = rng.integers(0, length - 4, rows), np.arange(rows)
    tokens[every, places], tokens[every, places + 1] = keys, values
    tokens[:, -2], tokens[:, -1] = keys, values
    distances[:, -2] = length - 2 - places
    return Rows(tokens, distances)


TASKS = {"pairs": pairs, "passkey": passkey}


class SmearedLlama(Llama):
    """A LLaMA each of whose tokens brings the one before it along; for whole rows.

    Args:
        config: sizes.
        rngs: seeds of the initial numbers.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.previous = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, embedding_init=init)

    def begin(self, tokens: jax.Array, positions: jax.Array) -> Any:
        """Embeds tokens `[B, T]` together with the ones before them; others as in `Llama`."""
        x, tables = super().begin(tokens, positions)
        return x + self.previous(jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]), tables


def main() -> int:
    """Trains and measures one attention after the other; writes JSON if asked to, after each."""
    options = parse()
    report: dict[str, Any] = header("recall") | {key: str(value) for key, value in vars(options).items()}
    report["results"] = []
    for name in options.attention:
        row = measured(name, options)
        report["results"].append(row)
        shown = ", ".join(f"up to {end} windows {value:.1%}" for end, value in row["accuracy"].items())
        print(f"{name}: {shown}; state {row['state_bytes']:,} bytes, {row['seconds']:.0f} s", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="pairs")
    parser.add_argument("--attention", nargs="+", default=ATTENTIONS, metavar="NAME")
    parser.add_argument("--window", type=int, default=4, help="tokens of windows, and of groups")
    parser.add_argument("--features", type=int, default=64, help="of exponential and clustered")
    parser.add_argument("--length", type=int, default=256, help="of rows")
    parser.add_argument("--pairs", type=int, default=16, help="of a row")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--short-steps", type=int, default=300, help="before them, on four times as many short rows")
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW, for embeddings and norms")
    parser.add_argument("--muon", type=float, default=0.02, help="learning rate of Muon, for matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    # Pairs take two tokens, and so do their questions.
    if options.task == "pairs" and options.short_steps and options.length // 4 < 4 * options.pairs:
        raise UserError(
            f"short rows of {options.length // 4} tokens have no room for {options.pairs} pairs and their questions; "
            f"give --length {16 * options.pairs} or more, fewer --pairs, or --short-steps 0"
        )
    return options


def attention_of(name: str, options: argparse.Namespace) -> AttentionConfig:
    """The configuration of a name; `window` is a window without a memory."""
    if name == "window":
        return AttentionConfig("softmax", window=options.window)
    sizes: dict[str, Any] = {"group_size": options.window, "kernel_size": 7, "features": options.features}
    if "+window" in name:
        sizes["window"] = options.window
    return AttentionConfig(name, **sizes)


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one attention, and measures what it recalls."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_layers=2,
        num_heads=2,
        tie_embeddings=True,
        attention=attention_of(name, options),
    )
    make = partial(TASKS[options.task], length=options.length, count=options.pairs)
    began = time.perf_counter()
    model, losses = trained(SmearedLlama(config, rngs=nnx.Rngs(options.seed)), options)
    state = jax.eval_shape(lambda: model.init_state(1, options.length))
    return {
        "attention": name,
        "accuracy": accuracy(model, make, options),
        "loss": float(np.mean(losses[-20:])),
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "seconds": time.perf_counter() - began,
    }


def trained(model: Llama, options: argparse.Namespace) -> tuple[Llama, list[float]]:
    """The model after training on fresh rows: the questions' cross entropy, and a tenth of all other tokens'."""
    graph, parameters = nnx.split(model)
    optimizer = optimizer_of(options)

    def loss(parameters: Any, tokens: jax.Array, asked: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, parameters)(tokens[:, :-1])
        missed = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        weights = jnp.where(asked[:, :-1], 1.0, 0.0)
        return jnp.sum(missed * weights) / jnp.sum(weights) + 0.1 * jnp.mean(missed)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, memory: Any, tokens: jax.Array, asked: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(parameters, tokens, asked)
        updates, memory = optimizer.update(gradient, memory, parameters)
        return optax.apply_updates(parameters, updates), memory, value

    rng, memory, losses = np.random.default_rng(options.seed), optimizer.init(parameters), []
    total = options.short_steps + options.steps
    for number in tqdm(range(total), desc=model.config.attention.name, disable=not sys.stderr.isatty()):
        part = 4 if number < options.short_steps else 1
        make = partial(TASKS[options.task], length=options.length // part, count=options.pairs)
        rows = make(rng, options.rows * part)
        parameters, memory, value = step(parameters, memory, rows.tokens, rows.distances > 0)
        losses.append(value)
    return nnx.merge(graph, parameters), [float(value) for value in losses]


def optimizer_of(options: argparse.Namespace) -> optax.GradientTransformation:
    """Muon for matrices and AdamW for all else, each with a warm-up and a cosine."""
    steps = options.short_steps + options.steps
    rate, matrices = (
        optax.warmup_cosine_decay_schedule(0, each, steps // 10, steps)
        for each in (options.learning_rate, options.muon)
    )
    muon = optax.contrib.muon(matrices, adam_learning_rate=rate)
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def accuracy(model: Llama, make: Any, options: argparse.Namespace) -> dict[int, float]:
    """Share of right answers by the largest distance of a bin, in windows; empty bins are left out."""
    predict = jax.jit(lambda model, tokens: jnp.argmax(model(tokens), axis=-1))
    right: list[np.ndarray] = []
    far: list[np.ndarray] = []
    rng = np.random.default_rng(options.seed + 10_000)
    for _ in range(8):
        rows = make(rng, options.rows)
        found = np.asarray(predict(model, rows.tokens))[:, :-1]
        asked = rows.distances[:, :-1] > 0
        right.append((found == rows.tokens[:, 1:])[asked])
        far.append(rows.distances[:, :-1][asked])
    hits, windows = np.concatenate(right), np.concatenate(far) / options.window
    bins = zip((0, *BINS), BINS, strict=False)
    return {
        end: float(hits[inside].mean()) for begin, end in bins if (inside := (windows > begin) & (windows <= end)).any()
    }


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
