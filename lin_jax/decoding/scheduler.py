"""Continuous batching: prompts wait for slots, slots run, finished rows make room for the next prompts."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.decoding.autotune.choice import NO_ALERT, Choice
from lin_jax.decoding.autotune.steering import Steering
from lin_jax.decoding.autotune.step_costs import time_shape
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.ngram_lookup import MOST_WATCHED_ROWS
from lin_jax.decoding.drafting.suffix_index import MAX_MATCH
from lin_jax.decoding.drafting.text_memory import TextMemory
from lin_jax.decoding.drafting.tree import tree_text
from lin_jax.decoding.engine.decode_loop import DecodeOptions, run, start
from lin_jax.decoding.engine.layers_alone import runs_by_layers, stays_by_layers
from lin_jax.decoding.engine.loop_state import LoopState, RowStatus
from lin_jax.decoding.engine.plain_by_layers import plain_by_layers
from lin_jax.decoding.engine.prefill import DecodeState, init_decode_state, prefill
from lin_jax.decoding.engine.prefix_cache import Prefix
from lin_jax.decoding.engine.programs import Flat, ProgramCompiler, blank, shapes_of
from lin_jax.decoding.engine.slots import bucket, insert_rows, repeat_rows
from lin_jax.decoding.engine.step_loops import LossLimit, StepCount
from lin_jax.decoding.engine.stop_strings import StopAutomaton
from lin_jax.decoding.results import WAITING, Generation, Update
from lin_jax.errors import UserError
from lin_jax.models import CausalModel

# Room for the output of a row, in tokens, five bytes each: shorter ones share compiled programs.
SHORTEST_OUTPUT = 256
# Tokens left to a row for which a loop of all layers is compiled where steps can be taken layer by layer.
WORTH_A_LOOP = 64


@dataclass(frozen=True)
class SchedulerSpec:
    """Model, drafter and options of a generator, resolved for one batch size.

    Attributes:
        model: the target.
        drafter: drafter that fills the trees of `options`.
        options: tree, sampling, acceptance and end tokens of each compiled loop, plain decoding first; they differ in
            their trees alone.
        stops: automaton of the strings that end a row, or None.
        slots: rows of the batch.
        prefill_chunk_size: tokens of a prompt that are read at a time.
        compiler: compiles the loops.
        adaptive: whether the loop leaves a tree by itself before it has lost too much.
        switching: indices of the options whose trees are copied from the text itself alone: of few rows, their loop
            takes plain steps where there is nothing to copy.
        memory: what finished outputs are added to, each with the end of its prompt; or None.
    """

    model: CausalModel
    drafter: Drafter
    options: tuple[DecodeOptions, ...]
    stops: StopAutomaton | None
    slots: int
    prefill_chunk_size: int
    compiler: ProgramCompiler
    adaptive: bool = False
    switching: frozenset[int] = frozenset()
    memory: TextMemory | None = None

    @property
    def depth(self) -> int:
        """Depth of the deepest tree."""
        return max(each.tree.depth for each in self.options)


def _running(state: LoopState) -> LoopState:
    """State whose rows all run, with nothing written yet; its arrays are of the same types, on the same devices."""
    size = state.output.shape[1]
    return replace(state, written=state.written * 0, limit=state.limit * 0 + size, status=state.status * 0)


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
        steering: chooses among the trees of the options.
        prompts: token ids of each prompt.
        max_new_tokens: largest number of new tokens per prompt.
        seed: seed of the random numbers.
        first_row: index of the first prompt, which keys its random numbers.
        prefix: decode state of a text before every prompt.
        log_probs: whether to keep log-probabilities.
        steps_per_sync: largest number of steps of the loop between two syncs with the host.
    """

    def __init__(
        self,
        spec: SchedulerSpec,
        steering: Steering,
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
        self.steering = steering
        if spec.memory is not None:
            spec.memory.refresh(cheaply=spec.adaptive)
        self.model, self.modules = Flat.of(spec.model), Flat.of(spec.model, spec.drafter)
        self._by_layers = runs_by_layers(self.modules)
        self.seed = np.uint32(seed)
        self.first_row = first_row
        self.prefix = prefix
        self.log_probs = log_probs
        self.steps_per_sync = steps_per_sync
        self.outputs = [_Output() for _ in prompts]
        self.waiting = deque(range(len(prompts)))
        self.slot_to_prompt: list[int | None] = [None] * spec.slots
        self.accepted_histogram = np.zeros(spec.depth + 1, np.int64)
        self.shape_steps: Counter[int] = Counter()
        self.nodes = self.collected = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        longest = max(len(prompt) for prompt in prompts) + (0 if prefix is None else prefix.length)
        # A tree may reach past the last token that is kept.
        self.capacity = bucket(longest + max_new_tokens, 64) + spec.depth + 1
        began = time.perf_counter()
        first = [self.waiting.popleft() for _ in range(min(spec.slots, len(prompts)))]
        self.state = self._start_rows(first, spec.slots)
        self._shapes = shapes_of(self.state)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(self._shapes)]
        # Texts, whose hashes Python keeps.
        self._keys = [f"{options} {shapes} {spec.adaptive}" for options in spec.options]
        # Output tokens of each slot that the steering has read.
        self._read = [0] * spec.slots
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.decode_state.model)) // spec.slots
        jax.block_until_ready(self.state.root)
        self._begin_rows(dict(enumerate(first)))
        self.prefill_seconds = time.perf_counter() - began

    def __iter__(self) -> Iterator[Update]:
        """Yields the new tokens of the sequences, the first tokens at once, until all are finished."""
        yield from self.collect()
        while self.advance():
            yield from self.collect()

    @property
    def finished(self) -> bool:
        """True if every prompt has its whole output."""
        return not self.waiting and all(index is None for index in self.slot_to_prompt)

    @property
    def tokens_per_second(self) -> float:
        """Tokens collected so far per second of the loop, for a progress bar."""
        return self.collected / self.decode_seconds if self.decode_seconds else 0.0

    def tokens_before(self, index: int) -> list[int]:
        """Last tokens before the output of a prompt: its own, behind those of the prefix."""
        return [*(() if self.prefix is None else self.prefix.tail), *self.prompts[index]]

    def advance(self, steps: int | None = None) -> bool:
        """Gives free slots to waiting prompts, then runs the loop for some steps; False if nothing is left to do."""
        began = time.perf_counter()
        if self.waiting and None in self.slot_to_prompt:
            self._fill_slots()
            jax.block_until_ready(self.state)
            self.prefill_seconds += time.perf_counter() - began
        if self.finished:
            return False
        began = time.perf_counter()
        running = np.asarray(self.state.status) == RowStatus.RUNNING
        # What each row may still be given decides where no prompts wait for its place.
        left = None if self.waiting else np.asarray(self.state.limit) - np.asarray(self.state.written)
        compiling = self._compile(running, left)
        most = self.steps_per_sync if steps is None else steps
        self._run(self.steering.choose(running, self._is_ready, most, left))
        self.decode_seconds += time.perf_counter() - began - compiling
        self.prefill_seconds += compiling
        return True

    def collect(self) -> list[Update]:
        """Collects the new tokens of every sequence; slots of finished ones become free.

        Raises:
            UserError: the numbers of a sequence have become NaN or infinite.
        """
        state = self.state
        finite = np.asarray(state.finite)
        written, status, steps = (np.asarray(part) for part in (state.written, state.status, state.steps))
        output, origin = np.asarray(state.output), np.asarray(state.origin)
        log_probs = None if state.log_probs is None else np.asarray(state.log_probs)
        updates = []
        for slot, index in enumerate(self.slot_to_prompt):
            if index is None:
                continue
            if not finite[slot]:
                raise UserError(
                    f"the logits of prompt {index + 1} have become NaN or infinite within {int(written[slot])} tokens: "
                    "the model's numbers overflow; give another checkpoint, or this one in a wider type "
                    "(python -m lin_jax hub import --dtype float32)"
                )
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
                memory = self.spec.memory
                if memory is not None and memory.add([*self.prompts[index][-MAX_MATCH:], *result.tokens]):
                    # The drafter reads the new index.
                    self.modules = Flat.of(self.spec.model, self.spec.drafter)
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
            plain_steps=self.shape_steps[0] if len(self.spec.options) > 1 else 0,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            state_bytes=self.state_bytes,
            steps_by_tree={tree_text(self.spec.options[shape].tree): n for shape, n in self.shape_steps.items()},
        )

    def _run(self, choice: Choice) -> None:
        """Runs the loop with the chosen tree, and updates the statistics."""
        before, began = np.asarray(self.state.accepted_histogram).copy(), time.perf_counter()
        self.state, count = self._call(choice.arm, self.state, choice.steps, choice)
        steps, drafted = int(count.taken), int(count.drafted)
        seconds = time.perf_counter() - began
        taken = ((0, steps - drafted), (choice.arm, drafted))
        self.shape_steps += Counter({shape: number for shape, number in taken if number})
        self.nodes += len(self.slot_to_prompt) * sum(each * self.spec.options[arm].tree.size for arm, each in taken)
        histogram = np.asarray(self.state.accepted_histogram) - before
        written, output = np.asarray(self.state.written).tolist(), np.asarray(self.state.output)

        def new_tokens(slot: int) -> list[int]:
            begin, self._read[slot] = self._read[slot], written[slot]
            return output[slot, begin : written[slot]].tolist()

        self.steering.update(choice, steps, drafted, seconds, histogram, new_tokens)

    def _call(
        self, shape: int, state: LoopState, steps: int, choice: Choice | None = None
    ) -> tuple[LoopState, StepCount]:
        """Takes steps with a tree, in a loop on the device, or layer by layer where that is to be or is not there."""
        if not self._has_layers(shape) or self._is_ready(shape):
            return self._loop(shape, state, steps, choice)
        options = self.spec.options[shape]
        return plain_by_layers(self.modules, state, self.spec.stops, steps, bool(self.waiting), options)

    def _has_layers(self, shape: int) -> bool:
        """True for plain steps of a large model, which can be taken layer by layer."""
        return self._by_layers and self.spec.options[shape].tree.size == 1

    def _watches(self, shape: int) -> bool:
        """True for loops that watch for what there is to copy."""
        few = self.spec.adaptive and self.spec.drafter.lookback and self.spec.slots <= MOST_WATCHED_ROWS
        return bool(few) and (not shape or shape in self.spec.switching)

    def _loop(
        self, shape: int, state: LoopState, steps: int, choice: Choice | None = None
    ) -> tuple[LoopState, StepCount]:
        """Calls the loop with a tree; plain decoding has nothing to lose, and no limit on that."""
        limit = alert = None
        if self._watches(shape):
            alert = np.int32(NO_ALERT if choice is None else choice.alert)
        if shape and self.spec.adaptive:
            cost, allowance = (1.0, 0.0) if choice is None else (choice.cost, choice.allowance)
            limit = LossLimit(np.float32(cost), np.float32(allowance))
        # NumPy's numbers: making arrays of JAX's on the device would take longer than a step of a small model.
        count, waiting = np.int32(steps), np.bool_(bool(self.waiting))
        return run(self.modules, state, self.spec.stops, count, waiting, limit, alert, options=self.spec.options[shape])

    def _compile(self, running: np.ndarray, left: np.ndarray | None) -> float:
        """Compiles what is needed now, and has the tree compiled that is wanted next; gives the seconds of waiting."""
        needed = self.steering.needed
        wanted = self.steering.wanted(running, self._is_ready, left)
        began = time.perf_counter()
        if self._has_layers(needed):
            if not self.spec.compiler.is_ready(layers := f"layers, {self._keys[needed]}"):
                # A step of rows that have no room for it.
                self._call(needed, blank(self._shapes), 1)
                self.spec.compiler.add(layers)
            whole = self._watches(needed) or not stays_by_layers(self.modules)
            if whole and not self._is_ready(needed) and (left is None or left.max() >= WORTH_A_LOOP):
                # Until that is there, decoding goes on.
                wanted = needed
        elif not self._is_ready(needed):
            # No step at all, so that the time of decoding is that of decoding.
            self.state, _ = self._loop(needed, self.state, 0)
            self.spec.compiler.add(self._keys[needed])
        if wanted is not None:
            self.spec.compiler.request(self._keys[wanted], lambda: self._loop(wanted, blank(self._shapes), 0))
        for shape in range(len(self._keys)):
            if self._is_ready(shape) and self.steering.is_unknown(shape):
                self._time(shape)
        return time.perf_counter() - began

    def _time(self, shape: int) -> None:
        """Times a compiled tree against plain decoding, on copies of the state."""

        def taking(tree: int) -> Callable[[int], int]:
            deepest = self.spec.options[tree].tree.depth

            def take_steps(count: int) -> int:
                # Room for all that the steps could write, in every row.
                most = max(scratch[0].output.shape[1] // (deepest + 1), 1)
                # A tree at every step, whatever there is to copy.
                unlimited = Choice(tree, 0, alert=0) if tree else Choice(0, 0)
                scratch[0], done = self._call(tree, _running(scratch[0]), min(count, most), unlimited)
                return int(done.taken)

            return take_steps

        scratch = [jax.tree.map(jnp.copy, self.state)]
        self.steering.take_timing(shape, time_shape(taking(0), taking(shape)))

    def _is_ready(self, shape: int) -> bool:
        return self.spec.compiler.is_ready(self._keys[shape])

    def _begin_rows(self, indices: dict[int, int]) -> None:
        """Notes which prompts have taken which slots, each with its first token."""
        written, output = np.asarray(self.state.written), np.asarray(self.state.output)
        for slot, index in indices.items():
            self.slot_to_prompt[slot] = index
            self._read[slot] = int(written[slot])
            self.steering.begin_row(slot, [*self.prompts[index], *output[slot, : written[slot]].tolist()])

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
        self._begin_rows(dict(zip(free, indices, strict=False)))

    def _start_rows(self, indices: Sequence[int], count: int) -> LoopState:
        """State of `count` rows, the first of them with some prompts read and their first tokens chosen."""
        limit, rows = np.zeros(count, np.int32), np.zeros(count, np.int32)
        limit[: len(indices)] = self.max_new_tokens
        rows[: len(indices)] = np.asarray(indices, np.int32) + self.first_row
        return start(
            self.model,
            self._prefill([self.prompts[index] for index in indices], count),
            limit,
            rows,
            self.seed,
            self.spec.stops,
            sampling=self.spec.options[0].sampling,
            end_tokens=self.spec.options[0].end_tokens,
            max_step_tokens=self.spec.depth + 1,
            capacity=bucket(self.max_new_tokens, SHORTEST_OUTPUT),
            log_probs=self.log_probs,
        )

    def _prefill(self, prompts: Sequence[Sequence[int]], count: int) -> DecodeState:
        """Reads prompts, chunk by chunk, after the prefix if there is one."""
        if self.prefix is not None:
            decode_state = repeat_rows(self.prefix.decode_state, count=count)
        else:
            seen = self.spec.options[0].sampling.repetition_penalty != 1
            decode_state = init_decode_state(self.spec.model, self.spec.drafter, count, self.capacity, seen=seen)
        return prefill(self.modules, decode_state, prompts, self.spec.prefill_chunk_size)
