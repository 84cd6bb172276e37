"""Compiled decode loop: draft, verify, accept, commit, for a batch whose rows stand at positions of their own."""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance.longest_path import Accepted
from lin_jax.decoding.acceptance.rules import ACCEPTANCE_RULES, Verified
from lin_jax.decoding.drafting.api import Draft, DraftContext, Drafter, Drawing
from lin_jax.decoding.drafting.ngram_lookup import LONGEST_ALERT, MatchWatch
from lin_jax.decoding.drafting.tree import AnyTree
from lin_jax.decoding.engine.prefill import DecodeState, append_recent, mark_seen
from lin_jax.decoding.engine.programs import Flat
from lin_jax.decoding.engine.sampling import Sampling, choose_tokens, log_probabilities
from lin_jax.decoding.engine.stop_strings import StopAutomaton
from lin_jax.models import CausalModel
from pallas_kernels.ordering import known_after


class TokenOrigin(IntEnum):
    """Source of an output token: the target's own choice, or an accepted draft; unwritten places of an array hold 0."""

    TARGET = 1
    DRAFT = 2


class RowStatus(IntEnum):
    """State of a row of the batch: it runs, has ended in one of three ways, or holds no sequence."""

    RUNNING = 0
    END_TOKEN = 1
    STOP_STRING = 2
    LENGTH = 3
    EMPTY = 4

    @property
    def label(self) -> str:
        """Name in plain lower-case words, as `Generation.endings` has it."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class DecodeOptions:
    """Static options of the compiled loop.

    Attributes:
        tree: shape of the drafts.
        sampling: sampling options.
        acceptance: name of the acceptance rule, in `ACCEPTANCE_RULES`.
        end_tokens: tokens that end a row.
    """

    tree: AnyTree
    sampling: Sampling
    acceptance: str = "exact"
    end_tokens: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoopState:
    """State of the loop between two steps.

    `slots` finds the leaf without rows by the name `seed`.

    Attributes:
        decode_state: state after prompt and output; the recurrent states have consumed every token but the root.
        root: `[B]` newest token.
        output: `[B, M]` tokens chosen so far.
        origin: `[B, M]` source of each, a `TokenOrigin`; int8.
        log_probs: `[B, M]` the model's log-probability of each, or None if not asked for.
        written: `[B]` number of output tokens.
        limit: `[B]` largest number of output tokens; 0 for an empty row.
        rows: `[B]` index of each sequence among all that are decoded; it keys the random numbers.
        seed: seed of the random numbers.
        stop: `[B]` state of the automaton of stop strings.
        status: `[B]` a `RowStatus`; int8.
        finite: `[B]` whether the numbers behind the tokens are; as NaN stays in a recurrent state, the newest tell.
        steps: `[B]` target steps taken.
        accepted_histogram: `[B, P]` number of steps that gave 1, 2, ... tokens.
    """

    decode_state: DecodeState
    root: Int[Array, " B"]
    output: Int[Array, "B M"]
    origin: Int[Array, "B M"]
    log_probs: Float[Array, "B M"] | None
    written: Int[Array, " B"]
    limit: Int[Array, " B"]
    rows: Int[Array, " B"]
    seed: UInt[Array, ""]
    stop: Int[Array, " B"]
    status: Int[Array, " B"]
    finite: Bool[Array, " B"]
    steps: Int[Array, " B"]
    accepted_histogram: Int[Array, "B P"]

    @property
    def finished(self) -> Bool[Array, " B"]:
        """Mask of the rows that have ended or are empty."""
        return self.status != RowStatus.RUNNING


@partial(
    jax.jit,
    static_argnames=("sampling", "end_tokens", "max_step_tokens", "capacity", "log_probs"),
    donate_argnames="decode_state",
)
def start(
    modules: Flat,
    decode_state: DecodeState,
    limit: Int[Array, " B"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    stops: StopAutomaton | None,
    *,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
    max_step_tokens: int,
    capacity: int,
    log_probs: bool,
) -> LoopState:
    """Chooses the first token of every row from its prompt; rows with a limit of 0 are empty.

    Args:
        modules: the target.
        decode_state: state after the prompts; its buffers are donated.
        limit: `[B]` largest number of output tokens.
        rows: `[B]` index of each sequence among all that are decoded.
        seed: seed of the random numbers.
        stops: automaton of the stop strings, or None.
        sampling: sampling options.
        end_tokens: tokens that end a row.
        max_step_tokens: largest number of tokens P that a step can give.
        capacity: size M of a row's output.
        log_probs: whether to keep log-probabilities.
    """
    (model,) = modules.whole()
    batch = limit.shape[0]
    logits = model.logits(decode_state.hidden[:, None])
    positions = model.position(decode_state.model)[:, None]
    seen = None if decode_state.seen is None else decode_state.seen[:, None]
    first = choose_tokens(logits, positions, rows, seed, sampling, seen)
    state = LoopState(
        decode_state=decode_state,
        root=first[:, 0],
        output=jnp.zeros((batch, capacity), jnp.int32),
        origin=jnp.zeros((batch, capacity), jnp.int8),
        log_probs=jnp.zeros((batch, capacity), logits.dtype) if log_probs else None,
        written=jnp.zeros(batch, jnp.int32),
        limit=limit,
        rows=rows,
        seed=seed,
        stop=jnp.zeros(batch, jnp.int32),
        status=jnp.where(limit > 0, RowStatus.RUNNING, RowStatus.EMPTY).astype(jnp.int8),
        finite=jnp.all(jnp.isfinite(logits), axis=(1, 2)),
        steps=jnp.zeros(batch, jnp.int32),
        accepted_histogram=jnp.zeros((batch, max_step_tokens), jnp.int32),
    )
    accepted = Accepted(jnp.zeros((batch, 1), jnp.int32), jnp.ones(batch, jnp.int32), first)
    token_log_probs = log_probabilities(logits, first) if log_probs else None
    return _emit(state, accepted, token_log_probs, stops, end_tokens)[0]


# Plain steps by which limits may be passed: one that is just what a step may lose must permit it however it is rounded.
_ROUNDING = 1e-3


class LossLimit(NamedTuple):
    """Limit on what the steps of one call may lose against plain decoding, in plain steps.

    Attributes:
        cost: plain steps that a step costs.
        allowance: plain steps that may be lost; the loop returns before a step that could exceed it.
    """

    cost: Float[Array, ""] | np.float32
    allowance: Float[Array, ""] | np.float32

    def permits(self, lost: Float[Array, ""]) -> Bool[Array, ""]:
        """True where one more step stays within the limit, whatever it gives; to float32's rounding."""
        return lost + self.cost - 1 <= self.allowance + _ROUNDING


