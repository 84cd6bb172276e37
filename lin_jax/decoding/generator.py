"""Generation from Python: prompts in, tokens out, for one model, drafter and set of draft trees."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import jax

from lin_jax.attention import has_growing_state, max_draft_depth
from lin_jax.decoding.acceptance.rules import ACCEPTANCE_RULES
from lin_jax.decoding.autotune.account import most_allowed
from lin_jax.decoding.autotune.shapes import DraftShapes
from lin_jax.decoding.autotune.steering import AdaptiveShape, FixedShape, Steering, no_evidence
from lin_jax.decoding.autotune.step_costs import StepCosts
from lin_jax.decoding.drafting.api import Drafter, ScoringDrafter
from lin_jax.decoding.drafting.drafters.none import NoDrafter
from lin_jax.decoding.drafting.dynamic_tree import DynamicTree
from lin_jax.decoding.drafting.text_memory import TextMemory
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree
from lin_jax.decoding.engine.decode_loop import DecodeOptions
from lin_jax.decoding.engine.prefill import DecodeState, init_decode_state, prefill
from lin_jax.decoding.engine.prefix_cache import TAIL, Prefix
from lin_jax.decoding.engine.programs import Flat, ProgramCompiler
from lin_jax.decoding.engine.sampling import Sampling
from lin_jax.decoding.engine.slots import bucket
from lin_jax.decoding.engine.stop_strings import StopAutomaton
from lin_jax.decoding.results import Generation
from lin_jax.decoding.scheduler import Scheduler, SchedulerSpec
from lin_jax.errors import UserError, check_seed
from lin_jax.models import CausalModel, as_trained
from lin_jax.models.params import params_fingerprint, params_of
from lin_jax.models.stored_weights import restored

GREEDY = Sampling()
MAX_SLOTS = 64
# Largest batch, and largest number of output tokens that are kept for a batch: nine bytes each.
LARGEST_BATCH, LARGEST_OUTPUT = 2**16, 2**28


class Generator:
    """Decodes batches of prompts with one model and one way of drafting.

    Args:
        model: the target.
        drafter: source of guesses; None decodes plainly.
        tree: shape of the drafts, or one shape for each of several batch sizes: a batch is served by the one for the
            largest size up to its own. None is the empty tree without a drafter, else the best guess at every depth.
        end_tokens: tokens that end a row.
        stops: automaton of the strings that end a row, or None.
        break_even_tokens: tokens that a step of the tree must yield for each row to be as fast as plain decoding, for
            every tree or for each (`SpeculationPlan.break_even_tokens`); below that, plain decoding takes over for a
            while. None always drafts.
        shapes: trees among which the loop chooses while it decodes, instead of `tree` (`autotune.shapes.draft_shapes`).
        costs: what steps of the shapes cost on this machine, given the batch size; None times each before it
            is first used.
        compiler: compiles the loops of the shapes; None does so in a thread while decoding goes on.
        acceptance: name of the acceptance rule: exact (the output is plain decoding's, token for token), rejection
            (drafts are drawn, the output has plain decoding's distribution) or typical (lossy).
        prefill_chunk_size: tokens of a prompt that are read at a time; it bounds the memory of prefill.
        memory: what finished outputs are added to, each with the end of its prompt: the memory that the drafter was
            built with, if it copies from one. None keeps nothing.

    Raises:
        UserError: the tree asks for more guesses than the drafter offers, or is deeper than a group is long, or the
            options exclude each other.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        drafter: Drafter | None = None,
        tree: AnyTree | Mapping[int, AnyTree] | None = None,
        break_even_tokens: float | Mapping[int, float] | None = None,
        shapes: DraftShapes | None = None,
        costs: Callable[[int], StepCosts] | None = None,
        compiler: ProgramCompiler | None = None,
        end_tokens: Sequence[int] = (),
        stops: StopAutomaton | None = None,
        acceptance: str = "exact",
        prefill_chunk_size: int = 256,
        memory: TextMemory | None = None,
    ) -> None:
        self.model = model
        self.drafter = drafter or NoDrafter()
        if shapes is not None and tree is not None:
            raise UserError("a tree and shapes to choose among are both given; give one of them")
        if shapes is not None and acceptance != "exact":
            raise UserError(f"acceptance '{acceptance}' depends on the tree; give one, or acceptance exact")
        self.shapes = shapes
        sizes = [] if shapes is None else [each.size for each in shapes.trees]
        self.costs = costs or cache(lambda slots: StepCosts.of_model(model, sizes))
        self.compiler = compiler or ProgramCompiler()
        self.learned = None if shapes is None else no_evidence(shapes)
        if shapes is not None:
            tree = max(shapes.trees, key=lambda each: each.depth)
        if tree is None:
            tree = DraftTree(tuple((0,) * d for d in range(1, self.drafter.depth + 1)))
        self.trees = dict(tree) if isinstance(tree, Mapping) else {1: tree}
        given = break_even_tokens
        self.break_even_tokens = dict(given) if isinstance(given, Mapping) else dict.fromkeys(self.trees, given)
        self.end_tokens = tuple(end_tokens)
        self.stops = stops
        self.acceptance = acceptance
        self.prefill_chunk_size = prefill_chunk_size
        self.memory = memory
        for each in (*self.trees.values(), *(() if shapes is None else shapes.trees)):
            _check_tree(self.model, self.drafter, each)
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
        """Decodes all prompts, each to its end or `max_new_tokens`; arguments and errors as in `stream`."""
        scheduler = self.stream(
            prompts,
            max_new_tokens,
            sampling=sampling,
            seed=seed,
            first_row=first_row,
            slots=slots,
            prefix=prefix,
            log_probs=log_probs,
            # Often enough for Ctrl-C, seldom enough to cost nothing.
            steps_per_sync=128,
        )
        for _ in scheduler:
            pass
        return scheduler.generation

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
        steps_per_sync: int = 8,
    ) -> Scheduler:
        """Decodes all prompts; iterating over the scheduler gives the new tokens every few steps.

        Args:
            prompts: token ids; lengths may differ; none may be empty, unless there is a prefix.
            max_new_tokens: largest number of new tokens per prompt.
            sampling: sampling options.
            seed: seed of the random numbers.
            first_row: index of the first prompt, which keys its random numbers.
            slots: rows of the batch; other prompts wait until one is free. None takes the number of prompts rounded up
                to a power of two, at most 64.
            prefix: decode state of a text before every prompt.
            log_probs: whether to keep the model's log-probability of every token.
            steps_per_sync: steps of the loop between two syncs with the host.

        Raises:
            UserError: there are no prompts, or an empty one, or nothing to generate, or more tokens than the model has
                positions or memory holds, or a seed of more than 32 bits, or options that exclude each other.
        """
        check_new_tokens(max_new_tokens)
        check_seed(seed)
        if not prompts:
            raise UserError("there are no prompts; give at least one")
        if prefix is None and not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt is empty; give at least one token (the end-of-text token will do)")
        if slots is not None:
            check_batch(slots)
        _check_sampling(self.acceptance, sampling)
        size = self._slots(len(prompts), slots)
        check_new_tokens(max_new_tokens, size)
        longest = max(len(prompt) for prompt in prompts) + (0 if prefix is None else prefix.length)
        _check_positions(self.model, longest, max_new_tokens)
        _check_room(self.model, prefix, longest + max_new_tokens)
        # In a very small model, a look of the host alone costs more than may be lost in the whole text.
        plainly = self.shapes is not None and prefix is None and self.costs(size).visit > most_allowed(max_new_tokens)
        return Scheduler(
            self._plain_spec(size, sampling) if plainly else self._spec(size, sampling),
            FixedShape(0, None) if plainly else self._steering(size),
            prompts,
            max_new_tokens,
            seed=seed,
            first_row=first_row,
            prefix=prefix,
            log_probs=log_probs,
            steps_per_sync=steps_per_sync,
        )

    def prefix(self, tokens: Sequence[int], *, sampling: Sampling = GREEDY, slots: int = 1, room: int = 0) -> Prefix:
        """Reads a text once, so that any number of prompts can continue it.

        Args:
            tokens: token ids of the text.
            sampling: options that it will be continued with; a repetition penalty must know the text's tokens.
            slots: batch size that it will be used with, if the tree depends on it.
            room: number of tokens to follow, for models whose state grows with the text.
        """
        capacity = bucket(len(tokens) + room, 64) + self.tree_for(slots).depth + 1
        drafter = self.drafter_for(self.tree_for(slots))
        blank = init_decode_state(self.model, drafter, 1, capacity, seen=sampling.repetition_penalty != 1)
        decode_state = prefill(Flat.of(self.model, drafter), blank, [tokens], self.prefill_chunk_size)
        return Prefix(decode_state, len(tokens), capacity, self.identity, tuple(map(int, tokens[-TAIL:])))

    def load_prefix(self, path: str | Path, *, sampling: Sampling = GREEDY, slots: int = 1) -> Prefix:
        """Reads a file that `Prefix.save` wrote; arguments as in `prefix`.

        Raises:
            UserError: there is no such file, or it is from another model or drafter.
        """
        drafter = self.drafter_for(self.tree_for(slots))
        penalty = sampling.repetition_penalty != 1

        def like(capacity: int) -> DecodeState:
            return jax.eval_shape(lambda: init_decode_state(self.model, drafter, 1, capacity, seen=penalty))

        return Prefix.load(path, like, self.identity)

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the model's parameters."""
        return params_fingerprint(params_of(as_trained(restored(self.model))))

    def tree_for(self, slots: int) -> AnyTree:
        """Tree that serves a batch size; the empty one below the smallest size."""
        sizes = [size for size in self.trees if size <= slots]
        return self.trees[max(sizes)] if sizes else DraftTree()

    def break_even_for(self, slots: int) -> float | None:
        """Tokens that a step of the tree for a batch size must yield; None if the tree is always used."""
        sizes = [size for size in self.trees if size <= slots]
        # Plain decoding gives other tokens than a lossy or random acceptance would.
        if not sizes or self.trees[max(sizes)].size == 1 or self.acceptance != "exact":
            return None
        return self.break_even_tokens.get(max(sizes))

    def drafter_for(self, tree: AnyTree) -> Drafter:
        """Drafter that fills a tree: none, if there is nothing but the root."""
        return self.drafter if tree.size > 1 else NoDrafter()

    def _spec(self, slots: int, sampling: Sampling) -> SchedulerSpec:
        """Resolves trees and drafter for a batch size."""
        tree = self.tree_for(slots)
        trees = dict.fromkeys((DraftTree(), tree)) if self.shapes is None else self.shapes.trees
        return SchedulerSpec(
            model=self.model,
            drafter=self.drafter_for(tree),
            options=tuple(DecodeOptions(each, sampling, self.acceptance, self.end_tokens) for each in trees),
            stops=self.stops,
            slots=slots,
            prefill_chunk_size=self.prefill_chunk_size,
            compiler=self.compiler,
            adaptive=self.shapes is not None,
            switching=frozenset() if self.shapes is None else self.shapes.switching,
            memory=self.memory,
        )

    def _plain_spec(self, slots: int, sampling: Sampling) -> SchedulerSpec:
        """Plain decoding without any of what drafts need, memory of earlier texts included."""
        return replace(
            self._spec(slots, sampling),
            drafter=NoDrafter(),
            options=(DecodeOptions(DraftTree(), sampling, self.acceptance, self.end_tokens),),
            adaptive=False,
            memory=None,
        )

    def _steering(self, slots: int) -> Steering:
        """Choice among the trees for a batch size."""
        if self.shapes is None:
            return FixedShape(int(self.tree_for(slots).size > 1), self.break_even_for(slots))
        return AdaptiveShape(self.shapes, self.costs(slots), slots, self.learned)

    def _slots(self, prompts: int, wanted: int | None) -> int:
        bound = getattr(self.model, "batch", None)
        if bound is None:
            return wanted or min(bucket(prompts), MAX_SLOTS)
        if prompts != bound or wanted not in (None, bound):
            raise UserError(f"the model is bound to {bound} sources; give {bound} prompts, not {prompts}")
        return bound


