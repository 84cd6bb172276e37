"""Generation from Python: prompts in, tokens out, with the loop's figures."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.attention import longest_path
from lin_jax.decoding.drafters import Drafter, NoDrafter
from lin_jax.decoding.loop import PROMPT, LoopState, prefill_piece, run, start
from lin_jax.decoding.sampling import Sampling
from lin_jax.decoding.tree import DraftTree
from lin_jax.errors import UserError
from lin_jax.models import CausalModel

GREEDY = Sampling()


@dataclass(frozen=True)
class Generation:
    """What was generated, and how.

    Attributes:
        tokens: per prompt, the new tokens (an end-of-text token included).
        origins: per prompt, who chose each of them: TARGET or DRAFT of `loop`.
        steps: per prompt, target steps taken after the first token.
        yields: `[P]` how often a step emitted 1, 2, ... tokens.
        prefill_seconds: time to read the prompts and choose the first tokens, and to compile what is new.
        decode_seconds: time of the loop.
        state_bytes: size of one sequence's recurrent state.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    steps: list[int]
    yields: np.ndarray
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


class Generator:
    """Decodes batches of prompts with one model and one way of drafting.

    Args:
        model: the target.
        drafter: where guesses come from; None decodes plainly.
        tree: shape of the draft; None is the empty tree without a drafter, else its best guess at every depth.
        end_tokens: tokens that end a row.
        piece: tokens of a prompt that are read at a time; it bounds the memory of reading.

    Raises:
        UserError: the tree asks for more than the drafter offers, or is deeper than a group is long.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        drafter: Drafter | None = None,
        tree: DraftTree | None = None,
        end_tokens: Sequence[int] = (),
        piece: int = 256,
    ) -> None:
        self.model = model
        self.drafter = drafter or NoDrafter()
        self.tree = DraftTree(tuple((0,) * d for d in range(1, self.drafter.depth + 1))) if tree is None else tree
        self.end_tokens = tuple(end_tokens)
        self.piece = piece
        _check(self.model, self.drafter, self.tree)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        first_row: int = 0,
    ) -> Generation:
        """Decodes all prompts together, each until an end token or `max_new_tokens`.

        Args:
            prompts: token ids; lengths may differ, none may be empty.
            max_new_tokens: limit of new tokens per prompt.
            sampling: how tokens are chosen.
            seed: of the random numbers.
            first_row: number of the first prompt, which keys its random numbers.
        """
        began = time.perf_counter()
        state = self.begin(prompts, max_new_tokens, sampling, seed, first_row)
        jax.block_until_ready(state.tokens)
        prefilled = time.perf_counter()
        state = self.advance(state, sampling, max_new_tokens)
        jax.block_until_ready(state.tokens)
        decoded = time.perf_counter()
        tokens, origins = _new_tokens(state, prompts)
        return Generation(
            tokens,
            origins,
            np.asarray(state.steps).tolist(),
            np.asarray(state.yields),
            prefilled - began,
            decoded - prefilled,
            state_bytes(state.model, len(prompts)),
        )

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        first_row: int = 0,
        steps_per_visit: int = 8,
    ) -> Iterator[Generation]:
        """Decodes one prompt and hands over the new tokens every few steps.

        Each `Generation` holds the tokens since the one before it, and the figures of that part alone.
        """
        began = time.perf_counter()
        state = self.begin([prompt], max_new_tokens, sampling, seed, first_row)
        jax.block_until_ready(state.tokens)
        prefill_seconds, seen = time.perf_counter() - began, len(prompt)
        steps, yields, decode_seconds = 0, np.zeros(self.tree.depth + 1, np.int64), 0.0
        while True:
            length, done = int(state.length[0]), bool(state.finished[0])
            part = slice(seen, length)
            total_steps, total_yields = int(state.steps[0]), np.asarray(state.yields)
            yield Generation(
                [np.asarray(state.tokens)[0, part].tolist()],
                [np.asarray(state.origin)[0, part].tolist()],
                [total_steps - steps],
                total_yields - yields,
                prefill_seconds,
                decode_seconds,
                state_bytes(state.model, 1),
            )
            if done:
                return
            seen, steps, yields, prefill_seconds = length, total_steps, total_yields, 0.0
            visit = time.perf_counter()
            state = self.advance(state, sampling, steps_per_visit)
            jax.block_until_ready(state.tokens)
            decode_seconds = time.perf_counter() - visit

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        first_row: int = 0,
    ) -> LoopState:
        """Reads the prompts, piece by piece, and chooses the first tokens; arguments as in `generate`.

        Raises:
            UserError: there is no prompt, an empty one, nothing to generate, or more than the model has positions for.
        """
        if max_new_tokens < 1:
            raise UserError(f"the number of new tokens is {max_new_tokens}; give at least 1")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt holds no token; give at least one (the end-of-text token will do)")
        batch = len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        _check_positions(self.model, int(lengths.max()), max_new_tokens)
        capacity = _bucket(int(lengths.max()) + max_new_tokens)
        tokens = np.zeros((batch, max(capacity, _round_up(int(lengths.max()), self.piece))), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        # A tree may reach past the last token that is kept.
        state = self.model.init_state(batch, capacity + self.tree.depth + 1)
        hidden = jnp.zeros((batch, self.model.config.hidden_size), self.model.config.dtype)
        for begin in range(0, int(lengths.max()), self.piece):
            here = np.clip(lengths - begin, 0, self.piece)
            state, hidden = prefill_piece(self.model, state, hidden, tokens[:, begin : begin + self.piece], here)
        loop_state = LoopState(
            model=state,
            hidden=hidden,
            tokens=jnp.asarray(tokens[:, :capacity]),
            origin=jnp.full((batch, capacity), PROMPT, jnp.int8),
            length=jnp.asarray(lengths),
            limit=jnp.asarray(lengths + max_new_tokens),
            rows=jnp.arange(first_row, first_row + batch, dtype=jnp.int32),
            seed=jnp.asarray(seed, jnp.uint32),
            finished=jnp.zeros(batch, bool),
            steps=jnp.zeros(batch, jnp.int32),
            yields=jnp.zeros(self.tree.depth + 1, jnp.int32),
        )
        state = start(self.model, loop_state, tree=self.tree, sampling=sampling, end_tokens=self.end_tokens)
        # No step at all: the loop is compiled here, so that the time of decoding is that of decoding.
        return self.advance(state, sampling, 0)

    def advance(self, state: LoopState, sampling: Sampling, max_steps: int) -> LoopState:
        """The state after `max_steps` more steps, or after all rows are finished; the given one is used up."""
        return run(
            self.model,
            self.drafter,
            state,
            jnp.int32(max_steps),
            tree=self.tree,
            sampling=sampling,
            end_tokens=self.end_tokens,
        )


def joined(parts: Sequence[Generation]) -> Generation:
    """One row's parts, as `Generator.stream` hands them over, put together again."""
    return Generation(
        [[token for part in parts for token in part.tokens[0]]],
        [[origin for part in parts for origin in part.origins[0]]],
        [sum(part.steps[0] for part in parts)],
        np.sum([part.yields for part in parts], axis=0),
        sum(part.prefill_seconds for part in parts),
        sum(part.decode_seconds for part in parts),
        parts[0].state_bytes,
    )


