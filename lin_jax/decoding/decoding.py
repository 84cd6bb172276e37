"""A batch being decoded: prompts wait for slots, slots run, finished rows make room (continuous batching)."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.decoding.generation import ENDINGS, Generation, Update
from lin_jax.decoding.loop import EMPTY, LoopState, Options, run, start
from lin_jax.decoding.pacing import Pace
from lin_jax.decoding.prefix import Prefix
from lin_jax.decoding.reading import Reading, nothing_read, read
from lin_jax.decoding.sampling import Sampling
from lin_jax.decoding.slots import bucket, insert, repeated
from lin_jax.decoding.tree import DraftTree

if TYPE_CHECKING:
    from lin_jax.decoding.generator import Generator


@dataclass
class _Row:
    """What has been seen of one prompt's output."""

    tokens: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    steps: int = 0
    ending: str = ENDINGS[EMPTY]


class Decoding:
    """Decodes prompts, as many at a time as there are slots, each until an end or its limit.

    Iterating hands over what every sequence gained, visit by visit; `generation` is everything so far.

    Args:
        generator: model, drafter and trees.
        prompts: token ids.
        max_new_tokens: limit of new tokens per prompt.
        sampling: how tokens are chosen.
        seed: of the random numbers.
        first_row: number of the first prompt, which keys its random numbers.
        slots: rows of the batch.
        prefix: what was read before every prompt.
        log_probs: whether log-probabilities are wanted.
        steps_per_visit: steps of the loop between two looks at it.
    """

    def __init__(
        self,
        generator: "Generator",
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling,
        seed: int,
        first_row: int,
        slots: int,
        prefix: Prefix | None,
        log_probs: bool,
        steps_per_visit: int,
    ) -> None:
        self.generator = generator
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.tree = generator.tree_for(slots)
        self.drafter = generator.drafter_for(self.tree)
        self.options = Options(self.tree, sampling, generator.acceptance, generator.end_tokens)
        self.plain = replace(self.options, tree=DraftTree())
        self.pace = Pace(generator.worth_for(slots))
        self.seed = jnp.asarray(seed, jnp.uint32)
        self.first_row = first_row
        self.prefix = prefix
        self.log_probs = log_probs
        self.steps_per_visit = steps_per_visit
        self.rows = [_Row() for _ in prompts]
        self.waiting = deque(range(len(prompts)))
        self.held: list[int | None] = [None] * slots
        self.yields = np.zeros(self.tree.depth + 1, np.int64)
        self.nodes = self.plain_steps = self.collected = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        longest = max(len(prompt) for prompt in prompts) + (0 if prefix is None else prefix.length)
        # A tree may reach past the last token that is kept.
        self.capacity = bucket(longest + max_new_tokens, 64) + self.tree.depth + 1
        began = time.perf_counter()
        first = [self.waiting.popleft() for _ in range(min(slots, len(prompts)))]
        self.held[: len(first)] = first
        self.state = self._begin(first, slots)
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.reading.model)) // slots
        # No step at all: the loop is compiled here, so that the time of decoding is that of decoding.
        self._run(0)
        self.prefill_seconds = time.perf_counter() - began

    def __iter__(self) -> Iterator[Update]:
        """Yields what the sequences gained, the first tokens at once, until all are finished."""
        yield from self.collect()
        while self.advance():
            yield from self.collect()

    @property
    def finished(self) -> bool:
        """Whether every prompt has its text."""
        return not self.waiting and all(row is None for row in self.held)

    @property
    def tokens_per_second(self) -> float:
        """Tokens collected so far per second of the loop: for showing progress."""
        return self.collected / self.decode_seconds if self.decode_seconds else 0.0

    def advance(self, steps: int | None = None) -> bool:
        """Gives free slots to waiting prompts, then runs the loop for some steps; False if there is nothing to do."""
        began = time.perf_counter()
        if self.waiting and None in self.held:
            self._fill()
            jax.block_until_ready(self.state)
            self.prefill_seconds += time.perf_counter() - began
        if self.finished:
            return False
        if not self.pace.drafts and not self.plain_steps:
            # Compiled only where it is needed, and outside the time of decoding.
            began = time.perf_counter()
            self._run(0)
            self.prefill_seconds += time.perf_counter() - began
        began = time.perf_counter()
        self._run(self.pace.visit(self.steps_per_visit if steps is None else steps))
        self.decode_seconds += time.perf_counter() - began
        return True

    def collect(self) -> list[Update]:
        """What every sequence gained since the last time; slots of finished ones become free."""
        state = self.state
        written, ending, steps = (np.asarray(part) for part in (state.written, state.ending, state.steps))
        output, origin = np.asarray(state.output), np.asarray(state.origin)
        chances = None if state.log_probs is None else np.asarray(state.log_probs)
        updates = []
        for slot, number in enumerate(self.held):
            if number is None:
                continue
            row = self.rows[number]
            part = slice(len(row.tokens), int(written[slot]))
            row.steps, row.ending = int(steps[slot]), ENDINGS[int(ending[slot])]
            gained = None if chances is None else chances[slot, part].tolist()
            update = Update(number, output[slot, part].tolist(), origin[slot, part].tolist(), gained, row.ending)
            row.tokens += update.tokens
            self.collected += len(update.tokens)
            row.origins += update.origins
            row.log_probs += gained or []
            if update.tokens or update.finished:
                updates.append(update)
            if update.finished:
                self.yields += np.asarray(state.yields[slot])
                self.held[slot] = None
        return updates

    @property
    def generation(self) -> Generation:
        """Everything so far."""
        running = [slot for slot, number in enumerate(self.held) if number is not None]
        yields = self.yields + np.asarray(self.state.yields)[running].sum(axis=0)
        return Generation(
            tokens=[list(row.tokens) for row in self.rows],
            origins=[list(row.origins) for row in self.rows],
            log_probs=[list(row.log_probs) for row in self.rows] if self.log_probs else None,
            endings=[row.ending for row in self.rows],
            steps=[row.steps for row in self.rows],
            yields=yields,
            nodes=self.nodes,
            plain_steps=self.plain_steps,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            state_bytes=self.state_bytes,
        )

    def _run(self, steps: int) -> None:
        options = self.options if self.pace.drafts else self.plain
        before = np.asarray(self.state.yields)
        self.state, done = run(
            self.generator.model,
            self.drafter,
            self.state,
            self.generator.stops,
            jnp.int32(steps),
            jnp.asarray(bool(self.waiting)),
            options=options,
        )
        steps = int(done)
        self.plain_steps += 0 if self.pace.drafts else steps
        self.nodes += steps * len(self.held) * options.tree.size
        self.pace.learn(steps, (np.asarray(self.state.yields) - before).sum(axis=0))

    def _fill(self) -> None:
        """Reads the next prompts, and puts them into the free slots."""
        free = [slot for slot, number in enumerate(self.held) if number is None]
        numbers = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        if not numbers:
            return
        fresh = self._begin(numbers, bucket(len(numbers)))
        slots = np.full(fresh.root.shape[0], len(self.held), np.int32)
        slots[: len(numbers)] = free[: len(numbers)]
        self.state = insert(self.state, fresh, jnp.asarray(slots))
        for slot, number in zip(free, numbers, strict=False):
            self.held[slot] = number

    def _begin(self, numbers: Sequence[int], count: int) -> LoopState:
        """The state of `count` rows, the first of them after reading some prompts and choosing their first tokens."""
        limit, rows = np.zeros(count, np.int32), np.zeros(count, np.int32)
        limit[: len(numbers)] = self.max_new_tokens
        rows[: len(numbers)] = np.asarray(numbers, np.int32) + self.first_row
        return start(
            self.generator.model,
            self._read([self.prompts[number] for number in numbers], count),
            jnp.asarray(limit),
            jnp.asarray(rows),
            self.seed,
            self.generator.stops,
            sampling=self.options.sampling,
            end_tokens=self.options.end_tokens,
            longest=self.tree.depth + 1,
            capacity=bucket(self.max_new_tokens, 16),
            log_probs=self.log_probs,
        )

    def _read(self, prompts: Sequence[Sequence[int]], count: int) -> Reading:
        """Reads prompts, piece by piece, behind the prefix if there is one."""
        if self.prefix is not None:
            reading = repeated(self.prefix.reading, count=count)
        else:
            seen = self.options.sampling.repetition_penalty != 1
            reading = nothing_read(self.generator.model, self.drafter, count, self.capacity, seen=seen)
        return read(self.generator.model, self.drafter, reading, prompts, self.generator.piece)