def check_new_tokens(count: int, batch: int = 1) -> None:
    """Refuses a number of new tokens below 1, or of more than are kept for a batch."""
    if count < 1:
        raise UserError(f"the number of new tokens is {count}; give at least 1")
    if count * batch > LARGEST_OUTPUT:
        raise UserError(
            f"{count} new tokens of {batch} texts at a time are more than the {LARGEST_OUTPUT} that are kept; "
            f"give at most {LARGEST_OUTPUT // batch}"
        )


def check_batch(size: int, name: str = "the number of slots") -> None:
    """Refuses an impossible number of texts at a time."""
    if not 1 <= size <= LARGEST_BATCH:
        raise UserError(f"{name} is {size}; give 1 to {LARGEST_BATCH}")


def _check_tree(model: CausalModel, drafter: Drafter, tree: AnyTree) -> None:
    if tree.depth > drafter.depth or tree.width > max(drafter.width, 0):
        raise UserError(
            f"the draft tree is {tree.depth} deep and {tree.width} wide, the drafter offers {drafter.depth} by "
            f"{drafter.width} guesses; give a smaller tree or another drafter"
        )
    deepest = max_draft_depth(model.config.attention)
    if deepest is not None and tree.depth > deepest:
        raise UserError(
            f"the draft tree is {tree.depth} deep, a group holds {deepest + 1} tokens; "
            f"give a tree of depth {deepest} or less"
        )


