"""Generation from Python: prompts in, tokens out."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jax

from lin_jax.attention import grows, longest_path
from lin_jax.decoding.decoding import Decoding
from lin_jax.decoding.draft import Drafter, ScoringDrafter
from lin_jax.decoding.drafters.none import NoDrafter
from lin_jax.decoding.dynamic import DynamicTree
from lin_jax.decoding.generation import Generation
from lin_jax.decoding.judges import JUDGES
from lin_jax.decoding.prefix import Prefix
from lin_jax.decoding.reading import Reading, nothing_read, read
from lin_jax.decoding.sampling import Sampling
from lin_jax.decoding.slots import bucket
from lin_jax.decoding.stops import StopAutomaton
from lin_jax.decoding.tree import DraftTree
from lin_jax.errors import UserError
from lin_jax.models import CausalModel, as_trained

GREEDY = Sampling()
Tree = DraftTree | DynamicTree
MOST_SLOTS = 64


class Generator:
    """Decodes batches of prompts with one model and one way of drafting.

    Args:
        model: the target.
        drafter: where guesses come from; None decodes plainly.
        tree: shape of the draft, or a shape for each of several batch sizes: the one for the largest size that is not
            above the batch's serves it. None is the empty tree without a drafter, else its best guess at every depth.
        end_tokens: tokens that end a row.
        stops: automaton of strings that end a row.
        worth: tokens that a step of the tree must yield for each row to be worth its while, for every tree or for each
            as they are given (`Plan.worth`); with less, plain decoding takes over for a while. None always drafts.
        acceptance: which drafted tokens stand: exact (the output is plain decoding's, token for token), rejection
            (drafts are drawn, the output has plain decoding's distribution) or typical (lossy).
        piece: tokens of a prompt that are read at a time; it bounds the memory of reading.

    Raises:
        UserError: the tree asks for more than the drafter offers, or is deeper than a group is long, or what is asked
            for does not go together.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        drafter: Drafter | None = None,
        tree: Tree | Mapping[int, Tree] | None = None,
        worth: float | Mapping[int, float] | None = None,
        end_tokens: Sequence[int] = (),
        stops: StopAutomaton | None = None,
        acceptance: str = "exact",
        piece: int = 256,
    ) -> None:
        self.model = model
        self.drafter = drafter or NoDrafter()
        if tree is None:
            tree = DraftTree(tuple((0,) * d for d in range(1, self.drafter.depth + 1)))
        self.trees = dict(tree) if isinstance(tree, Mapping) else {1: tree}
        self.worth = dict(worth) if isinstance(worth, Mapping) else dict.fromkeys(self.trees, worth)
        self.end_tokens = tuple(end_tokens)
        self.stops = stops
        self.acceptance = acceptance
        self.piece = piece
        for each in self.trees.values():
            _check(self.model, self.drafter, each)
            _check_acceptance(acceptance, self.drafter, each)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        first_row: int = 0,
        slots: int | None = None,
        prefix: Prefix | None = None,
        log_probs: bool = False,
    ) -> Generation:
        """Decodes all prompts, each until an end or `max_new_tokens`; arguments and errors as in `stream`."""
        decoding = self.stream(
            prompts,
            max_new_tokens,
            sampling=sampling,
            seed=seed,
            first_row=first_row,
            slots=slots,
            prefix=prefix,
            log_probs=log_probs,
            # Often enough for Ctrl-C, seldom enough to cost nothing.
            steps_per_visit=128,
        )
        for _ in decoding:
            pass
        return decoding.generation

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        first_row: int = 0,
        slots: int | None = None,
        prefix: Prefix | None = None,
        log_probs: bool = False,
        steps_per_visit: int = 8,
    ) -> Decoding:
        """Decodes all prompts and, iterated over, hands the new tokens over every few steps.

        Args:
            prompts: token ids; lengths may differ; none may be empty, unless there is a prefix.
            max_new_tokens: limit of new tokens per prompt.
            sampling: how tokens are chosen.
            seed: of the random numbers.
            first_row: number of the first prompt, which keys its random numbers.
            slots: rows of the batch; other prompts wait until one is free. None takes the next power of two from the
                number of prompts on, 64 at the most.
            prefix: what was read before every prompt.
            log_probs: whether to tell the model's log-probability of every token.
            steps_per_visit: steps between two looks at the loop.

        Raises:
            UserError: there is no prompt, an empty one, nothing to generate, more than the model has positions for, or
                options that do not go together.
        """
        check_new_tokens(max_new_tokens)
        if not prompts or not (prefix is not None or all(len(prompt) for prompt in prompts)):
            raise UserError("a prompt holds no token; give at least one (the end-of-text token will do)")
        if slots is not None and slots < 1:
            raise UserError(f"the number of slots is {slots}; give at least 1")
        _check_sampling(self.acceptance, sampling)
        longest = max(len(prompt) for prompt in prompts) + (0 if prefix is None else prefix.length)
        _check_positions(self.model, longest, max_new_tokens)
        _check_room(self.model, prefix, longest + max_new_tokens)
        return Decoding(
            self,
            prompts,
            max_new_tokens,
            sampling=sampling,
            seed=seed,
            first_row=first_row,
            slots=self._slots(len(prompts), slots),
            prefix=prefix,
            log_probs=log_probs,
            steps_per_visit=steps_per_visit,
        )

    def prefix(self, tokens: Sequence[int], *, sampling: Sampling = GREEDY, slots: int = 1, room: int = 0) -> Prefix:
        """Reads a text once, so that any number of prompts can go on from it.

        Args:
            tokens: the text.
            sampling: what it will be gone on with; a repetition penalty must know the text's tokens.
            slots: the batch size that it will be used with, if drafts depend on it.
            room: tokens that are to follow, for models whose state grows with the text.
        """
        capacity = bucket(len(tokens) + room, 64) + self.tree_for(slots).depth + 1
        drafter = self.drafter_for(self.tree_for(slots))
        blank = nothing_read(self.model, drafter, 1, capacity, seen=sampling.repetition_penalty != 1)
        reading = read(self.model, drafter, blank, [tokens], self.piece)
        return Prefix(reading, len(tokens), capacity, self.identity)

    def load_prefix(self, path: str | Path, *, sampling: Sampling = GREEDY, slots: int = 1) -> Prefix:
        """Reads what `Prefix.save` wrote; arguments as in `prefix`.

        Raises:
            UserError: there is no such file, or it is from another model or drafter.
        """
        drafter = self.drafter_for(self.tree_for(slots))
        penalty = sampling.repetition_penalty != 1

        def like(capacity: int) -> Reading:
            return jax.eval_shape(lambda: nothing_read(self.model, drafter, 1, capacity, seen=penalty))

        return Prefix.load(path, like, self.identity)

    @cached_property
    def identity(self) -> str:
        """What stands for the model's parameters."""
        from lin_jax.training.parameters import fingerprint, params_of

        return fingerprint(params_of(as_trained(self.model)))

    def tree_for(self, slots: int) -> Tree:
        """The tree that serves a batch size; the empty one below the smallest."""
        sizes = [size for size in self.trees if size <= slots]
        return self.trees[max(sizes)] if sizes else DraftTree()

    def worth_for(self, slots: int) -> float | None:
        """What a step of the tree that serves a batch size must yield; None if it is to stay whatever it yields."""
        sizes = [size for size in self.trees if size <= slots]
        # Plain decoding writes other tokens than a lossy or random acceptance would.
        if not sizes or self.trees[max(sizes)].size == 1 or self.acceptance != "exact":
            return None
        return self.worth.get(max(sizes))

    def drafter_for(self, tree: Tree) -> Drafter:
        """Who fills a tree: nobody, if there is nothing but the root."""
        return self.drafter if tree.size > 1 else NoDrafter()

    def _slots(self, prompts: int, wanted: int | None) -> int:
        bound = getattr(self.model, "batch", None)
        if bound is None:
            return wanted or min(bucket(prompts), MOST_SLOTS)
        if prompts != bound or wanted not in (None, bound):
            raise UserError(f"the model has read {bound} sources; give as many prompts, not {prompts}")
        return bound


