"""Compiled decode loop: draft, verify, accept, commit, for a batch whose rows stand at positions of their own."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance.longest_path import Accepted
from lin_jax.decoding.acceptance.rules import ACCEPTANCE_RULES, Verified
from lin_jax.decoding.drafting.api import Draft, DraftContext, Drafter, Drawing
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree
from lin_jax.decoding.engine.loop_state import LoopState, RowStatus, TokenOrigin
from lin_jax.decoding.engine.prefill import DecodeState, append_recent, mark_seen
from lin_jax.decoding.engine.programs import Flat
from lin_jax.decoding.engine.sampling import Sampling, choose_tokens, log_probabilities
from lin_jax.decoding.engine.step_loops import Bounds, LossLimit, StepCount, copying_steps, drafted_steps, plain_steps
from lin_jax.decoding.engine.stop_strings import StopAutomaton
from lin_jax.models import CausalModel
from pallas_kernels.ordering import known_after


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
) -> tuple[LoopState, StepCount]:
    """Takes steps until all rows are finished, or `max_steps` are done, or a row is free while prompts are waiting.

    Args:
        modules: the target, and the drafter that fills the tree of `options`.
        state: state of the loop; its buffers are donated.
        stops: automaton of the stop strings, or None.
        max_steps: largest number of steps.
        waiting: whether prompts wait for a free row.
        loss_limit: limit on what drafts may lose against plain decoding, at which the loop returns; None sets none.
        alert: number of last tokens that must occur earlier in the text, see `plain_steps`. The loop of plain steps
            returns then; that of a tree copies from there, takes plain steps elsewhere, and returns for no loss. None
            looks for nothing.
        options: static options.

    Returns:
        The new state, and the number of steps taken.
    """
    model, drafter = modules.whole()
    step = partial(_step, model, drafter, stops=stops, options=options)
    bounds, zero = Bounds(max_steps, waiting), jnp.zeros((), jnp.int32)
    if options.tree.size == 1:
        state, steps, _ = plain_steps(step, state, bounds, alert)
        count = StepCount(steps, zero)
    elif alert is None or loss_limit is None:
        state, steps = drafted_steps(step, state, bounds, loss_limit)
        count = StepCount(steps, steps)
    else:
        plain = partial(_step, model, drafter, stops=stops, options=replace(options, tree=DraftTree()))
        state, count = copying_steps(plain, step, state, bounds, loss_limit, alert)
    return with_finite(state), count


def with_finite(state: LoopState) -> LoopState:
    """The state, with the rows noted whose numbers have become NaN or infinite."""
    return replace(state, finite=state.finite & jnp.all(jnp.isfinite(state.decode_state.hidden), axis=1))


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
    draft = grown_tree(model, drafter, state, options)
    hidden, nodes = model.verify(jnp.maximum(draft.tokens, 0), draft.tree, state.decode_state.model)
    return accepted_path(model, state, draft, hidden, nodes, options)


def grown_tree(model: CausalModel, drafter: Drafter, state: LoopState, options: DecodeOptions) -> Draft:
    """The draft tree of the next step."""
    decode_state, drawing = state.decode_state, None
    if ACCEPTANCE_RULES[options.acceptance].draws:
        after_root = model.position(decode_state.model) + 1
        drawing = Drawing(after_root, state.rows, state.seed, options.sampling.temperature)
    context = DraftContext(state.root, decode_state.hidden, decode_state.recent, decode_state.model)
    return options.tree.grow(drafter, context, decode_state.drafter, drawing)


def accepted_path(
    model: CausalModel, state: LoopState, draft: Draft, hidden: Array, nodes: Any, options: DecodeOptions
) -> DraftedStep:
    """Accepts the longest valid path of a tree whose hidden vectors are known; `DraftedStep` has the arguments."""
    seen = state.decode_state.seen
    logits, after_root = model.logits(hidden), model.position(state.decode_state.model) + 1
    seen = None if seen is None else _seen_on_path(seen, draft)
    verified = Verified(draft, logits, after_root, state.rows, state.seed, seen)
    accepted = ACCEPTANCE_RULES[options.acceptance].accept(verified, options.tree, options.sampling)
    return DraftedStep(draft, hidden, nodes, logits, accepted)


def _step(
    model: CausalModel, drafter: Drafter, state: LoopState, *, stops: StopAutomaton | None, options: DecodeOptions
) -> LoopState:
    """Takes one target step: grows a tree, verifies it, accepts its longest valid path and commits that."""
    return committed(model, drafter, state, draft_and_verify(model, drafter, state, options), stops, options)


def committed(
    model: CausalModel,
    drafter: Drafter,
    state: LoopState,
    drafted: DraftedStep,
    stops: StopAutomaton | None,
    options: DecodeOptions,
) -> LoopState:
    """The state after the accepted path of a tree."""
    decode_state = state.decode_state
    draft, hidden, nodes, logits, accepted = drafted
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
