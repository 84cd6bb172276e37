"""What decoding gives: tokens, and the figures of how they came about."""

from dataclasses import dataclass

import numpy as np

from lin_jax.decoding.loop import EMPTY, END_TOKEN, LENGTH, RUNNING, STOP_STRING

ENDINGS = {
    RUNNING: "running",
    END_TOKEN: "end token",
    STOP_STRING: "stop string",
    LENGTH: "length",
    EMPTY: "waiting",
}


@dataclass(frozen=True)
class Update:
    """What one sequence gained since it was last looked at.

    Attributes:
        row: number of the prompt, from 0.
        tokens: the new tokens.
        origins: who chose each of them: TARGET or DRAFT of `loop`.
        log_probs: the model's log-probability of each, if asked for.
        ending: how the sequence ended, a value of ENDINGS; "running" if it goes on.
    """

    row: int
    tokens: list[int]
    origins: list[int]
    log_probs: list[float] | None
    ending: str

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.ending != ENDINGS[RUNNING]


@dataclass(frozen=True)
class Generation:
    """What was generated, and how.

    Attributes:
        tokens: per prompt, the new tokens (an end-of-text token, and the tokens of a stop string, included).
        origins: per prompt, who chose each of them: TARGET or DRAFT of `loop`.
        log_probs: per prompt, the model's log-probability of each token, if asked for.
        endings: per prompt, how it ended, a value of ENDINGS.
        steps: per prompt, target steps taken after the first token.
        yields: `[P]` how often a step gave 1, 2, ... tokens.
        nodes: nodes that the target computed in all, those of finished and empty rows included.
        plain_steps: steps of the loop for which plain decoding took over, because the tree's did not pay.
        prefill_seconds: time to read the prompts and choose the first tokens, and to compile what is new.
        decode_seconds: time of the loop.
        state_bytes: size of one sequence's recurrent state.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    log_probs: list[list[float]] | None
    endings: list[str]
    steps: list[int]
    yields: np.ndarray
    nodes: int
    plain_steps: int
    prefill_seconds: float
    decode_seconds: float
    state_bytes: int

    @property
    def decoded(self) -> int:
        """Tokens that the loop emitted: all but the first of each row."""
        return int(self.yields @ np.arange(1, len(self.yields) + 1))

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the loop emitted per second."""
        return self.decoded / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens per target step; plain decoding has 1."""
        steps = int(self.yields.sum())
        return self.decoded / steps if steps else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the steps in which a drafted token of depth 1, 2, ... was accepted (survival)."""
        steps = max(int(self.yields.sum()), 1)
        return [float(self.yields[depth:].sum()) / steps for depth in range(1, len(self.yields))]

    @property
    def useful_share(self) -> float:
        """Share of the computed nodes that became tokens."""
        return self.decoded / self.nodes if self.nodes else 0.0