# Plain steps that the loop takes at least before it returns for a match, and at most where it watches for one.
STEPS_BEFORE_ALERT, MOST_WATCHED = 4, 512


@partial(jax.jit, static_argnames="options", donate_argnames="state")
def run(
    modules: Flat,
    state: LoopState,
    stops: StopAutomaton | None,
    max_steps: Int[Array, ""],
    waiting: Bool[Array, ""],
    loss_limit: LossLimit | None = None,
    alert: Int[Array, ""] | None = None,
    *,
    options: DecodeOptions,
) -> tuple[LoopState, Int[Array, ""]]:
    """Takes steps until all rows are finished, or `max_steps` are done, or a row is free while prompts are waiting.

    Args:
        modules: the target, and the drafter that fills the tree of `options`.
        state: state of the loop; its buffers are donated.
        stops: automaton of the stop strings, or None.
        max_steps: largest number of steps.
        waiting: whether prompts wait for a free row.
        loss_limit: limit on what may be lost against plain decoding; None sets none.
        alert: last tokens at which the loop returns, when so many occurred earlier in the text, as far back as the
            drafter looks, of half the rows that run, or if no prompts wait, of all rows that decide when all is done:
            copies may pay from there; at most `MOST_WATCHED` steps are taken then. None never returns for that.
        options: static options.

    Returns:
        The new state, and the number of steps taken.
    """
    model, drafter = modules.whole()
    begun, recent = state, state.decode_state.recent
    watch = None
    if alert is not None:
        # The output's room bounds the number of tokens to come.
        room = min(state.output.shape[1], MOST_WATCHED)
        max_steps = jnp.minimum(max_steps, room)
        watch = MatchWatch.begin(recent, room, alert <= LONGEST_ALERT)
    drafts = options.tree.size > 1
    if not drafts:
        # Nobody looks back in plain steps: of many rows, to move the last tokens on at every step would take long.
        state = _with_recent(state, recent[:, :0])

    def unfinished(carry: _Carry) -> Array:
        finished = carry.state.finished
        goes_on = (carry.steps < max_steps) & ~jnp.all(finished) & ~(waiting & jnp.any(finished))
        if alert is not None and carry.watch is not None:
            alerted = _is_alerted(carry.state, carry.watch.found >= alert, waiting)
            goes_on &= ~(alerted & (carry.steps >= STEPS_BEFORE_ALERT))
        if loss_limit is None:
            return goes_on
        # The first step is allowed by the caller.
        return goes_on & ((carry.steps == 0) | loss_limit.permits(carry.lost))

    def body(carry: _Carry) -> _Carry:
        before, lost = carry.state, carry.lost
        after = _step(model, drafter, before, stops, options)
        if loss_limit is not None:
            lost = lost + loss_limit.cost - _gained(before, after, waiting)
            # What steps gain does not pay for later ones: the host is to look at what has changed.
            lost = jnp.maximum(lost, 0)
        watch = None if carry.watch is None else carry.watch.follow(carry.steps, after.root)
        return _Carry(carry.steps + 1, after, lost.astype(jnp.float32), watch)

    begin = _Carry(jnp.zeros((), jnp.int32), state, jnp.zeros((), jnp.float32), watch)
    steps, state, _, _ = jax.lax.while_loop(unfinished, body, begin)
    if not drafts:
        state = _with_recent(state, _recent_after(recent, state.output, begun.written, state.written))
    finite = state.finite & jnp.all(jnp.isfinite(state.decode_state.hidden), axis=1)
    return replace(state, finite=finite), steps


