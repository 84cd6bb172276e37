"""Log-probabilities of continuations: prefixes that several share are read once, and their states continued."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lin_jax.decoding.engine.prefill import chunk_sizes
from lin_jax.decoding.engine.programs import Flat
from lin_jax.decoding.engine.slots import bucket
from lin_jax.decoding.scoring.prefix_tree import PrefixNode, build_prefix_tree
from lin_jax.errors import UserError
from lin_jax.models import CausalModel

# Numbers in the logits that are made at once: half a gigabyte in float32.
LOGITS = 2**27
# Batches that a device is given before the results of the first are waited for.
AHEAD = 2


class TokenScores(NamedTuple):
    """The model's opinion of the tokens of a continuation.

    Attributes:
        log_probs: `[N]` natural logarithm of each token's probability after those before it.
        greedy: `[N]` whether the token is the most probable one.
    """

    log_probs: Float[np.ndarray, " N"]
    greedy: Bool[np.ndarray, " N"]


class _Target(NamedTuple):
    """A token whose probability is asked for: what it follows, and the requests and places that it is for."""

    position: int
    token: int
    places: list[tuple[int, int]]


class _Entry(NamedTuple):
    """A node to be read: its targets, and the row of its parent's state."""

    node: PrefixNode
    row: int
    targets: list[_Target]


class _Level(NamedTuple):
    """Nodes that wait to be read, longest first, and the states that they go on from."""

    entries: deque[_Entry]
    states: Any


