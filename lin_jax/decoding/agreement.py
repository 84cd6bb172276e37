"""Whether two decodings of a prompt agree, and if not, whether rounding is to blame."""

from collections.abc import Sequence
from itertools import zip_longest

import jax.numpy as jnp
import numpy as np

from lin_jax.decoding.sampling import Sampling, perturb
from lin_jax.models import CausalModel

# Logits of one text, summed up in another order, differ by some hundred units in the last place.
ROUNDING = 1e-5


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two token sequences part, None if they are equal."""
    pairs = enumerate(zip_longest(one, other))
    return next((index for index, (left, right) in pairs if left != right), None)


def is_rounding_tie(
    model: CausalModel,
    prompt: Sequence[int],
    one: Sequence[int],
    other: Sequence[int],
    sampling: Sampling,
    seed: int,
    row: int = 0,
) -> bool:
    """Whether two continuations part at a token whose two candidates have (perturbed) logits equal within rounding.

    Args:
        model: the target.
        prompt: what both go on from.
        one: a continuation.
        other: another, by the same sampling and seed.
        sampling: how tokens were chosen.
        seed: of the random numbers.
        row: number of the prompt among those decoded together.
    """
    index = first_difference(one, other)
    if index is None or index >= min(len(one), len(other)):
        return False
    text = jnp.asarray([[*prompt, *one[:index]]])
    logits = model(text)[:, -1:]
    position, rows = jnp.asarray([[text.shape[1]]]), jnp.asarray([row])
    scores = np.asarray(perturb(logits, position, rows, jnp.uint32(seed), sampling))[0, 0]
    gap = abs(float(scores[one[index]]) - float(scores[other[index]]))
    return gap <= ROUNDING * max(float(jnp.abs(logits).max()), 1.0)
