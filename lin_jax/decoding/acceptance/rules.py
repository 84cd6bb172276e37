"""Acceptance rules by name: exact, rejection, typical."""

from dataclasses import replace
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance.longest_path import Accepted, accept, longest_path
from lin_jax.decoding.acceptance.rejection import accept_drawn
from lin_jax.decoding.drafting.api import Draft
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree
from lin_jax.decoding.engine.sampling import Sampling, choose_tokens, filter_logits, penalised
from pallas_kernels.precision import upcast


class Verified(NamedTuple):
    """Draft with the target's logits, as verification gives them.

    Attributes:
        draft: the tree.
        logits: `[B, N, V]` the target's logits after each node.
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` index of each sequence among all that are decoded.
        seed: seed of the random numbers.
        seen: `[B, N, V]` mask of the tokens that occur before the token after each node; None without a penalty.
    """

    draft: Draft
    logits: Float[Array, "B N V"]
    positions: Int[Array, " B"]
    rows: Int[Array, " B"]
    seed: UInt[Array, ""]
    seen: Bool[Array, "B N V"] | None

    def targets(self, sampling: Sampling, depth: int) -> Int[Array, "B N"]:
        """Target's choice after each node of a tree of the given depth."""
        positions = self.positions[:, None] + self.draft.tree.depth
        return choose_tokens(self.logits, positions, self.rows, self.seed, sampling, self.seen, span=depth + 1)

    def log_p(self, sampling: Sampling) -> Float[Array, "B N V"]:
        """Target's log-probabilities after each node, penalised and filtered as `sampling` says."""
        logits = self.logits if self.seen is None else penalised(self.logits, self.seen, sampling.repetition_penalty)
        return jax.nn.log_softmax(filter_logits(logits, sampling))


class AcceptanceRule(Protocol):
    """Decides which drafted tokens are accepted.

    Attributes:
        draws: True if drafts are drawn at random from the drafter's distribution; else they are its best guesses.
        lossless: True if the output has the distribution of plain decoding's.
    """

    draws: bool
    lossless: bool

    def accept(self, verified: Verified, tree: AnyTree, sampling: Sampling) -> Accepted:
        """Chooses the accepted path and the emitted tokens."""


class Exact:
    """Accepts a drafted token if the target itself chose it: the output equals plain decoding's, token for token."""

    draws = False
    lossless = True

    def accept(self, verified: Verified, tree: AnyTree, sampling: Sampling) -> Accepted:
        """Longest path of the target's own choices."""
        return accept(verified.draft, verified.targets(sampling, tree.depth), tree.depth + 1)


class Rejection:
    """Accepts drawn tokens by rejection sampling, which leaves the target's distribution unchanged."""

    draws = True
    lossless = True

    def accept(self, verified: Verified, tree: AnyTree, sampling: Sampling) -> Accepted:
        """Path that is distributed as if the target had sampled it."""
        draft = verified.draft
        if draft.log_q is None or not isinstance(tree, DraftTree):
            # Nothing was drafted: the target samples alone.
            return accept(draft, verified.targets(sampling, tree.depth), tree.depth + 1)
        log_p = verified.log_p(sampling)
        return accept_drawn(draft.tokens, draft.log_q, log_p, verified.positions, verified.rows, verified.seed, tree)


class Typical:
    """Accepts every token that the target finds likely enough (Medusa, Cai et al. 2024). It changes the output."""

    draws = False
    lossless = False

    def accept(self, verified: Verified, tree: AnyTree, sampling: Sampling) -> Accepted:
        """Longest path of likely tokens, then the target's own choice."""
        draft = verified.draft
        log_p = verified.log_p(sampling if sampling.temperature else replace(sampling, temperature=1.0))
        above = jnp.take_along_axis(log_p, draft.parents[:, :, None], axis=1)
        accepted = is_typical(above, draft.tokens) & (draft.tokens >= 0)
        return longest_path(draft, accepted, verified.targets(sampling, tree.depth), tree.depth + 1)


ACCEPTANCE_RULES: dict[str, AcceptanceRule] = {"exact": Exact(), "rejection": Rejection(), "typical": Typical()}


def is_typical(
    log_p: Float[Array, "B N V"], tokens: Int[Array, "B N"], epsilon: float = 0.09, alpha: float = 0.3
) -> Bool[Array, "B N"]:
    """Mask of typical tokens: p(x) > min(epsilon, alpha * exp(-H(p))) (Cai et al. 2024).

    Lossy: an accepted token need not be the target's choice, and is not distributed as its samples are. The less
    certain the target is (the larger its entropy H), the less probable a token may be.

    Args:
        log_p: `[B, N, V]` the target's normalised log-probabilities after each node's parent; minus infinity for
            filtered tokens.
        tokens: `[B, N]` the nodes' tokens; -1, where there is none, is never accepted.
        epsilon: probability above which any token is accepted.
        alpha: fraction of exp(-H) above which a token is accepted.
    """
    log_p = upcast(log_p)
    entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)
    threshold = jnp.minimum(epsilon, alpha * jnp.exp(-entropy))
    probability = jnp.exp(jnp.take_along_axis(log_p, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0])
    return (tokens >= 0) & (probability > threshold)