def _check_acceptance(acceptance: str, drafter: Drafter, tree: AnyTree) -> None:
    if acceptance not in ACCEPTANCE_RULES:
        raise UserError(f"acceptance '{acceptance}' is unknown; choose one of {', '.join(ACCEPTANCE_RULES)}")
    if not ACCEPTANCE_RULES[acceptance].draws or tree.size == 1:
        return
    if not isinstance(drafter, ScoringDrafter):
        raise UserError(
            f"acceptance '{acceptance}' draws drafts, and {type(drafter).__name__} has no distribution to draw from; "
            "give acceptance exact, or another drafter"
        )
    if isinstance(tree, DynamicTree):
        raise UserError(f"acceptance '{acceptance}' needs a tree of fixed shape; give one, or acceptance exact")


def _check_sampling(acceptance: str, sampling: Sampling) -> None:
    if ACCEPTANCE_RULES[acceptance].draws and not sampling.temperature:
        raise UserError(f"acceptance '{acceptance}' is for sampling; give a temperature above 0, or acceptance exact")


def _check_room(model: CausalModel, prefix: Prefix | None, length: int) -> None:
    """Refuses to fill the state of a prefix beyond its capacity."""
    if prefix is not None and has_growing_state(model.config.attention) and length > prefix.capacity:
        raise UserError(
            f"a text of {length} tokens does not fit into the prefix's state, which has room for {prefix.capacity}; "
            f"read the prefix again with room for {length - prefix.length} more"
        )


def _check_positions(model: CausalModel, prompt: int, new: int) -> None:
    """Refuses texts longer than the model's learnt positions; the last token is never read."""
    positions = getattr(model.config, "max_positions", None)
    if positions is not None and prompt + new - 1 > positions:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new ones do not fit into the model's {positions} positions; "
            "shorten the prompt, or ask for fewer tokens"
        )
