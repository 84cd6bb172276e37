"""Results of decoding: tokens, their origins, and statistics of the loop."""

from dataclasses import dataclass, field

import numpy as np

from lin_jax.decoding.engine.loop_state import RowStatus

# Ending of a prompt that has no slot yet; others have the label of their row's status.
WAITING = "waiting"


@dataclass(frozen=True)
class Update:
    """New tokens of one sequence since the last sync.

    Attributes:
        row: index of the prompt, from 0.
        tokens: the new tokens.
        origins: source of each, a `TokenOrigin`.
        log_probs: the model's log-probability of each, if asked for.
        ending: "end token", "stop string" or "length", a label of `RowStatus`; "running" if more will come.
    """

    row: int
    tokens: list[int]
    origins: list[int]
    log_probs: list[float] | None
    ending: str

    @property
    def finished(self) -> bool:
        """True if nothing more will come."""
        return self.ending != RowStatus.RUNNING.label


@dataclass(frozen=True)
class Generation:
    """Generated tokens of all prompts, with statistics.

    Attributes:
        tokens: per prompt, the new tokens (an end-of-text token, and the tokens of a stop string, included).
        origins: per prompt, the source of each token, a `TokenOrigin`.
        log_probs: per prompt, the model's log-probability of each token, if asked for.
        endings: per prompt, "end token", "stop string", "length" or "running" (labels of `RowStatus`), or "waiting".
        steps: per prompt, target steps taken after the first token.
        accepted_histogram: `[P]` number of steps that gave 1, 2, ... tokens.
        nodes: nodes that the target computed in all, those of finished and empty rows included.
        plain_steps: steps of plain decoding, taken where drafts do not pay.
        prefill_seconds: time to read the prompts, choose the first tokens, and compile new programs.
        decode_seconds: time of the loop.
        state_bytes: size of one sequence's recurrent state in bytes.
        steps_by_tree: steps of the loop with each tree, by its text; "none" is plain decoding.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    log_probs: list[list[float]] | None
    endings: list[str]
    steps: list[int]
    accepted_histogram: np.ndarray
    nodes: int
    plain_steps: int
    prefill_seconds: float
    decode_seconds: float
    state_bytes: int
    steps_by_tree: dict[str, int] = field(default_factory=dict)

    @property
    def decoded(self) -> int:
        """Number of tokens that the loop emitted: all but the first of each row."""
        return int(self.accepted_histogram @ np.arange(1, len(self.accepted_histogram) + 1))

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the loop emitted per second."""
        return self.decoded / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def mean_accepted_tokens(self) -> float:
        """Mean number of tokens per target step; 1 for plain decoding."""
        steps = int(self.accepted_histogram.sum())
        return self.decoded / steps if steps else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the steps in which a drafted token of depth 1, 2, ... was accepted (survival)."""
        steps = max(int(self.accepted_histogram.sum()), 1)
        return [
            float(self.accepted_histogram[depth:].sum()) / steps for depth in range(1, len(self.accepted_histogram))
        ]

    @property
    def useful_share(self) -> float:
        """Share of the computed nodes that became tokens."""
        return self.decoded / self.nodes if self.nodes else 0.0
