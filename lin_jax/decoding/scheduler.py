"""Continuous batching: prompts wait for slots, slots run, finished rows make room for the next prompts."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.decoding.autotune.fallback import SpeculationFallback
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree
from lin_jax.decoding.engine.decode_loop import DecodeOptions, LoopState, RowStatus, run, start
from lin_jax.decoding.engine.prefill import DecodeState, init_decode_state, prefill
from lin_jax.decoding.engine.prefix_cache import Prefix
from lin_jax.decoding.engine.slots import bucket, insert_rows, repeat_rows
from lin_jax.decoding.engine.stop_strings import StopAutomaton
from lin_jax.decoding.results import WAITING, Generation, Update
from lin_jax.models import CausalModel


@dataclass(frozen=True)
class SchedulerSpec:
    """Model, drafter and options of a generator, resolved for one batch size.

    Attributes:
        model: the target.
        drafter: drafter that fills the tree of `options`.
        options: tree, sampling, acceptance and end tokens of the compiled loop.
        stops: automaton of the strings that end a row, or None.
        slots: rows of the batch.
        break_even_tokens: tokens that a step of the tree must yield for each row to be as fast as plain decoding; None
            if the tree is used whatever it yields.
        prefill_chunk_size: tokens of a prompt that are read at a time.
    """

    model: CausalModel
    drafter: Drafter
    options: DecodeOptions
    stops: StopAutomaton | None
    slots: int
    break_even_tokens: float | None
    prefill_chunk_size: int


@dataclass
class _Output:
    """Output of one prompt, as far as it has been collected."""

    tokens: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    steps: int = 0
    ending: str = WAITING


class Scheduler:
    """Decodes prompts, as many at a time as there are slots, each to its end or limit.

    Iterating gives the new tokens of every sequence, sync by sync; `generation` is everything so far.

    Args:
        spec: model, drafter and options.
        prompts: token ids of each prompt.
        max_new_tokens: largest number of new tokens per prompt.
        seed: seed of the random numbers.
        first_row: index of the first prompt, which keys its random numbers.
        prefix: decode state of a text before every prompt.
        log_probs: whether to keep log-probabilities.
        steps_per_sync: steps of the loop between two syncs with the host.
    """

    def __init__(
        self,
        spec: SchedulerSpec,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        seed: int,
        first_row: int,
        prefix: Prefix | None,
        log_probs: bool,
        steps_per_sync: int,
    ) -> None:
        self.spec = spec
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.plain_options = replace(spec.options, tree=DraftTree())
        self.fallback = SpeculationFallback(spec.break_even_tokens)
        self.seed = jnp.asarray(seed, jnp.uint32)
        self.first_row = first_row
        self.prefix = prefix
        self.log_probs = log_probs
        self.steps_per_sync = steps_per_sync
        self.outputs = [_Output() for _ in prompts]
        self.waiting = deque(range(len(prompts)))
        self.slot_to_prompt: list[int | None] = [None] * spec.slots
        self.accepted_histogram = np.zeros(self.tree.depth + 1, np.int64)
        self.nodes = self.plain_steps = self.collected = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        longest = max(len(prompt) for prompt in prompts) + (0 if prefix is None else prefix.length)
        # A tree may reach past the last token that is kept.
        self.capacity = bucket(longest + max_new_tokens, 64) + self.tree.depth + 1
        began = time.perf_counter()
        first = [self.waiting.popleft() for _ in range(min(spec.slots, len(prompts)))]
        self.slot_to_prompt[: len(first)] = first
        self.state = self._start_rows(first, spec.slots)
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.decode_state.model)) // spec.slots
        # No step at all: the loop is compiled here, so that the time of decoding is that of decoding.
        self._run(0)
        self.prefill_seconds = time.perf_counter() - began

    def __iter__(self) -> Iterator[Update]:
        """Yields the new tokens of the sequences, the first tokens at once, until all are finished."""
        yield from self.collect()
        while self.advance():
            yield from self.collect()

    @property
    def tree(self) -> AnyTree:
        """Shape of the drafts."""
        return self.spec.options.tree

    @property
    def finished(self) -> bool:
        """True if every prompt has its whole output."""
        return not self.waiting and all(index is None for index in self.slot_to_prompt)

    @property
    def tokens_per_second(self) -> float:
        """Tokens collected so far per second of the loop, for a progress bar."""
        return self.collected / self.decode_seconds if self.decode_seconds else 0.0

    def advance(self, steps: int | None = None) -> bool:
        """Gives free slots to waiting prompts, then runs the loop for some steps; False if nothing is left to do."""
        began = time.perf_counter()
        if self.waiting and None in self.slot_to_prompt:
            self._fill_slots()
            jax.block_until_ready(self.state)
            self.prefill_seconds += time.perf_counter() - began
        if self.finished:
            return False
        if not self.fallback.drafts and not self.plain_steps:
            # Compiled only where it is needed, and outside the time of decoding.
            began = time.perf_counter()
            self._run(0)
            self.prefill_seconds += time.perf_counter() - began
        began = time.perf_counter()
        self._run(self.fallback.steps_until_check(self.steps_per_sync if steps is None else steps))
        self.decode_seconds += time.perf_counter() - began
        return True

    def collect(self) -> list[Update]:
        """Collects the new tokens of every sequence; slots of finished ones become free."""
        state = self.state
        written, status, steps = (np.asarray(part) for part in (state.written, state.status, state.steps))
        output, origin = np.asarray(state.output), np.asarray(state.origin)
        log_probs = None if state.log_probs is None else np.asarray(state.log_probs)
        updates = []
        for slot, index in enumerate(self.slot_to_prompt):
            if index is None:
                continue
            result = self.outputs[index]
            new = slice(len(result.tokens), int(written[slot]))
            result.steps, result.ending = int(steps[slot]), RowStatus(int(status[slot])).label
            scores = None if log_probs is None else log_probs[slot, new].tolist()
            update = Update(index, output[slot, new].tolist(), origin[slot, new].tolist(), scores, result.ending)
            result.tokens += update.tokens
            self.collected += len(update.tokens)
            result.origins += update.origins
            result.log_probs += scores or []
            if update.tokens or update.finished:
                updates.append(update)
            if update.finished:
                self.accepted_histogram += np.asarray(state.accepted_histogram[slot])
                self.slot_to_prompt[slot] = None
        return updates

    @property
    def generation(self) -> Generation:
        """Results so far."""
        running = [slot for slot, index in enumerate(self.slot_to_prompt) if index is not None]
        accepted_histogram = self.accepted_histogram + np.asarray(self.state.accepted_histogram)[running].sum(axis=0)
        return Generation(
            tokens=[list(each.tokens) for each in self.outputs],
            origins=[list(each.origins) for each in self.outputs],
            log_probs=[list(each.log_probs) for each in self.outputs] if self.log_probs else None,
            endings=[each.ending for each in self.outputs],
            steps=[each.steps for each in self.outputs],
            accepted_histogram=accepted_histogram,
            nodes=self.nodes,
            plain_steps=self.plain_steps,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            state_bytes=self.state_bytes,
        )

    def _run(self, steps: int) -> None:
        """Runs the loop with the tree or plainly, as the fallback decides, and updates the statistics."""
        options = self.spec.options if self.fallback.drafts else self.plain_options
        before = np.asarray(self.state.accepted_histogram)
        self.state, done = run(
            self.spec.model,
            self.spec.drafter,
            self.state,
            self.spec.stops,
            jnp.int32(steps),
            jnp.asarray(bool(self.waiting)),
            options=options,
        )
        steps = int(done)
        self.plain_steps += 0 if self.fallback.drafts else steps
        self.nodes += steps * len(self.slot_to_prompt) * options.tree.size
        self.fallback.update(steps, (np.asarray(self.state.accepted_histogram) - before).sum(axis=0))

    def _fill_slots(self) -> None:
        """Reads the next prompts and puts them into the free slots."""
        free = [slot for slot, index in enumerate(self.slot_to_prompt) if index is None]
        indices = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        if not indices:
            return
        fresh = self._start_rows(indices, bucket(len(indices)))
        slots = np.full(fresh.root.shape[0], len(self.slot_to_prompt), np.int32)
        slots[: len(indices)] = free[: len(indices)]
        self.state = insert_rows(self.state, fresh, jnp.asarray(slots))
        for slot, index in zip(free, indices, strict=False):
            self.slot_to_prompt[slot] = index

    def _start_rows(self, indices: Sequence[int], count: int) -> LoopState:
        """State of `count` rows, the first of them with some prompts read and their first tokens chosen."""
        limit, rows = np.zeros(count, np.int32), np.zeros(count, np.int32)
        limit[: len(indices)] = self.max_new_tokens
        rows[: len(indices)] = np.asarray(indices, np.int32) + self.first_row
        return start(
            self.spec.model,
            self._prefill([self.prompts[index] for index in indices], count),
            jnp.asarray(limit),
            jnp.asarray(rows),
            self.seed,
            self.spec.stops,
            sampling=self.spec.options.sampling,
            end_tokens=self.spec.options.end_tokens,
            max_step_tokens=self.tree.depth + 1,
            capacity=bucket(self.max_new_tokens, 16),
            log_probs=self.log_probs,
        )

    def _prefill(self, prompts: Sequence[Sequence[int]], count: int) -> DecodeState:
        """Reads prompts, chunk by chunk, after the prefix if there is one."""
        if self.prefix is not None:
            decode_state = repeat_rows(self.prefix.decode_state, count=count)
        else:
            seen = self.spec.options.sampling.repetition_penalty != 1
            decode_state = init_decode_state(self.spec.model, self.spec.drafter, count, self.capacity, seen=seen)
        return prefill(self.spec.model, self.spec.drafter, decode_state, prompts, self.spec.prefill_chunk_size)
