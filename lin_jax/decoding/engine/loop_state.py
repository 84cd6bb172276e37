"""State of the decode loop between two steps, with the source of each token and the status of each row."""

from dataclasses import dataclass, replace
from enum import IntEnum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.engine.prefill import DecodeState


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


def with_recent(state: LoopState, recent: Int[Array, "B W"]) -> LoopState:
    """State with other last tokens."""
    return replace(state, decode_state=replace(state.decode_state, recent=recent))


def recent_after(
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