def state_bytes(state: object, batch: int) -> int:
    """Size in bytes of one sequence's share of a recurrent state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // batch


def _new_tokens(state: LoopState, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    tokens, origins, lengths = (np.asarray(part) for part in (state.tokens, state.origin, state.length))
    parts = [slice(len(prompt), int(length)) for prompt, length in zip(prompts, lengths, strict=True)]
    return (
        [row[part].tolist() for row, part in zip(tokens, parts, strict=True)],
        [row[part].tolist() for row, part in zip(origins, parts, strict=True)],
    )


def _bucket(length: int) -> int:
    """The next power of two, so that lengths share compiled programs."""
    return 1 << max(length - 1, 63).bit_length()


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _check(model: CausalModel, drafter: Drafter, tree: DraftTree) -> None:
    if tree.depth > drafter.depth or tree.width > drafter.width:
        raise UserError(
            f"the draft tree is {tree.depth} deep and {tree.width} wide, the drafter offers {drafter.depth} by "
            f"{drafter.width} guesses; give a smaller tree or another drafter"
        )
    longest = longest_path(model.config.attention)
    if longest is not None and tree.depth > longest:
        raise UserError(
            f"the draft tree is {tree.depth} deep, a group holds {longest + 1} tokens; give a tree less deep than that"
        )


def _check_positions(model: CausalModel, prompt: int, new: int) -> None:
    """Refuses texts that are longer than a model with learnt positions knows; the last token is never read."""
    positions = getattr(model.config, "max_positions", None)
    if positions is not None and prompt + new - 1 > positions:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new ones do not fit into the model's {positions} positions; "
            "shorten the prompt, or ask for fewer tokens"
        )
