"""Steps of speculative decoding one by one, each with its whole tree, for people to look at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from lin_jax.decoding.engine.decode_loop import DecodeOptions, DraftedStep, draft_and_verify, run, start
from lin_jax.decoding.engine.loop_state import LoopState
from lin_jax.decoding.engine.prefill import init_decode_state, prefill
from lin_jax.decoding.engine.programs import Flat
from lin_jax.decoding.engine.sampling import Sampling
from lin_jax.decoding.engine.slots import bucket
from lin_jax.decoding.generator import Generator, check_new_tokens
from lin_jax.errors import UserError


@dataclass(frozen=True)
class TracedStep:
    """A step of decoding with its tree.

    Attributes:
        tokens: token of each node, the root first, which the step before has chosen; -1 where there was no guess.
        parents: parent of each node; -1 of the root.
        accepted: nodes on the accepted path, from the root on.
        emitted: tokens that the step adds to the text: those of the accepted nodes below the root, and one more, which
            the model chose after the last of them; fewer where the text ends.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]
    emitted: tuple[int, ...]


def traced_steps(generator: Generator, prompt: Sequence[int], max_new_tokens: int) -> Iterator[TracedStep]:
    """Decodes one prompt greedily with a generator's tree, and yields every step.

    The steps are those of the compiled loop, which is stopped after each; this is for looking on, and slow.

    Args:
        generator: made with a tree; its stop strings and its choice among shapes play no part.
        prompt: token ids.
        max_new_tokens: largest number of new tokens, the root of the first step among them.

    Raises:
        UserError: the prompt is empty, or there is nothing to generate.
    """
    check_new_tokens(max_new_tokens)
    if not len(prompt):
        raise UserError("the prompt is empty; give at least one token (the end-of-text token will do)")
    model, tree = generator.model, generator.tree_for(1)
    drafter = generator.drafter_for(tree)
    options = DecodeOptions(tree, Sampling(), end_tokens=generator.end_tokens)
    capacity = bucket(len(prompt) + max_new_tokens, 64) + tree.depth + 1
    blank = init_decode_state(model, drafter, 1, capacity, seen=False)
    modules = Flat.of(model, drafter)
    state = start(
        Flat.of(model),
        prefill(modules, blank, [prompt], generator.prefill_chunk_size),
        np.full(1, max_new_tokens, np.int32),
        np.zeros(1, np.int32),
        np.uint32(0),
        None,
        sampling=Sampling(),
        end_tokens=generator.end_tokens,
        max_step_tokens=tree.depth + 1,
        capacity=bucket(max_new_tokens, 16),
        log_probs=False,
    )
    while not bool(state.finished[0]):
        before, drafted = int(state.written[0]), _drafted(modules, state, options=options)
        state, _ = run(modules, state, None, np.int32(1), np.bool_(False), options=options)
        yield _traced(drafted, np.asarray(state.output)[0, before : int(state.written[0])])


@partial(jax.jit, static_argnames="options")
def _drafted(modules: Flat, state: LoopState, *, options: DecodeOptions) -> DraftedStep:
    model, drafter = modules.whole()
    return draft_and_verify(model, drafter, state, options)


def _traced(step: DraftedStep, emitted: np.ndarray) -> TracedStep:
    draft, accepted = step.draft, step.accepted
    path = np.asarray(accepted.path)[0, : int(accepted.length[0])]
    return TracedStep(
        tuple(np.asarray(draft.tokens)[0].tolist()),
        (-1, *np.asarray(draft.parents)[0, 1:].tolist()),
        tuple(path.tolist()),
        tuple(emitted.tolist()),
    )
