"""A T5 in int8 beside itself in float32: bytes of the files, perplexity, and the difference of logits in PyTorch.

    python benchmarks/int8_t5.py --text FILE [--steps 400] [--attention exponential+window] [--json FILE]

A small T5 learns for a few minutes to go on with a text: its encoder reads a piece of it, its decoder writes the next.
The last twentieth of the text is held out, and perplexity is that of its pieces.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lib.report import header, write
from tqdm import tqdm

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer
from lin_jax.errors import exit_cleanly
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.models import T5, T5Config

PIECE = 64  # tokens that the encoder reads, and that the decoder writes
BATCH = 16
HELD_OUT = 0.05
# Bytes and perplexity that int8 may have, as multiples of float32's.
MOST_BYTES, MOST_PERPLEXITY = 0.3, 1.01


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if int8 takes or costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="file of text")
    parser.add_argument("--steps", type=int, default=400, help="steps of training")
    parser.add_argument(
        "--attention", default="exponential+window", help="in the encoder, the decoder and between them"
    )
    parser.add_argument("--vocabulary", type=int, default=1024, help="entries of the tokenizer")
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    options = parser.parse_args(argv)
    text = Path(options.text).read_text(encoding="utf-8")
    tokenizer = Tokenizer.train([text[: 1 << 20]], options.vocabulary)
    tokens = np.concatenate(tokenizer.encode_batch(text.splitlines(keepends=True)))
    pieces = tokens[: len(tokens) // (2 * PIECE) * 2 * PIECE].reshape(-1, 2, PIECE)
    count = max(int(len(pieces) * HELD_OUT), BATCH) // BATCH * BATCH
    model = trained(
        T5(config(tokenizer.vocab_size, options.attention), rngs=nnx.Rngs(0)), pieces[:-count], options.steps
    )
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        for weights in ("stored", "int8"):
            folder = save_pretrained(model, Path(temporary) / weights, weights=weights)
            rows[weights] = measured(folder, pieces[-count:])
    first, second = rows.values()
    ratios = {name: second[name] / first[name] for name in ("bytes", "perplexity")}
    report: dict[str, Any] = header("int8_t5") | {"options": vars(options), "rows": rows, "ratios": ratios}
    for name, row in rows.items():
        print(f"{name:<8}{row['bytes']:>12,} bytes   perplexity {row['perplexity']:.4f}{_theirs(row)}")
    print(
        f"int8 over float32: {ratios['bytes']:.3f} of the bytes, perplexity {100 * ratios['perplexity'] - 100:+.2f} %"
    )
    if options.json:
        write(report, options.json)
    return int(ratios["bytes"] > MOST_BYTES or ratios["perplexity"] > MOST_PERPLEXITY)


def config(vocab_size: int, attention: str) -> T5Config:
    """A T5 1.1 of 1.6 million parameters, with one table for the embedding and the head."""
    kind = AttentionConfig(attention, group_size=16)
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 384, "num_layers": 3, "num_heads": 4}
    places = {f"{place}_attention": kind for place in ("encoder", "decoder", "cross")}
    return T5Config(vocab_size, feed_forward="gated-gelu", **sizes, **places)  # type: ignore[arg-type]


def trained(model: T5, pieces: np.ndarray, steps: int) -> T5:
    """The model after steps on random pairs of pieces `[N, 2, PIECE]`."""
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 12, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)
    step = nnx.jit(_step, donate_argnums=(0, 1))
    draw = np.random.default_rng(0)
    bar = tqdm(range(steps), unit="step")
    for number in bar:
        loss = step(model, optimizer, jnp.asarray(pieces[draw.integers(0, len(pieces), BATCH)]))
        if number % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return model


def _loss(model: T5, pairs: jax.Array) -> jax.Array:
    """Mean loss of the second pieces `[B, 2, PIECE]` behind the first."""
    logits = model(pairs[:, 0], model.decoder_inputs(pairs[:, 1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, pairs[:, 1]).mean()


def _step(model: T5, optimizer: nnx.Optimizer, pairs: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(_loss)(model, pairs)
    optimizer.update(model, gradients)
    return loss


def measured(folder: Path, pieces: np.ndarray) -> dict[str, Any]:
    """Bytes of a folder's weights, perplexity of the pieces, and how far PyTorch's logits are from ours."""
    model = from_pretrained(folder)
    graph, state = nnx.split(model)
    loss = jax.jit(lambda state, pairs: _loss(nnx.merge(graph, state), pairs))
    losses = [float(loss(state, jnp.asarray(batch))) for batch in pieces.reshape(-1, BATCH, 2, PIECE)]
    return {
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "perplexity": math.exp(np.mean(losses)),
        **_in_pytorch(folder, model, pieces[:4]),
    }


def _in_pytorch(folder: Path, model: T5, pieces: np.ndarray) -> dict[str, float]:
    """The largest difference of logits, and the logits' spread; nothing where there is no PyTorch."""
    try:
        import torch
        from transformers import AutoModelForSeq2SeqLM
    except ImportError:
        return {}
    inputs = (pieces[:, 0], np.asarray(model.decoder_inputs(jnp.asarray(pieces[:, 1]))))
    ours = np.asarray(model(*map(jnp.asarray, inputs)))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        names = ("input_ids", "decoder_input_ids")
        found = theirs(**dict(zip(names, map(partial(torch.tensor, dtype=torch.long), inputs), strict=True))).logits
    return {"difference": float(np.abs(found.numpy() - ours).max()), "spread": float(ours.std())}


def _theirs(row: dict[str, Any]) -> str:
    if "difference" not in row:
        return ""
    return f"   PyTorch's logits within {row['difference']:.1e} (their spread: {row['spread']:.2f})"


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