def _is_alerted(state: LoopState, repeats: Bool[Array, " B"], waiting: Bool[Array, ""]) -> Bool[Array, ""]:
    """True where half the rows that run repeat earlier text, or, if no prompts wait, all that have many tokens left."""
    running = ~state.finished
    left = jnp.where(running, state.limit - state.written, 0)
    # Drafts cost two plain steps and more: they gain nothing by rows with less than half as many tokens left.
    longest = running & (2 * left > jnp.max(left))
    half = 2 * jnp.sum(repeats & running) >= jnp.maximum(jnp.sum(running), 1)
    return jnp.where(waiting, half, jnp.all(repeats | ~longest))


def _gained(before: LoopState, after: LoopState, waiting: Bool[Array, ""]) -> Float[Array, ""]:
    """Plain steps that would have brought as much as one step did.

    Where prompts wait, that is the mean number of tokens; where none do, by how many the row with the most tokens left
    has fewer left: rows that finish early wait for it.
    """
    tokens = after.written - before.written
    mean = jnp.sum(tokens) / jnp.maximum(jnp.sum(tokens > 0), 1)
    most = [jnp.max(jnp.where(each.finished, 0, each.limit - each.written)) for each in (before, after)]
    return jnp.where(waiting, mean, jnp.minimum(most[0] - most[1], jnp.max(tokens)))


class _Carry(NamedTuple):
    """Values that the loop hands from step to step: steps taken, state, plain steps lost, and the watch for a match."""

    steps: Int[Array, ""]
    state: LoopState
    lost: Float[Array, ""]
    watch: MatchWatch | None


def _with_recent(state: LoopState, recent: Int[Array, "B W"]) -> LoopState:
    """State with other last tokens."""
    return replace(state, decode_state=replace(state.decode_state, recent=recent))


def _recent_after(
    recent: Int[Array, "B W"], output: Int[Array, "B M"], begin: Int[Array, " B"], end: Int[Array, " B"]
) -> Int[Array, "B W"]:
    """Last tokens of each row after those of its output from `begin` to `end`."""
    width = recent.shape[1]
    if not width:
        return recent
    place = jnp.arange(width, dtype=jnp.int32) + (end - begin)[:, None]
    old = jnp.take_along_axis(recent, jnp.minimum(place, width - 1), axis=1)
    index = jnp.clip(begin[:, None] + place - width, 0, output.shape[1] - 1)
    return jnp.where(place < width, old, jnp.take_along_axis(output, index, axis=1))


class DraftedStep(NamedTuple):
    """A tree on the state of the loop, before anything is committed.

    Attributes:
        draft: the tree, filled with guesses.
        hidden: `[B, N, E]` the target's hidden vectors at the nodes.
        nodes: the nodes as `commit` takes them.
        logits: `[B, N, V]` the target's logits after each node.
        accepted: the accepted path, and the tokens that it gives.
    """

    draft: Draft
    hidden: Float[Array, "B N E"]
    nodes: Any
    logits: Float[Array, "B N V"]
    accepted: Accepted


