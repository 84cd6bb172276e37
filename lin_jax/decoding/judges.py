"""Ways to decide which drafted tokens stand, by name."""

from dataclasses import replace
from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance import Accepted, accept, longest_path
from lin_jax.decoding.draft import Draft
from lin_jax.decoding.dynamic import DynamicTree
from lin_jax.decoding.rejection import accept_drawn
from lin_jax.decoding.sampling import Sampling, choose, filter_logits, penalised
from lin_jax.decoding.tree import DraftTree
from lin_jax.decoding.typical import typical


class Verified(NamedTuple):
    """A draft with the target's opinion of it.

    Attributes:
        draft: the tree.
        logits: `[B, N, V]` the target's logits after each node.
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` number of each sequence.
        seed: of the random numbers.
        seen: `[B, N, V]` which tokens occur before the token that follows a node; None without a penalty.
    """

    draft: Draft
    logits: Float[Array, "B N V"]
    positions: Int[Array, " B"]
    rows: Int[Array, " B"]
    seed: UInt[Array, ""]
    seen: Bool[Array, "B N V"] | None

    def targets(self, sampling: Sampling, depth: int) -> Int[Array, "B N"]:
        """The target's choice after each node of a tree so deep."""
        positions = self.positions[:, None] + self.draft.tree.depth
        return choose(self.logits, positions, self.rows, self.seed, sampling, self.seen, span=depth + 1)

    def log_p(self, sampling: Sampling) -> Float[Array, "B N V"]:
        """The target's distribution after each node, filtered as `sampling` says."""
        logits = self.logits if self.seen is None else penalised(self.logits, self.seen, sampling.repetition_penalty)
        return jax.nn.log_softmax(filter_logits(logits, sampling))


class Judge(Protocol):
    """Decides which drafted tokens stand.

    Attributes:
        draws: whether drafts are drawn at random from the drafter's distribution; else they are its best guesses.
        lossless: whether the output is distributed as plain decoding's.
    """

    draws: bool
    lossless: bool

    def accept(self, verified: Verified, tree: DraftTree | DynamicTree, sampling: Sampling) -> Accepted:
        """The path that stands, and what is emitted."""


class Exact:
    """A drafted token stands if it is what the target itself chose there: the very output of plain decoding."""

    draws = False
    lossless = True

    def accept(self, verified: Verified, tree: DraftTree | DynamicTree, sampling: Sampling) -> Accepted:
        """The longest path of the target's own choices."""
        return accept(verified.draft, verified.targets(sampling, tree.depth), tree.depth + 1)


class Rejection:
    """Drafted tokens are drawn, and rejected as often as it takes to leave the target's distribution as it is."""

    draws = True
    lossless = True

    def accept(self, verified: Verified, tree: DraftTree | DynamicTree, sampling: Sampling) -> Accepted:
        """A path that is distributed as if the target had drawn it."""
        draft = verified.draft
        if draft.log_q is None or not isinstance(tree, DraftTree):
            # Nothing was drafted: the target draws alone.
            return accept(draft, verified.targets(sampling, tree.depth), tree.depth + 1)
        log_p = verified.log_p(sampling)
        return accept_drawn(draft.tokens, draft.log_q, log_p, verified.positions, verified.rows, verified.seed, tree)


class Typical:
    """Medusa's typical acceptance (Cai et al. 2024): whatever the target finds likely enough. It changes the output."""

    draws = False
    lossless = False

    def accept(self, verified: Verified, tree: DraftTree | DynamicTree, sampling: Sampling) -> Accepted:
        """The longest path of likely tokens, then the target's own choice."""
        draft = verified.draft
        log_p = verified.log_p(sampling if sampling.temperature else replace(sampling, temperature=1.0))
        above = jax.numpy.take_along_axis(log_p, draft.parents[:, :, None], axis=1)
        stands = typical(above, draft.tokens) & (draft.tokens >= 0)
        return longest_path(draft, stands, verified.targets(sampling, tree.depth), tree.depth + 1)


JUDGES: dict[str, Judge] = {"exact": Exact(), "rejection": Rejection(), "typical": Typical()}
