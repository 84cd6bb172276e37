"""Comparison of two decodings of a prompt: first difference, ties within rounding, distance of recurrent states."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lin_jax.attention.state import AugmentedState
from lin_jax.attention.windowed_state import WindowedState
from lin_jax.decoding.engine.sampling import Sampling, perturb
from lin_jax.decoding.engine.slots import bucket
from lin_jax.models import CausalModel

ComparedState = AugmentedState | WindowedState
# Difference, relative to the largest logit, that the order of summation may cause: some hundred units in the last
# place, and in bfloat16, where sums are float32 and only intermediate results are rounded, a few.
ROUNDING = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 3e-2}


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two sequences differ, None if they are equal."""
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
    """Checks whether two continuations part at a token that rounding in the model's dtype decides.

    Either the (penalised and perturbed) logits of the two candidates are equal within rounding, or one of them stands
    so near the threshold of top-p or min-p that rounding decides whether it passes.

    Args:
        model: the target.
        prompt: token ids before both continuations.
        one: token ids of a continuation.
        other: token ids of another, by the same sampling and seed.
        sampling: options by which tokens were chosen.
        seed: seed of the random numbers.
        row: index of the prompt among those decoded together.
    """
    index = first_difference(one, other)
    if index is None or index >= min(len(one), len(other)):
        return False
    text = [*prompt, *one[:index]]
    padded = np.zeros((1, bucket(len(text), 64)), np.int32)
    padded[0, : len(text)] = text
    logits = _logits(model, jnp.asarray(padded), jnp.int32(len(text) - 1))
    seen = jnp.zeros(logits.shape, bool).at[0, 0, jnp.asarray(text)].set(True)
    rounding = ROUNDING[jnp.dtype(model.config.dtype).name]

    def scores(sampling: Sampling) -> np.ndarray:
        position, rows = jnp.asarray([[len(text)]]), jnp.asarray([row])
        return np.asarray(perturb(logits, position, rows, jnp.uint32(seed), sampling, seen))[0, 0]

    pair = [one[index], other[index]]
    if sampling.temperature:
        edges = [scores(_filtering(sampling, nudge)) for nudge in (rounding, -rounding)]
        if {int(each.argmax()) for each in edges} == set(pair):
            return True
    first, second = (float(value) for value in scores(sampling)[pair])
    return abs(first - second) <= rounding * max(float(jnp.abs(logits).max()), 1.0)


def state_difference(one: ComparedState, other: ComparedState) -> float:
    """Largest difference between two states of the same rows, relative to the largest number of its array.

    It is 0 for states that are equal to the bit, and infinite for states after different numbers of tokens. Slots of
    an unfinished group that hold no token are ignored; those of a window hold the same in both, in use or not.
    """
    position = np.asarray(one.position)
    if not np.array_equal(position, np.asarray(other.position)):
        return float("inf")
    in_groups, later = isinstance(one, AugmentedState), ("decays", "convolved", "sink_keys", "sink_values")
    largest = 0.0
    for name in ("memory", "keys", "values", *(("window",) if in_groups else later)):
        if getattr(one, name) is None or not getattr(one, name).size:
            continue
        left, right = (np.asarray(getattr(state, name)).astype(np.float64) for state in (one, other))
        if in_groups and name in ("keys", "values"):
            used = np.arange(left.shape[-3]) < (position % left.shape[-3])[..., None]
            left, right = (np.where(used[..., None, None], part, 0) for part in (left, right))
        largest = max(largest, float(np.abs(left - right).max()) / max(float(np.abs(right).max()), 1e-30))
    return largest


@jax.jit
def _logits(model: CausalModel, tokens: Int[Array, "1 T"], last: Int[Array, ""]) -> Float[Array, "1 1 V"]:
    """Logits after the token at `last`; what follows it is padding, which a causal model does not see."""
    hidden = jax.lax.dynamic_slice_in_dim(model.hidden(tokens), last, 1, axis=1)
    return model.logits(hidden)


def _filtering(sampling: Sampling, nudge: float) -> Sampling:
    """Sampling with top-p and min-p a little more permissive, or with a negative nudge a little stricter."""
    top_p = sampling.top_p + nudge if sampling.top_p < 1 else 1.0
    min_p = sampling.min_p * (1 - nudge)
    return replace(sampling, top_p=min(top_p, 1.0) if top_p > 0 else sampling.top_p, min_p=min(min_p, 1.0))
