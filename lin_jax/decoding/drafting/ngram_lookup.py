"""Search for earlier occurrences of the last few tokens, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Longest n-gram that is looked up in the text itself.
LOOKED_UP = 3
# Longest match at which the loop of plain steps can be told to return.
LONGEST_ALERT = 16
# Largest number of rows whose matches the loop watches: of more, that takes as long as a tenth of a small model's step.
MOST_WATCHED_ROWS = 4


class Matches(NamedTuple):
    """Earlier occurrences of the last tokens, best first: the longest, and of equals the latest.

    Attributes:
        followers: `[B, M, D]` the tokens that followed each of them.
        sizes: `[B, M]` number of last tokens that agree, 0 where there is no such occurrence.
    """

    followers: Int[Array, "B M D"]
    sizes: Int[Array, "B M"]


def find_matches(recent: Int[Array, "B W"], depth: int, max_match: int, count: int) -> Matches:
    """Finds the best earlier occurrences of the last up to `max_match` tokens of each row.

    Where a copy runs into the end of the text it continues with its own beginning, as a text that repeats itself would.

    Args:
        recent: `[B, W]` the end of each text, -1 before its beginning.
        depth: number of tokens D to copy.
        max_match: largest number of tokens to compare.
        count: number of occurrences M to return.
    """
    width = recent.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)
    # Slices of one padded text: they are read in place.
    padded = jnp.pad(recent, ((0, 0), (max_match, 0)), constant_values=-1)
    agree = (index < width - 1) & (recent >= 0)
    sizes = jnp.zeros(recent.shape, jnp.int32)
    for back in range(max_match):
        shifted = padded[:, max_match - back :][:, :width]
        agree = agree & (shifted == shifted[:, -1:]) & (shifted >= 0)
        sizes = sizes + agree
    best = _largest(sizes * width + index, count)
    ends = best % width
    period = width - 1 - ends
    source = ends[:, :, None] + 1 + jnp.arange(depth) % jnp.maximum(period, 1)[:, :, None]
    followers = jnp.take_along_axis(recent[:, None, :], jnp.minimum(source, width - 1), axis=2)
    return Matches(followers, best // width)


def longest_match(recent: Int[Array, "B W"], most: int, looked_up: int | None = None) -> Int[Array, " B"]:
    """Number of last tokens of each row that an earlier place has too, at most `most`.

    Args:
        recent: `[B, W]` the end of each text, -1 before its beginning.
        most: largest number of tokens to compare.
        looked_up: take the place where a lookup of the longest known n-gram up to this length ends: the latest of those
            that agree as far. None takes the place that agrees longest.
    """
    sizes = _match_sizes(recent, most)
    return jnp.max(sizes, axis=1, initial=0) if looked_up is None else _looked_up(sizes, most, looked_up)


class MatchWatch(NamedTuple):
    """Search for a match with earlier text that goes on with every token, at a fraction of the cost of a new search.

    At every distance back from the newest token it knows how many of the last tokens agree with those that far before
    them: one more for each new token that agrees, and none again after one that does not.

    Attributes:
        text: `[B, W + R]` the end of each text, and room for the tokens to come.
        sizes: `[B, W - 1]` last tokens that agree with the place at each distance, the farthest first, at most
            `LONGEST_ALERT`.
        found: `[B]` the same of the place that a lookup would copy from, the latest of those that agree in up to
            `LOOKED_UP` tokens.
    """

    text: Int[Array, "B T"]
    sizes: Int[Array, "B D"]
    found: Int[Array, " B"]

    @classmethod
    def begin(cls, recent: Int[Array, "B W"], room: int, wanted: Bool[Array, ""]) -> "MatchWatch":
        """Begins with the end of each text.

        Args:
            recent: `[B, W]` the end of each text, -1 before its beginning.
            room: number of tokens R that may come.
            wanted: whether anybody asks for what is found; if not, earlier tokens are not compared.
        """
        batch, width = recent.shape
        nothing = jnp.zeros((batch, width - 1), jnp.int32)
        sizes = jax.lax.cond(wanted, lambda: _match_sizes(recent, LONGEST_ALERT), lambda: nothing)
        return cls(jnp.pad(recent, ((0, 0), (0, room))), sizes, _looked_up(sizes, LONGEST_ALERT, LOOKED_UP))

    def follow(self, count: Int[Array, ""], token: Int[Array, " B"]) -> "MatchWatch":
        """Reads the next token of each row, the `count`-th, counted from 0."""
        places = self.sizes.shape[1]
        text = jax.lax.dynamic_update_slice_in_dim(self.text, token[:, None], count + places + 1, axis=1)
        before = jax.lax.dynamic_slice_in_dim(text, count + 1, places, axis=1)
        agree = (before == token[:, None]) & (before >= 0)
        sizes = jnp.where(agree, jnp.minimum(self.sizes + 1, LONGEST_ALERT), 0)
        return MatchWatch(text, sizes, _looked_up(sizes, LONGEST_ALERT, LOOKED_UP))


def _looked_up(sizes: Int[Array, "B D"], most: int, looked_up: int) -> Int[Array, " B"]:
    """Size of the match, at most `most`, at the latest place of those that agree in the most tokens up to some."""
    place = jnp.arange(sizes.shape[1], dtype=jnp.int32)
    keys = (jnp.minimum(sizes, looked_up) * sizes.shape[1] + place) * (most + 1) + sizes
    return jnp.max(keys, axis=1, initial=0) % (most + 1)


def _match_sizes(recent: Int[Array, "B W"], most: int) -> Int[Array, "B D"]:
    """Number of last tokens of each row that agree with those before and at each earlier place, at most `most`."""
    width = recent.shape[1]
    first = min(most, width) - 1
    # Only the first places reach back beyond the text: a loop over padded tokens asks for each whether it does.
    padded = jnp.pad(recent[:, :first], ((0, 0), (most, 0)), constant_values=-1)
    found = []
    for text, begin, count in ((padded, most, first), (recent, first, width - 1 - first)):
        agree = jnp.ones((recent.shape[0], count), bool)
        sizes = jnp.zeros((recent.shape[0], count), jnp.int32)
        for back in range(min(most, width)):
            token = text[:, begin - back : begin - back + count]
            agree = agree & (token == recent[:, width - 1 - back, None]) & (token >= 0)
            sizes = sizes + agree
        found.append(sizes)
    return jnp.concatenate(found, axis=1)


def _largest(keys: Int[Array, "B W"], count: int) -> Int[Array, "B M"]:
    """Largest keys of each row, none of which occurs twice; 0 where there are no more.

    `top_k` sorts all of a row on a CPU, which takes as long as a small model's step.
    """

    def following(last: Int[Array, " B"], _: None) -> tuple[Array, Array]:
        found = jnp.max(keys, axis=1, initial=-1, where=keys < last[:, None])
        return found, found

    above_all = jnp.full(keys.shape[0], jnp.iinfo(keys.dtype).max, keys.dtype)
    return jnp.maximum(jax.lax.scan(following, above_all, None, count)[1].T, 0)
