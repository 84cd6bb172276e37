"""Time of a token and size of the state after texts of several lengths, for linear and softmax attention."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lin_jax.decoding import Generator, Prefix
from lin_jax.demo.progress import PartProgress
from lin_jax.models import CausalModel

# Tokens that are written after each text in a round, and rounds, the first of which compiles.
NEW_TOKENS, ROUNDS = 24, 5
# Where reading a text takes longer than so many seconds, longer ones are left out.
READING_SECONDS = 20.0


@dataclass
class _Point:
    """A text that was read by one model, and the seconds of a token after it, round by round."""

    kind: str
    length: int
    generator: Generator
    prefix: Prefix
    state_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def decode(self) -> None:
        """Writes some tokens after the text."""
        done = self.generator.generate([[]], NEW_TOKENS, prefix=self.prefix, slots=1)
        self.seconds.append(done.decode_seconds / done.decoded)
        self.state_bytes = done.state_bytes


def measure_context(
    linear: CausalModel, softmax: CausalModel, text: Sequence[int], lengths: Sequence[int]
) -> dict[str, Any]:
    """Measures a token after texts of several lengths, in turn, on states and caches that were filled by reading them.

    A length counts what is read and what is written. A cache has room for as many tokens as the length says, rounded up
    to a power of two, as in any decoding.

    Args:
        linear: a model of constant state.
        softmax: its teacher.
        text: token ids, repeated where they are too few.
        lengths: the lengths, ascending; those that a model has no positions for, or that take too long to be read, are
            left out.

    Returns:
        `lengths`, and for each of `linear` and `softmax` the `milliseconds` of a token and `state_bytes` at each; where
        softmax was left out, None.
    """
    models = {"linear": linear, "softmax": softmax}
    lengths = [each for each in lengths if NEW_TOKENS < each <= _longest(softmax)]
    points: list[_Point] = []
    with PartProgress(2 * len(lengths) + ROUNDS, "step") as progress:
        for kind, model in models.items():
            read = _read_all(kind, model, text, lengths, progress)
            progress.leave_out(len(lengths) - len(read))
            points += read
        for _ in range(ROUNDS):
            for point in points:
                point.decode()
            progress.step("timing")
    by_place = {(each.kind, each.length): each for each in points}
    kept = [each for each in lengths if ("linear", each) in by_place]
    return {"lengths": kept} | {kind: _figures([by_place.get((kind, each)) for each in kept]) for kind in models}


def _longest(model: CausalModel) -> float:
    return getattr(model.config, "max_positions", None) or float("inf")


def _read_all(
    kind: str, model: CausalModel, text: Sequence[int], lengths: Sequence[int], progress: PartProgress
) -> list[_Point]:
    """Reads the text up to each length, as long as that does not take too long."""
    generator = Generator(model)
    points: list[_Point] = []
    for length in lengths:
        began = time.perf_counter()
        beginning = [text[place % len(text)] for place in range(length - NEW_TOKENS)]
        prefix = generator.prefix(beginning, room=NEW_TOKENS)
        jax.block_until_ready(prefix.decode_state)
        points.append(_Point(kind, length, generator, prefix))
        progress.step(f"{kind}, {length:,} tokens read")
        if time.perf_counter() - began > READING_SECONDS:
            break
    return points


def _figures(points: Sequence[_Point | None]) -> dict[str, list[float | int | None]]:
    """Medians over the rounds but the first."""
    return {
        "milliseconds": [None if each is None else 1e3 * float(np.median(each.seconds[1:])) for each in points],
        "state_bytes": [None if each is None else each.state_bytes for each in points],
    }
