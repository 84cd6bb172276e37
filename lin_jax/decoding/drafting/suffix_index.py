"""Index of texts by their contexts, read backwards: finds the longest matches of a text's end, on the device.

Every place of the texts that another token follows is sorted by the tokens before it, the nearest first. The places
whose contexts share the longest suffix with a text then lie next to each other, around the place where the text itself
would be sorted in (a suffix array, Manber and Myers 1993, of the reversed texts). One binary search finds them, at a
cost that grows with the logarithm of the texts' length; sorting is the host's, between two runs of the compiled loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

# Tokens of context that are sorted and compared; a power of two.
MAX_MATCH = 32


class SuffixIndex(NamedTuple):
    """Sorted texts, in arrays of fixed size.

    Attributes:
        tokens: `[MAX_MATCH + C]` the texts, with -1 before the first, after each, and where nothing is.
        order: `[C]` places in `tokens`, sorted by context, of equal contexts the latest first; the rest is 0.
        filled: number of sorted places.
    """

    tokens: Int[Array, " N"]
    order: Int[Array, " C"]
    filled: Int[Array, ""]


class SuffixMatches(NamedTuple):
    """Places whose contexts share the longest suffixes with a text, best first: the longest, and of equals the latest.

    Attributes:
        followers: `[B, M, D]` the tokens that followed each of them; -1 after the end of its text.
        sizes: `[B, M]` number of last tokens that agree, 0 where there is no such place.
        places: `[B, M]` place in the index's tokens of the last of those tokens.
    """

    followers: Int[Array, "B M D"]
    sizes: Int[Array, "B M"]
    places: Int[Array, "B M"]


def build_index(texts: list[np.ndarray], capacity: int) -> SuffixIndex:
    """Sorts texts, which with one token more for each must fit into the capacity C."""
    tokens = np.full(MAX_MATCH + capacity, -1, np.int32)
    end = MAX_MATCH
    for text in texts:
        tokens[end : end + len(text)] = text
        end += len(text) + 1
    order = np.zeros(capacity, np.int32)
    places = sorted_places(tokens[:end])
    order[: len(places)] = places
    return SuffixIndex(jnp.asarray(tokens), jnp.asarray(order), jnp.asarray(len(places), jnp.int32))


def sorted_places(tokens: Int[np.ndarray, " N"]) -> Int[np.ndarray, " n"]:
    """Places with a token that another follows, sorted by the last MAX_MATCH tokens up to there, the newest first.

    Contexts are compared by prefix doubling: ranks of 2h tokens follow from two ranks of h tokens.
    """
    places = np.flatnonzero((tokens[:-1] >= 0) & (tokens[1:] >= 0))
    ranks = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    width = 1
    while width < MAX_MATCH and ranks.max(initial=0) + 1 < len(ranks):
        before = np.zeros_like(ranks)
        before[width:] = ranks[:-width]
        ranks = np.unique(ranks * len(ranks) + before, return_inverse=True)[1]
        width *= 2
    latest_first = places[::-1]
    return latest_first[np.argsort(ranks[latest_first], kind="stable")]


def search(index: SuffixIndex, recent: Int[Array, "B W"], depth: int, count: int) -> SuffixMatches:
    """Finds the places whose contexts agree longest with the end of each text.

    All places of the longest match are found if there are up to `count` of them; of more, those that lie next to the
    text in the order of contexts.

    Args:
        index: the sorted texts.
        recent: `[B, W]` the end of each text, -1 before its beginning.
        depth: number of following tokens D to return.
        count: number of places M to return.
    """
    back = jnp.arange(MAX_MATCH, dtype=jnp.int32)
    pattern = _last_tokens(recent)

    def narrow(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        context = index.tokens[index.order[middle][:, None] - back]
        first = jnp.argmax(context != pattern, axis=1)[:, None]
        less = jnp.take_along_axis(context, first, axis=1) < jnp.take_along_axis(pattern, first, axis=1)
        less, going = less[:, 0], low < high
        return jnp.where(going & less, middle + 1, low), jnp.where(going & ~less, middle, high)

    begin = jnp.zeros(recent.shape[0], jnp.int32)
    steps = index.order.shape[0].bit_length()
    insertion = jax.lax.fori_loop(0, steps, narrow, (begin, jnp.broadcast_to(index.filled, begin.shape)))[0]
    around = insertion[:, None] + jnp.arange(-count, count, dtype=jnp.int32)
    there = (around >= 0) & (around < index.filled)
    places = index.order[jnp.clip(around, 0, index.order.shape[0] - 1)]
    agree = (index.tokens[places[:, :, None] - back] == pattern[:, None]) & (pattern >= 0)[:, None]
    sizes = jnp.where(there, jnp.sum(jnp.cumprod(agree, axis=2, dtype=jnp.int32), axis=2, dtype=jnp.int32), 0)
    best, chosen = jax.lax.top_k(sizes * index.tokens.shape[0] + jnp.where(there, places, 0), count)
    ends = jnp.take_along_axis(places, chosen, axis=1)
    after = ends[:, :, None] + 1 + jnp.arange(depth, dtype=jnp.int32)
    followers = index.tokens.at[after].get(mode="fill", fill_value=-1)
    inside = jnp.cumprod(followers >= 0, axis=2, dtype=jnp.int32) > 0
    return SuffixMatches(jnp.where(inside, followers, -1), best // index.tokens.shape[0], ends)


def _last_tokens(recent: Int[Array, "B W"]) -> Int[Array, "B L"]:
    """Last MAX_MATCH tokens of each text, the newest first."""
    missing = max(MAX_MATCH - recent.shape[1], 0)
    padded = jnp.pad(recent, ((0, 0), (missing, 0)), constant_values=-1)
    return jnp.flip(padded[:, -MAX_MATCH:], axis=1)
