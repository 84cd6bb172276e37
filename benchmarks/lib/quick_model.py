"""A LLaMA trained on the spot for a few seconds, and a draft head fitted to it, where no trained model is at hand."""

import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.params import abstract_model, filled
from lin_jax.training.config import OptimizerConfig
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.optimizer import build_optimizer
from lin_jax.training.train_step import TrainState, make_step

ROOT = Path(__file__).parents[2]
OWN = ("lin_jax", "pallas_kernels", "benchmarks", "tests", "docs")
# Of the documents, held out for prompts.
HELD_OUT = 0.05
LEARNING_RATE, WARM_UP = 6e-4, 30


@dataclass(frozen=True)
class WordText:
    """Documents as numbers of words, spaces and marks; those that are not frequent enough are number 0.

    Attributes:
        train: documents to learn from, one after the other.
        held_out: documents to begin prompts with.
        unknown: share of words that are number 0.
    """

    train: np.ndarray
    held_out: list[list[int]]
    unknown: float

    @classmethod
    def of(cls, documents: Iterable[str], vocabulary: int) -> "WordText":
        """Numbers the words by frequency; the documents are shuffled before some are held out."""
        pieces = [re.findall(r"\w+| +|\s|[^\w\s]", text) for text in documents]
        random.Random(0).shuffle(pieces)
        counts = Counter(word for words in pieces for word in words)
        numbers = {word: number for number, (word, _) in enumerate(counts.most_common(vocabulary - 1), 1)}
        rows = [[numbers.get(word, 0) for word in words] for words in pieces]
        few = max(int(HELD_OUT * len(rows)), 1)
        train = np.array([number for row in rows[few:] for number in row], np.int32)
        return cls(train, rows[:few], float(np.mean(train == 0)) if train.size else 0.0)

    def batch(self, rows: int, length: int, step: int) -> np.ndarray:
        """Tokens `[B, T + 1]` from places at random."""
        if len(self.train) <= length + 1:
            raise UserError(f"the text has {len(self.train)} tokens; give a longer one than {length + 1}")
        begins = np.random.default_rng(step).integers(0, len(self.train) - length - 1, rows)
        return self.train[begins[:, None] + np.arange(length + 1)]

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Beginnings of places in the held-out documents, evenly apart."""
        text = [number for row in self.held_out for number in row]
        if len(text) <= length:
            raise UserError(f"the held-out text has {len(text)} tokens; give a longer text, or shorter prompts")
        begins = np.linspace(0, len(text) - length - 1, count).astype(int)
        return [text[begin : begin + length] for begin in begins]


def own_documents() -> list[str]:
    """The sources and documents of this repository."""
    files = [path for folder in OWN for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".md")]
    return [path.read_text(encoding="utf-8", errors="replace") for path in [*files, *sorted(ROOT.glob("*.md"))]]


def quick_config(sizes: dict[str, int]) -> LlamaConfig:
    """A LLaMA with augmented attention that computes in bfloat16."""
    return LlamaConfig(**sizes, attention=AttentionConfig("augmented", initial_alpha=0.1), dtype="bfloat16")


def trained_model(
    config: LlamaConfig, text: WordText, *, rows: int, length: int, steps: int, seconds: float
) -> tuple[Llama, dict[str, Any]]:
    """Trains a model from scratch.

    Args:
        config: of the model.
        text: what it learns.
        rows: of a batch.
        length: tokens of a row.
        steps: of training at most.
        seconds: of training at most, the compiling left out.

    Returns:
        the model, and figures: steps, seconds, first and last loss.
    """
    objective = NextToken(config)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=WARM_UP), steps)
    begin = jax.jit(lambda key: TrainState.new(objective.start(key, None), optimizer, key))
    state = begin(jax.random.key(0))
    step = make_step(objective, optimizer)
    losses: list[float] = []
    began = time.perf_counter()
    while len(losses) < steps and (len(losses) < 2 or time.perf_counter() - began < seconds):
        state, figures = step(state, {}, {"tokens": text.batch(rows, length, len(losses))})
        losses.append(float(figures.loss))
        if len(losses) == 1:
            began = time.perf_counter()
    spent = time.perf_counter() - began
    figures = {"steps": len(losses), "seconds": spent, "losses": [losses[0], float(np.mean(losses[-10:]))]}
    return filled(abstract_model(config), state.params), figures


def save_leaves(tree: Any, file: Path) -> None:
    """Keeps the arrays of a tree, in order."""
    written = file.with_suffix(".part.npz")
    np.savez(written, *(np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)))
    written.replace(file)


def load_leaves(like: Any, file: Path) -> Any:
    """A tree with the arrays that `save_leaves` kept, in the types of another like it."""
    with np.load(file) as kept:
        arrays = [kept[name] for name in kept.files]
    leaves, structure = jax.tree.flatten(like)
    if [each.shape for each in leaves] != [each.shape for each in arrays]:
        raise UserError(f"{file} is of another model; remove it")
    pairs: Sequence[tuple[Any, Any]] = list(zip(leaves, arrays, strict=True))
    return jax.tree.unflatten(structure, [jax.numpy.asarray(array, leaf.dtype) for leaf, array in pairs])
