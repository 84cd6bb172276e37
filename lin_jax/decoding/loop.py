"""The compiled loop: draft, verify, accept, commit, for a batch whose rows stand at positions of their own."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance import Accepted
from lin_jax.decoding.draft import Draft, DraftContext, Drafter, Drawing
from lin_jax.decoding.dynamic import DynamicTree
from lin_jax.decoding.judges import JUDGES, Verified
from lin_jax.decoding.reading import Reading, marked, pushed
from lin_jax.decoding.sampling import Sampling, choose, log_probabilities
from lin_jax.decoding.stops import StopAutomaton
from lin_jax.decoding.tree import DraftTree
from lin_jax.models import CausalModel

# Who chose a token of the output.
TARGET, DRAFT = 1, 2
# How a row ended.
RUNNING, END_TOKEN, STOP_STRING, LENGTH, EMPTY = range(5)


@dataclass(frozen=True)
class Options:
    """What a compiled loop is made for.

    Attributes:
        tree: shape of the draft.
        sampling: how tokens are chosen.
        acceptance: which drafted tokens stand; one of `judges.JUDGES`.
        end_tokens: tokens that end a row.
    """

    tree: DraftTree | DynamicTree
    sampling: Sampling
    acceptance: str = "exact"
    end_tokens: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoopState:
    """Everything that one step hands to the next.

    Attributes:
        reading: what is left of prompt and output; every token but the root is in the recurrent states.
        root: `[B]` the newest token.
        output: `[B, M]` the tokens chosen so far.
        origin: `[B, M]` who chose each of them: TARGET or DRAFT.
        log_probs: `[B, M]` the model's log-probability of each, or None if nobody asks.
        written: `[B]` how many there are.
        limit: `[B]` how many there may be.
        rows: `[B]` number of each sequence among all that are decoded; it keys the random numbers.
        seed: of the random numbers.
        stop: `[B]` state of the stop strings' automaton.
        ending: `[B]` RUNNING, or how the row ended; EMPTY where there is no sequence.
        steps: `[B]` target steps taken.
        yields: `[B, P]` how often a step gave 1, 2, ... tokens.
    """

    reading: Reading
    root: Int[Array, " B"]
    output: Int[Array, "B M"]
    origin: Int[Array, "B M"]
    log_probs: Float[Array, "B M"] | None
    written: Int[Array, " B"]
    limit: Int[Array, " B"]
    rows: Int[Array, " B"]
    seed: UInt[Array, ""]
    stop: Int[Array, " B"]
    ending: Int[Array, " B"]
    steps: Int[Array, " B"]
    yields: Int[Array, "B P"]

    @property
    def finished(self) -> Bool[Array, " B"]:
        """Rows that are done, or empty."""
        return self.ending != RUNNING


@partial(
    jax.jit, static_argnames=("sampling", "end_tokens", "longest", "capacity", "log_probs"), donate_argnames="reading"
)
def start(
    model: CausalModel,
    reading: Reading,
    limit: Int[Array, " B"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    stops: StopAutomaton | None,
    *,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
    longest: int,
    capacity: int,
    log_probs: bool,
) -> LoopState:
    """Chooses the first token of every row from what was read; rows with a limit of zero are empty.

    A step gives `longest` tokens P at the most, a row `capacity` M.
    """
    batch = limit.shape[0]
    logits = model.logits(reading.hidden[:, None])
    positions = model.position(reading.model)[:, None]
    seen = None if reading.seen is None else reading.seen[:, None]
    first = choose(logits, positions, rows, seed, sampling, seen)
    state = LoopState(
        reading=reading,
        root=first[:, 0],
        output=jnp.zeros((batch, capacity), jnp.int32),
        origin=jnp.zeros((batch, capacity), jnp.int8),
        log_probs=jnp.zeros((batch, capacity), logits.dtype) if log_probs else None,
        written=jnp.zeros(batch, jnp.int32),
        limit=limit,
        rows=rows,
        seed=seed,
        stop=jnp.zeros(batch, jnp.int32),
        ending=jnp.where(limit > 0, RUNNING, EMPTY).astype(jnp.int8),
        steps=jnp.zeros(batch, jnp.int32),
        yields=jnp.zeros((batch, longest), jnp.int32),
    )
    accepted = Accepted(jnp.zeros((batch, 1), jnp.int32), jnp.ones(batch, jnp.int32), first)
    chances = log_probabilities(logits, first) if log_probs else None
    return _emit(state, accepted, chances, stops, end_tokens)[0]


@partial(jax.jit, static_argnames="options", donate_argnames="state")
def run(
    model: CausalModel,
    drafter: Drafter,
    state: LoopState,
    stops: StopAutomaton | None,
    max_steps: Int[Array, ""],
    waiting: Bool[Array, ""],
    *,
    options: Options,
) -> tuple[LoopState, Int[Array, ""]]:
    """Steps until every row is finished, or `max_steps` are done, or a row is free that another one waits for.

    Also how many steps were taken.
    """

    def goes_on(carry: tuple[Array, LoopState]) -> Array:
        finished = carry[1].finished
        return (carry[0] < max_steps) & ~jnp.all(finished) & ~(waiting & jnp.any(finished))

    def body(carry: tuple[Array, LoopState]) -> tuple[Array, LoopState]:
        return carry[0] + 1, _step(model, drafter, carry[1], stops, options)

    steps, state = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), state))
    return state, steps


def _step(
    model: CausalModel, drafter: Drafter, state: LoopState, stops: StopAutomaton | None, options: Options
) -> LoopState:
    """One target step: a tree is grown, verified, its longest valid path accepted and committed."""
    reading = state.reading
    after_root = model.position(reading.model) + 1
    judge = JUDGES[options.acceptance]
    drawing = Drawing(after_root, state.rows, state.seed, options.sampling.temperature) if judge.draws else None
    context = DraftContext(state.root, reading.hidden, reading.recent, reading.model)
    draft = options.tree.grow(drafter, context, reading.drafter, drawing)
    hidden, nodes = model.verify(jnp.maximum(draft.tokens, 0), draft.tree, reading.model)
    logits = model.logits(hidden)
    seen = None if reading.seen is None else _seen_on_path(reading.seen, draft)
    verified = Verified(draft, logits, after_root, state.rows, state.seed, seen)
    accepted = judge.accept(verified, options.tree, options.sampling)
    chances = None
    if state.log_probs is not None:
        along_path = jnp.take_along_axis(logits, accepted.path[:, :, None], axis=1)
        chances = log_probabilities(along_path, accepted.emitted)
    path = jnp.take_along_axis(draft.tokens, accepted.path, axis=1)
    state, count = _emit(state, accepted, chances, stops, options.end_tokens)
    last = jnp.take_along_axis(accepted.path, jnp.maximum(count - 1, 0)[:, None], axis=1)
    reached = jnp.take_along_axis(hidden, last[:, :, None], axis=1)[:, 0]
    return replace(
        state,
        reading=replace(
            state.reading,
            model=model.commit(reading.model, nodes, accepted.path, count),
            drafter=drafter.commit(reading.drafter, path, count),
            hidden=jnp.where((count > 0)[:, None], reached, reading.hidden),
        ),
        steps=state.steps + (count > 0),
        yields=state.yields.at[jnp.arange(count.shape[0]), jnp.maximum(count - 1, 0)].add(
            (count > 0).astype(jnp.int32)
        ),
    )


def _emit(
    state: LoopState,
    accepted: Accepted,
    chances: Float[Array, "B P"] | None,
    stops: StopAutomaton | None,
    end_tokens: tuple[int, ...],
) -> tuple[LoopState, Int[Array, " B"]]:
    """Writes the emitted tokens behind each row, up to its end; also how many there were."""
    tokens = accepted.emitted.astype(jnp.int32)
    order = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    room = jnp.where(state.finished, 0, state.limit - state.written)
    count = jnp.minimum(accepted.length, room)
    ends = jnp.isin(tokens, jnp.asarray(end_tokens, jnp.int32)) & (order < count[:, None])
    ended = jnp.any(ends, axis=1)
    count = jnp.where(ended, jnp.argmax(ends, axis=1) + 1, count)
    stop, stopped = state.stop, jnp.zeros_like(ended)
    if stops is not None:
        first, stop = stops.find(state.stop, tokens, count)
        stopped = first < count
        count = jnp.where(stopped, first + 1, count)
    count = count.astype(jnp.int32)
    kept = order < count[:, None]
    slots = jnp.where(kept, state.written[:, None] + order, state.output.shape[1])
    rows = jnp.arange(slots.shape[0])[:, None]
    origin = jnp.where(order < accepted.length[:, None] - 1, DRAFT, TARGET).astype(state.origin.dtype)
    written = state.written + count
    ending = jnp.where(written >= state.limit, LENGTH, RUNNING)
    ending = jnp.where(stopped, STOP_STRING, jnp.where(ended, END_TOKEN, ending))
    newest = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    log_probs = state.log_probs
    if log_probs is not None and chances is not None:
        log_probs = log_probs.at[rows, slots].set(chances.astype(log_probs.dtype), mode="drop")
    return replace(
        state,
        reading=replace(
            state.reading,
            recent=pushed(state.reading.recent, tokens, count),
            seen=marked(state.reading.seen, tokens, kept),
        ),
        root=jnp.where(count > 0, newest, state.root),
        output=state.output.at[rows, slots].set(tokens, mode="drop"),
        origin=state.origin.at[rows, slots].set(origin, mode="drop"),
        log_probs=log_probs,
        written=written,
        stop=stop.astype(state.stop.dtype),
        ending=jnp.where(state.finished, state.ending, ending).astype(state.ending.dtype),
    ), count


def _seen_on_path(seen: Bool[Array, "B V"], draft: Draft) -> Bool[Array, "B N V"]:
    """Which tokens occur before the token that follows each node: in the text, or on the path to the node."""
    batch, size = draft.tokens.shape
    ancestors = jnp.broadcast_to(draft.tree.ancestors, (batch, size, size))
    tokens = jnp.where(ancestors & (draft.tokens >= 0)[:, None], draft.tokens[:, None], seen.shape[1])
    rows, nodes = jnp.arange(batch)[:, None, None], jnp.arange(size)[:, None]
    before = jnp.broadcast_to(seen[:, None], (batch, size, seen.shape[1]))
    return before.at[rows, nodes, tokens].set(True, mode="drop")