class ContinuationScorer:
    """Scores continuations of contexts with a causal model.

    All tokens that requests have in common are read once: contexts of few-shot prompts that begin with the same
    examples, and the answers to one question. What follows goes on from the model's state after them. Texts are read
    in chunks, so that a model with a state of constant size reads texts of any length in the memory of a chunk.

    Args:
        model: the model.
        batch_size: texts that are read at a time; it halves itself where a device has no memory for so many.
        chunk_size: tokens of a text that are read at a time.
        share: False reads every text from its beginning.
    """

    def __init__(self, model: CausalModel, *, batch_size: int = 16, chunk_size: int = 256, share: bool = True) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; give at least 1")
        self.model = model
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.share = share
        self.tokens_read = 0
        self._tokens_done: Callable[[int], object] | None = None
        self._modules = Flat.of(model)

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        done: Callable[[int], object] = lambda count: None,
        *,
        tokens_done: Callable[[int], object] | None = None,
    ) -> list[TokenScores]:
        """Scores the continuations of some contexts.

        Args:
            requests: token ids of a context, which must not be empty, and of what follows it.
            done: told how many more requests are finished.
            tokens_done: told how many more tokens are being read.

        Returns:
            The scores of each request's continuation, in their order.

        Raises:
            UserError: a context is empty, or the texts are longer than the model's positions.
        """
        texts = [[*context, *continuation] for context, continuation in requests]
        if not all(len(context) for context, _ in requests):
            raise UserError("a context is empty; give at least one token (the one that begins or ends a text will do)")
        # The last token is scored, and never read.
        asked = [number for number, (_, continuation) in enumerate(requests) if len(continuation)]
        found = [TokenScores(np.zeros(len(each)), np.zeros(len(each), bool)) for _, each in requests]
        done(len(requests) - len(asked))
        if asked:
            self._check_positions(max(len(texts[number]) for number in asked) - 1)
            firsts = [len(requests[number][0]) for number in asked]
            self._tokens_done = tokens_done

            def finished(result: _Result) -> None:
                result.write(found)
                done(result.requests)

            self._read(_Requests([texts[number] for number in asked], firsts, asked), finished)
        return found

    def _read(self, requests: "_Requests", finished: Callable[["_Result"], None]) -> None:
        """Walks through the tree of the texts, batch by batch, depth first: few states are alive at a time."""
        roots = build_prefix_tree([text[:-1] for text in requests.texts], share=self.share)
        capacity = bucket(max(map(len, requests.texts)), 64)
        blank = _init_state(self._modules, capacity)
        levels = [_Level(deque(_longest_first(requests.entries([(root, 0) for root in roots]))), blank)]
        results: deque[_Result] = deque()
        while levels:
            entries, states = levels[-1]
            if not entries:
                levels.pop()
                continue
            batch = [entries.popleft() for _ in range(min(self.batch_size, len(entries)))]
            try:
                result, after = self._read_batch(batch, states)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self.batch_size == 1:
                    raise
                self.batch_size = max(min(self.batch_size, len(batch)) // 2, 1)
                entries.extendleft(reversed(batch))
                continue
            results.append(result)
            below = [(child, row) for row, entry in enumerate(batch) for child in entry.node.children]
            if below:
                levels.append(_Level(deque(_longest_first(requests.entries(below))), after))
            while len(results) > (AHEAD if levels else 0):
                finished(results.popleft())
        while results:
            finished(results.popleft())

    def _read_batch(self, batch: Sequence[_Entry], states: Any) -> tuple["_Result", Any]:
        """Reads nodes on top of their parents' states: scores of their targets, and the states after them."""
        rows = min(_coarse(len(batch)), max(self.batch_size, len(batch)))
        parents = np.zeros(rows, np.int32)
        parents[: len(batch)] = [entry.row for entry in batch]
        state = _take_rows(states, parents)
        waiting = [deque(entry.targets) for entry in batch]
        scores: list[tuple[list[list[_Target]], Array, Array]] = []
        for begin, size in chunk_sizes(len(batch[0].node.tokens), self.chunk_size):
            tokens, lengths = np.zeros((rows, size), np.int32), np.zeros(rows, np.int32)
            for row, entry in enumerate(batch):
                chunk = entry.node.tokens[begin : begin + size]
                lengths[row] = len(chunk)
                tokens[row, : len(chunk)] = chunk
            inside = [_taken(targets, begin + size) for targets in waiting]
            state = self._read_piece(tokens, lengths, state, inside, begin, scores)
            self._count(int(lengths.sum()))
            if len(scores) > AHEAD:
                jax.block_until_ready(scores[-1 - AHEAD][1])
        return _Result([entry.node for entry in batch], scores), state

    def _read_piece(
        self,
        tokens: Int[np.ndarray, "B T"],
        lengths: Int[np.ndarray, " B"],
        state: Any,
        inside: list[list[_Target]],
        begin: int,
        scores: list[tuple[list[list[_Target]], Array, Array]],
    ) -> Any:
        """Reads a chunk and adds the scores of the targets in it; the state after it."""
        count = max(map(len, inside))
        if not count:
            return _read_chunk(self._modules, tokens, lengths, state)
        asked = np.zeros((2, len(lengths), max(_coarse(count), 4)), np.int32)
        for row, targets in enumerate(inside):
            for column, target in enumerate(targets):
                asked[:, row, column] = target.position - begin, target.token
        log_probs, greedy, state = _score_chunk(self._modules, tokens, lengths, state, *asked)
        scores.append((inside, log_probs, greedy))
        return state

    def _count(self, tokens: int) -> None:
        self.tokens_read += tokens
        if self._tokens_done is not None:
            self._tokens_done(tokens)

    def _check_positions(self, length: int) -> None:
        positions = getattr(self.model.config, "max_positions", None)
        if positions is not None and length > positions:
            raise UserError(
                f"a text of {length} tokens does not fit into the model's {positions} positions; give a shorter one"
            )


class _Requests:
    """Texts whose last tokens are to be scored.

    Args:
        texts: token ids of each.
        firsts: number of tokens before the first that is scored.
        numbers: numbers of the requests that they are.
    """

    def __init__(self, texts: list[list[int]], firsts: list[int], numbers: list[int]) -> None:
        self.texts, self.firsts, self.numbers = texts, firsts, numbers

    def entries(self, nodes: Sequence[tuple[PrefixNode, int]]) -> Iterator[_Entry]:
        """Entries of nodes, given with the row of their parent's state."""
        for node, row in nodes:
            yield _Entry(node, row, self._targets(node))

    def _targets(self, node: PrefixNode) -> list[_Target]:
        """Targets behind the tokens of a node, of all texts that pass through it."""
        targets: dict[tuple[int, int], _Target] = {}
        below = [node]
        while below:
            each = below.pop()
            below += each.children
            for text in each.ends:
                first = self.firsts[text]
                # A token is predicted at the one before it.
                for place in range(max(first, node.begin + 1), min(len(self.texts[text]), node.end + 1)):
                    key = place - 1 - node.begin, self.texts[text][place]
                    targets.setdefault(key, _Target(*key, [])).places.append((self.numbers[text], place - first))
        return sorted(targets.values(), key=lambda target: target.position)


class _Result(NamedTuple):
    """Scores of the targets of a batch, perhaps still being computed."""

    nodes: list[PrefixNode]
    scores: list[tuple[list[list[_Target]], Array, Array]]

    def write(self, found: list[TokenScores]) -> None:
        """Writes the scores to their places."""
        for inside, *arrays in self.scores:
            log_probs, greedy = jax.device_get(arrays)
            for row, targets in enumerate(inside):
                for column, target in enumerate(targets):
                    for request, place in target.places:
                        found[request].log_probs[place] = log_probs[row, column]
                        found[request].greedy[place] = greedy[row, column]

    @property
    def requests(self) -> int:
        """Number of requests that end in the batch."""
        return sum(len(node.ends) for node in self.nodes)


def _taken(targets: deque[_Target], end: int) -> list[_Target]:
    """Takes the targets before a position, which come first."""
    taken = []
    while targets and targets[0].position < end:
        taken.append(targets.popleft())
    return taken


def _longest_first(entries: Iterator[_Entry]) -> list[_Entry]:
    return sorted(entries, key=lambda entry: -len(entry.node.tokens))


def _coarse(count: int) -> int:
    """Next power of four: few sizes, so that few programs are compiled."""
    return 4 ** (((count - 1).bit_length() + 1) // 2)


@partial(jax.jit, static_argnames="capacity")
def _init_state(modules: Flat, capacity: int) -> Any:
    (model,) = modules.whole()
    return model.init_state(1, capacity)


@jax.jit
def _take_rows(states: Any, rows: Int[Array, " B"]) -> Any:
    """States of some rows; leaves have a leading layer axis."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=1), states)


@partial(jax.jit, donate_argnames="state")
def _read_chunk(modules: Flat, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], state: Any) -> Any:
    """The state after the first `lengths` tokens of each row."""
    (model,) = modules.whole()
    return model.prefill(tokens, lengths, state)[1]


@partial(jax.jit, donate_argnames="state")
def _score_chunk(
    modules: Flat,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: Any,
    positions: Int[Array, "B M"],
    targets: Int[Array, "B M"],
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"], Any]:
    """Log-probabilities of targets behind positions of a chunk, whether each is the likeliest, and the state after."""
    (model,) = modules.whole()
    hidden, state = model.prefill(tokens, lengths, state)
    asked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    rows, each = targets.size, max(LOGITS // model.config.vocab_size, 1)
    flat = asked.reshape(rows, -1), targets.reshape(rows)
    if rows <= each:
        scores = _scores(model, flat)
    else:
        pieces = jax.tree.map(lambda leaf: _in_pieces(leaf, each), flat)
        scores = jax.tree.map(lambda leaf: leaf.reshape(-1)[:rows], jax.lax.map(partial(_scores, model), pieces))
    log_probs, greedy = (leaf.reshape(targets.shape) for leaf in scores)
    return log_probs, greedy, state


def _in_pieces(leaf: Array, size: int) -> Array:
    """Rows `[R, ...]` as pieces `[P, size, ...]`, the last filled up with zeros."""
    filled = jnp.pad(leaf, ((0, -leaf.shape[0] % size), *((0, 0),) * (leaf.ndim - 1)))
    return filled.reshape(-1, size, *leaf.shape[1:])


def _scores(model: CausalModel, rows: tuple[Array, Array]) -> tuple[Array, Array]:
    hidden, targets = rows
    logits = model.logits(hidden)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
