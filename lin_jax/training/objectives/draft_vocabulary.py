"""Tokens that a path head with a trimmed vocabulary can guess: the most frequent of its training text."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
from jaxtyping import Int

from lin_jax.errors import UserError

# Batches in which tokens are counted, at most, and tokens that are enough.
MOST_BATCHES, ENOUGH_TOKENS = 256, 2_000_000


def count_tokens(batches: Iterator[Any], vocab_size: int) -> Int[np.ndarray, " V"]:
    """Occurrences of every token in the first of some batches."""
    counts = np.zeros(vocab_size, np.int64)
    for batch in islice(batches, MOST_BATCHES):
        counts += np.bincount(np.asarray(batch["tokens"]).ravel(), minlength=vocab_size)[:vocab_size]
        if counts.sum() >= ENOUGH_TOKENS:
            break
    return counts


def frequent_tokens(counts: Int[np.ndarray, " V"], wanted: int) -> tuple[int, ...]:
    """The most frequent tokens, of equals the first, in ascending order.

    Raises:
        UserError: there are fewer tokens.
    """
    if wanted > len(counts):
        raise UserError(f"heads.vocabulary is {wanted}, and the model has {len(counts)} tokens; give at most that")
    return tuple(sorted(np.argsort(-counts, kind="stable")[:wanted].tolist()))


def tokens_as_text(tokens: Sequence[int]) -> str:
    """Ascending tokens as ranges, such as `0-255,300`."""
    ends = [at for at, (one, other) in enumerate(pairwise(tokens)) if other != one + 1]
    ranges = zip([0, *(end + 1 for end in ends)], [*ends, len(tokens) - 1], strict=True)
    return ",".join(f"{tokens[a]}-{tokens[b]}" if a < b else str(tokens[a]) for a, b in ranges)


def tokens_from_text(text: str, vocab_size: int) -> tuple[int, ...]:
    """Tokens from ranges as `tokens_as_text` writes them.

    Raises:
        UserError: the text is none of ascending ranges of tokens.
    """
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        found = []
    if not found or found[0] < 0 or found[-1] >= vocab_size or any(np.diff(found) < 1):
        raise UserError(
            f"heads.tokens '{text[:40]}' are no ascending ranges of the {vocab_size} tokens; give some as in 0-255,300"
        )
    return tuple(found)