def check_new_tokens(count: int) -> None:
    """Refuses to write nothing."""
    if count < 1:
        raise UserError(f"the number of new tokens is {count}; give at least 1")


def _check(model: CausalModel, drafter: Drafter, tree: Tree) -> None:
    if tree.depth > drafter.depth or tree.width > max(drafter.width, 0):
        raise UserError(
            f"the draft tree is {tree.depth} deep and {tree.width} wide, the drafter offers {drafter.depth} by "
            f"{drafter.width} guesses; give a smaller tree or another drafter"
        )
    longest = longest_path(model.config.attention)
    if longest is not None and tree.depth > longest:
        raise UserError(
            f"the draft tree is {tree.depth} deep, a group holds {longest + 1} tokens; give a tree less deep than that"
        )


def _check_acceptance(acceptance: str, drafter: Drafter, tree: Tree) -> None:
    if acceptance not in JUDGES:
        raise UserError(f"acceptance '{acceptance}' is unknown; choose one of {', '.join(JUDGES)}")
    if not JUDGES[acceptance].draws or tree.size == 1:
        return
    if not isinstance(drafter, ScoringDrafter):
        raise UserError(
            f"acceptance '{acceptance}' draws drafts, and {type(drafter).__name__} has no distribution to draw from; "
            "choose exact"
        )
    if isinstance(tree, DynamicTree):
        raise UserError(f"acceptance '{acceptance}' needs a tree of fixed shape; give one, or choose exact")


def _check_sampling(acceptance: str, sampling: Sampling) -> None:
    if JUDGES[acceptance].draws and not sampling.temperature:
        raise UserError(f"acceptance '{acceptance}' is for sampling; give a temperature above 0, or choose exact")


def _check_room(model: CausalModel, prefix: Prefix | None, length: int) -> None:
    """Refuses to fill the state of a prefix beyond what it was made for."""
    if prefix is not None and grows(model.config.attention) and length > prefix.capacity:
        raise UserError(
            f"a text of {length} tokens does not fit behind the prefix, whose state has room for {prefix.capacity}; "
            f"read it again with room for {length - prefix.length} more"
        )


def _check_positions(model: CausalModel, prompt: int, new: int) -> None:
    """Refuses texts that are longer than a model with learnt positions knows; the last token is never read."""
    positions = getattr(model.config, "max_positions", None)
    if positions is not None and prompt + new - 1 > positions:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new ones do not fit into the model's {positions} positions; "
            "shorten the prompt, or ask for fewer tokens"
        )
