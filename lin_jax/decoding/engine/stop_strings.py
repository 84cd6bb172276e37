"""Stop strings, found among tokens on the device: inside one token, or across several."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lin_jax.errors import UserError

# The number of states is rounded up to a multiple of this, so that other stop strings find a compiled program.
_MULTIPLE = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StopAutomaton:
    """Automaton over tokens; its state says how much of which stop string a text ends with, 0 for nothing.

    Attributes:
        following: `[S, V]` the state after a token, int16 (int32 if there are too many states).
        completes: `[S, V]` True where a stop string is completed inside the token or by its end.
    """

    following: Int[Array, "S V"]
    completes: Bool[Array, "S V"]

    def find(
        self, state: Int[Array, " B"], tokens: Int[Array, "B P"], length: Int[Array, " B"]
    ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Finds the first token that completes a stop string, and the state after it, or after all if there is none.

        A token outside the vocabulary (negative, or V and above) adds nothing to the text.

        Args:
            state: `[B]` state after the text so far.
            tokens: `[B, P]` the next tokens.
            length: `[B]` number of tokens that count.

        Returns:
            first: `[B]` index of the token, P if none completes a stop string.
            state_after: `[B]` state after the first `min(first + 1, length)` tokens.
        """
        batch, count = tokens.shape
        vocabulary = self.following.shape[1]

        def read(carry: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            current, first = carry
            index, token = item
            reads = (index < length) & (first == count) & (token >= 0) & (token < vocabulary)
            known = jnp.clip(token, 0, vocabulary - 1)
            first = jnp.where(reads & self.completes[current, known], index, first)
            return (jnp.where(reads, self.following[current, known].astype(current.dtype), current), first), None

        start = (state, jnp.full(batch, count, jnp.int32))
        (state, first), _ = jax.lax.scan(read, start, (jnp.arange(count, dtype=jnp.int32), tokens.T))
        return first, state


def stop_automaton(stops: Sequence[str], pieces: Sequence[bytes]) -> StopAutomaton:
    """Builds the automaton for a vocabulary (Aho and Corasick 1975, over UTF-8 bytes, taken a token at a time).

    Args:
        stops: the stop strings; an empty list gives an automaton that never finds anything.
        pieces: bytes that each token adds to a text, from `lin_jax.data.tokenizers.token_bytes`.

    Raises:
        UserError: a stop string is empty, or not valid Unicode.
    """
    moves, ends = _byte_automaton([_checked(stop) for stop in stops])
    states = -(-len(moves) // _MULTIPLE) * _MULTIPLE
    kind = np.int16 if states <= np.iinfo(np.int16).max else np.int32
    following = np.zeros((states, len(pieces)), kind)
    completes = np.zeros((states, len(pieces)), bool)

    # Longest tokens first: those that have a byte at some index are then the first so many.
    order = np.argsort([-len(piece) for piece in pieces], kind="stable")
    lengths = np.array([len(pieces[token]) for token in order], np.int64)
    content = np.frombuffer(b"".join(pieces[token] for token in order), np.uint8)
    offsets = np.cumsum(lengths) - lengths
    for origin in range(len(moves)):
        current, complete = np.full(len(pieces), origin, kind), np.zeros(len(pieces), bool)
        for index in range(int(lengths.max(initial=0))):
            longer = int(np.searchsorted(-lengths, -index, side="left"))
            current[:longer] = moves[current[:longer], content[offsets[:longer] + index]]
            complete[:longer] |= ends[current[:longer]]
        following[origin, order], completes[origin, order] = current, complete
    return StopAutomaton(jnp.asarray(following), jnp.asarray(completes))


def first_stop_in(text: str, stops: Sequence[str]) -> int | None:
    """Index at which the earliest stop string begins, None if there is none."""
    return min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)


def check_stops(stops: Sequence[str]) -> None:
    """Refuses invalid stop strings.

    Raises:
        UserError: a stop string is empty, or not valid Unicode.
    """
    for stop in stops:
        _checked(stop)


def _checked(stop: str) -> bytes:
    """UTF-8 bytes of a valid stop string."""
    if not stop:
        raise UserError("a stop string is empty (''); give at least one character, or leave it out")
    try:
        return stop.encode()
    except UnicodeEncodeError:
        raise UserError(f"stop string {stop!r} is not valid Unicode; give whole characters") from None


def _byte_automaton(words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Transitions `[S, 256]` for every byte, and a mask `[S]` of the states in which a word ends."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for word in words:
        state = 0
        for byte in word:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    moves = np.zeros((len(children), 256), np.int32)
    # On bytes that do not continue it, a state behaves like its longest proper suffix in the trie.
    suffix = [0] * len(children)
    queue = deque([0])
    while queue:
        state = queue.popleft()
        moves[state] = moves[suffix[state]]
        ends[state] = ends[state] or ends[suffix[state]]
        for byte, child in children[state].items():
            suffix[child] = int(moves[state, byte]) if state else 0
            moves[state, byte] = child
            queue.append(child)
    return moves, np.array(ends)