def draft_and_verify(model: CausalModel, drafter: Drafter, state: LoopState, options: DecodeOptions) -> DraftedStep:
    """Grows a tree, verifies it, and accepts its longest valid path; the state is not changed."""
    decode_state = state.decode_state
    after_root = model.position(decode_state.model) + 1
    rule = ACCEPTANCE_RULES[options.acceptance]
    drawing = Drawing(after_root, state.rows, state.seed, options.sampling.temperature) if rule.draws else None
    context = DraftContext(state.root, decode_state.hidden, decode_state.recent, decode_state.model)
    draft = options.tree.grow(drafter, context, decode_state.drafter, drawing)
    hidden, nodes = model.verify(jnp.maximum(draft.tokens, 0), draft.tree, decode_state.model)
    logits = model.logits(hidden)
    seen = None if decode_state.seen is None else _seen_on_path(decode_state.seen, draft)
    verified = Verified(draft, logits, after_root, state.rows, state.seed, seen)
    return DraftedStep(draft, hidden, nodes, logits, rule.accept(verified, options.tree, options.sampling))


def _step(
    model: CausalModel, drafter: Drafter, state: LoopState, stops: StopAutomaton | None, options: DecodeOptions
) -> LoopState:
    """Takes one target step: grows a tree, verifies it, accepts its longest valid path and commits that."""
    decode_state = state.decode_state
    draft, hidden, nodes, logits, accepted = draft_and_verify(model, drafter, state, options)
    token_log_probs = None
    if state.log_probs is not None:
        path_logits = jnp.take_along_axis(logits, accepted.path[:, :, None], axis=1)
        token_log_probs = log_probabilities(path_logits, accepted.emitted)
    path = jnp.take_along_axis(draft.tokens, accepted.path, axis=1)
    state, count = _emit(state, accepted, token_log_probs, stops, options.end_tokens)
    last = jnp.take_along_axis(accepted.path, jnp.maximum(count - 1, 0)[:, None], axis=1)
    reached = jnp.take_along_axis(hidden, last[:, :, None], axis=1)[:, 0]
    # All that reads the state is computed by then, of plain steps too, and it is changed where it lies.
    count = known_after(count, accepted.emitted)
    return replace(
        state,
        decode_state=replace(
            state.decode_state,
            model=model.commit(decode_state.model, nodes, accepted.path, count),
            drafter=drafter.commit(decode_state.drafter, path, count),
            hidden=jnp.where((count > 0)[:, None], reached, decode_state.hidden),
        ),
        steps=state.steps + (count > 0),
        accepted_histogram=state.accepted_histogram.at[jnp.arange(count.shape[0]), jnp.maximum(count - 1, 0)].add(
            (count > 0).astype(jnp.int32)
        ),
    )


def _emit(
    state: LoopState,
    accepted: Accepted,
    token_log_probs: Float[Array, "B P"] | None,
    stops: StopAutomaton | None,
    end_tokens: tuple[int, ...],
) -> tuple[LoopState, Int[Array, " B"]]:
    """Appends the emitted tokens to each row, up to its end; also returns their number."""
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
    drafted = order < accepted.length[:, None] - 1
    origin = jnp.where(drafted, TokenOrigin.DRAFT, TokenOrigin.TARGET).astype(state.origin.dtype)
    written = state.written + count
    status = jnp.where(written >= state.limit, RowStatus.LENGTH, RowStatus.RUNNING)
    status = jnp.where(stopped, RowStatus.STOP_STRING, jnp.where(ended, RowStatus.END_TOKEN, status))
    newest = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    log_probs = state.log_probs
    if log_probs is not None and token_log_probs is not None:
        log_probs = log_probs.at[rows, slots].set(token_log_probs.astype(log_probs.dtype), mode="drop")
    return replace(
        state,
        decode_state=replace(
            state.decode_state,
            recent=append_recent(state.decode_state.recent, tokens, count),
            seen=mark_seen(state.decode_state.seen, tokens, kept),
        ),
        root=jnp.where(count > 0, newest, state.root),
        output=state.output.at[rows, slots].set(tokens, mode="drop"),
        origin=state.origin.at[rows, slots].set(origin, mode="drop"),
        log_probs=log_probs,
        written=written,
        stop=stop.astype(state.stop.dtype),
        status=jnp.where(state.finished, state.status, status).astype(state.status.dtype),
    ), count


def _seen_on_path(seen: Bool[Array, "B V"], draft: Draft) -> Bool[Array, "B N V"]:
    """Mask of the tokens that occur before the token after each node: in the text, or on the path to the node."""
    batch, size = draft.tokens.shape
    ancestors = jnp.broadcast_to(draft.tree.ancestors, (batch, size, size))
    tokens = jnp.where(ancestors & (draft.tokens >= 0)[:, None], draft.tokens[:, None], seen.shape[1])
    rows, nodes = jnp.arange(batch)[:, None, None], jnp.arange(size)[:, None]
    before = jnp.broadcast_to(seen[:, None], (batch, size, seen.shape[1]))
    return before.at[rows, nodes, tokens].set(True, mode="drop")
