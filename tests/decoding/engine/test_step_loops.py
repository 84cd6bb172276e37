"""Loops of steps: limits on what drafts may lose, and copies in turn with plain steps, against a search in Python."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.decoding.drafting.ngram_lookup import find_matches
from lin_jax.decoding.engine.loop_state import LoopState, RowStatus
from lin_jax.decoding.engine.prefill import DecodeState, append_recent
from lin_jax.decoding.engine.step_loops import Bounds, LossLimit, copying_steps

DEPTH, COST, WIDTH, ROOM = 4, 2.0, 256, 256
PLENTY = 1e9


@pytest.mark.parametrize("cost", [*np.linspace(1.01, 9, 60).tolist(), 2.77])
def test_just_what_a_step_may_lose_permits_it_however_it_is_rounded(cost):
    """The host rounds `cost - 1` once, the device `cost` before it subtracts: copies came back after every step."""
    limit = LossLimit(np.float32(cost), np.float32(cost - 1))
    permits = jax.jit(lambda limit, lost: limit.permits(lost))
    assert permits(limit, np.float32(0))
    assert not permits(limit, np.float32(0.01))


def state_of(text: list[int]) -> LoopState:
    """State of a loop that has written the first token of a text."""
    zeros = jnp.zeros((1, ROOM), jnp.int32)
    recent = jnp.full((1, WIDTH), -1).at[0, -1].set(text[0])
    one, zero = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)
    return LoopState(
        decode_state=DecodeState(None, None, jnp.zeros((1, 1)), recent.astype(jnp.int32), None),
        root=zero + text[0],
        output=zeros.at[0, 0].set(text[0]),
        origin=zeros.astype(jnp.int8),
        log_probs=None,
        written=one,
        limit=one * len(text),
        rows=zero,
        seed=jnp.zeros((), jnp.uint32),
        stop=zero,
        status=zero.astype(jnp.int8),
        finite=one > 0,
        steps=zero,
        accepted_histogram=jnp.zeros((1, DEPTH + 1), jnp.int32),
    )


def steps_of(text: list[int]) -> tuple[Callable[[LoopState], LoopState], Callable[[LoopState], LoopState]]:
    """Plain steps, and steps that copy, of a model that says a text."""
    truth = jnp.asarray([*text, *[-2] * (DEPTH + 1)], jnp.int32)

    def emit(state: LoopState, count: jax.Array) -> LoopState:
        tokens = jax.lax.dynamic_slice(truth, state.written, (DEPTH + 1,))[None]
        count = jnp.minimum(count, state.limit - state.written)
        slots = jnp.where(jnp.arange(DEPTH + 1) < count[:, None], state.written[:, None] + jnp.arange(DEPTH + 1), ROOM)
        written = state.written + count
        return replace(
            state,
            decode_state=replace(
                state.decode_state, recent=append_recent(state.decode_state.recent, tokens, count).astype(jnp.int32)
            ),
            root=tokens[:, count[0] - 1],
            output=state.output.at[0, slots[0]].set(tokens[0], mode="drop"),
            written=written,
            status=jnp.where(written >= state.limit, RowStatus.LENGTH, state.status).astype(jnp.int8),
        )

    def copy(state: LoopState) -> LoopState:
        found = find_matches(state.decode_state.recent, DEPTH, 3, 1)
        right = jax.lax.dynamic_slice(truth, state.written, (DEPTH,)) == found.followers[0, 0]
        return emit(state, 1 + jnp.cumprod(right & (found.sizes[0, 0] > 0)).sum(keepdims=True).astype(jnp.int32))

    return lambda state: emit(state, jnp.ones(1, jnp.int32)), copy


def match(text: list[int]) -> tuple[int, int]:
    """Tokens that agree with the latest place of the longest n-gram of up to three, at most 16, and that place."""
    for size in (3, 2, 1):
        for end in range(len(text) - 2, size - 2, -1):
            if text[end - size + 1 : end + 1] == text[-size:]:
                agreeing = size
                while agreeing < min(16, end + 1) and text[end - agreeing] == text[len(text) - 1 - agreeing]:
                    agreeing += 1
                return agreeing, end
    return 0, -1


def expected(text: list[int], alert: int, allowance: float) -> list[bool]:
    """Whether each step copies: from a match on, until a step loses, while one more may lose."""
    steps, place, lost = [], 1, 0.0
    while place < len(text):
        size, _ = match(text[:place])
        if size < alert or lost + COST - 1 > allowance:
            steps.append(False)
            place += 1
            continue
        begin, first, loses = place, len(steps), False
        while place < len(text) and not loses:
            given = min(copied(text, place) + 1, len(text) - place)
            place, loses = place + given, given < COST
            steps.append(True)
        lost = max(lost + (len(steps) - first) * COST - (place - begin), 0)
    return steps


def copied(text: list[int], place: int) -> int:
    """Number of right tokens of a copy."""
    _, end = match(text[:place])
    right = 0
    while end >= 0 and right < DEPTH and place + right < len(text):
        if text[place + right] != text[end + 1 + right % (place - 1 - end)]:
            break
        right += 1
    return right


def repeating(seed: int) -> list[int]:
    """A text that comes back to passages of its own, and to single tokens all the time."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 12, 20).tolist()
    while len(text) < 200:
        begin, size = int(rng.integers(0, len(text) - 15)), int(rng.integers(1, 16))
        text += [*text[begin : begin + size], *rng.integers(0, 40, 3).tolist()]
    return text[:200]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("alert", "allowance"), [(1, PLENTY), (4, PLENTY), (9, PLENTY), (2, 3.0), (2, 0.5)])
def test_copies_and_plain_steps_take_turns(seed: int, alert: int, allowance: float) -> None:
    text = repeating(seed)
    plain, copy = steps_of(text)
    limit = LossLimit(np.float32(COST), np.float32(allowance))

    def loop(state: LoopState, most: int) -> tuple[LoopState, object]:
        return copying_steps(
            plain, copy, state, Bounds(jnp.asarray(most), jnp.asarray(False)), limit, jnp.asarray(alert)
        )

    steps = expected(text, alert, allowance)
    state, count = jax.jit(loop)(state_of(text), 1000)
    assert state.output[0, : len(text)].tolist() == text
    assert (int(count.taken), int(count.drafted)) == (len(steps), sum(steps))
    # Asked for fewer steps, it takes as many.
    begun, few = jax.jit(loop)(state_of(text), 37)
    assert (int(few.taken), int(few.drafted)) == (37, sum(steps[:37]))
    assert begun.output[0, : int(begun.written[0])].tolist() == text[: int(begun.written[0])]
    if allowance > 1:
        assert 0 < sum(steps) < len(steps)
    else:
        assert not any(steps)
