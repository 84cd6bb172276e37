"""A small model, and a drafter that knows what plain decoding will say."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import DraftTree
from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel
from lin_jax.models import Llama, LlamaConfig

VOCABULARY = 29
GROUP = 8
NEW = 37
TREE = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0), (1, 0, 0)))


def build_model(
    attention: str | AttentionConfig = "augmented", seed: int = 0, layers: int = 2, dtype: str = "float64"
) -> Llama:
    if isinstance(attention, str):
        attention = AttentionConfig(attention, GROUP, 7, initial_alpha=0.4)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        initializer_range=0.5,
        attention=attention,
        dtype=dtype,
        param_dtype=dtype,
    )
    return Llama(config, rngs=nnx.Rngs(seed))


class KnowingDrafter(Stateless):
    """Knows what plain decoding will say, and guesses it at ranks and up to depths that change from place to place.

    It finds its row and place by looking back at the last tokens, which must tell texts and places apart.
    """

    depth = 4
    width = 3
    lookback = 64

    def __init__(self, truth: np.ndarray, seed: int, right: float) -> None:
        self.truth = nnx.Variable(jnp.asarray(truth, jnp.int32))
        rng = np.random.default_rng(seed)
        self.rank = nnx.Variable(jnp.asarray(rng.integers(0, 3, truth.shape)))
        self.right = nnx.Variable(jnp.asarray(rng.random(truth.shape) < right))

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, Any]:
        """Which text each row is, and how far it has come."""
        texts = self.truth[...]
        ends = jnp.arange(1, texts.shape[1] + 1)
        windows = jnp.pad(texts, ((0, 0), (self.lookback, 0)), constant_values=-1)
        windows = jnp.stack([windows[:, end : end + self.lookback] for end in range(1, texts.shape[1] + 1)], axis=1)
        same = jnp.all(windows[None] == context.recent[:, None, None], axis=3)
        flat = jnp.argmax(same.reshape(same.shape[0], -1), axis=1)
        return (flat // texts.shape[1], ends[flat % texts.shape[1]]), None

    def expand(self, shared: Any, carried: Any, level: TreeLevel) -> tuple[Guesses, Any]:
        """The truth at its rank if this is a place to be right at, and wrong tokens elsewhere."""
        text, length = shared
        ahead = jnp.minimum(length + level.depth, self.truth.shape[1] - 1)
        token, rank, right = (table[...][text, ahead][:, None] for table in (self.truth, self.rank, self.right))
        ranks = jnp.arange(level.ranks)
        found = jnp.where((ranks == rank) & right, token, (token + 1 + ranks) % VOCABULARY)
        tokens: Array = jnp.broadcast_to(found[:, None], (*level.tokens.shape, level.ranks))
        log_probs = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.15]))[: level.ranks], tokens.shape)
        return Guesses(tokens, log_probs if level.scored else None), None


def padded(prompts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
    """Whole texts as rows of one array."""
    rows = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
