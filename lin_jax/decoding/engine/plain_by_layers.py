"""Plain decoding of large models, layer by layer, from the host."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lin_jax.attention import tree_arrays
from lin_jax.decoding.engine.decode_loop import DecodeOptions, accepted_path, committed, grown_tree, with_finite
from lin_jax.decoding.engine.layers_alone import LayerAlone, layers_alone
from lin_jax.decoding.engine.loop_state import LoopState, RowStatus
from lin_jax.decoding.engine.programs import Flat
from lin_jax.decoding.engine.step_loops import StepCount
from lin_jax.decoding.engine.stop_strings import StopAutomaton
from lin_jax.models.by_kind import ByKind

# The tree of a plain step: the root alone.
_ROOT = tree_arrays((-1,))


def plain_by_layers(
    modules: Flat, state: LoopState, stops: StopAutomaton | None, max_steps: int, waiting: bool, options: DecodeOptions
) -> tuple[LoopState, StepCount]:
    """Takes plain steps as `decode_loop.run` does, until all rows, or with prompts waiting one row, are finished.

    Args:
        modules: the target, and a drafter, which drafts nothing.
        state: state of the loop; its buffers are donated.
        stops: automaton of the stop strings, or None.
        max_steps: largest number of steps.
        waiting: whether prompts wait for a free row.
        options: static options; the tree is a single node.
    """
    steps, layers = 0, list(layers_alone(modules))
    while steps < max_steps:
        finished = np.asarray(state.status) != RowStatus.RUNNING
        if finished.all() or (waiting and finished.any()):
            break
        state = _step(modules, layers, state, stops, options)
        steps += 1
    return state, StepCount(jnp.asarray(steps), jnp.asarray(0))


def _step(
    modules: Flat,
    layers: Sequence[LayerAlone],
    state: LoopState,
    stops: StopAutomaton | None,
    options: DecodeOptions,
) -> LoopState:
    states = state.decode_state.model
    kinds = states.kinds if isinstance(states, ByKind) else (states,)
    x, context = _enter(modules, state)
    aux, nodes = [], []
    for each in layers:
        x, found = _verify(each.layer, each.place, x, context, kinds[each.kind])
        aux += [x] * each.is_aux
        nodes.append(found)
    return _leave(modules, state, x, aux, nodes, stops, options=options)


@jax.jit
def _enter(modules: Flat, state: LoopState) -> tuple[Array, Any]:
    """Inputs of the first layer, and what all layers read."""
    model = modules.whole()[0]
    return model.begin(jnp.maximum(state.root, 0)[:, None], model.position(state.decode_state.model)[:, None])


@jax.jit
def _verify(layer: Flat, place: Int[Array, ""], x: Array, context: Any, states: Any) -> tuple[Array, Any]:
    """Outputs of a layer for the root, and the root as `commit` takes it; the states are those of its kind's layers."""
    (block,) = layer.whole()
    return block.verify(x, context, _ROOT, jax.tree.map(lambda leaf: leaf[place], states))


@partial(jax.jit, static_argnames="options", donate_argnames="state")
def _leave(
    modules: Flat,
    state: LoopState,
    x: Array,
    aux: list[Array],
    nodes: list[Any],
    stops: StopAutomaton | None,
    *,
    options: DecodeOptions,
) -> LoopState:
    """The state after a step, from the outputs of the last layer, those of `aux_layers`, and every layer's root."""
    model, drafter = modules.whole()
    order = model.layers.order
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes) if order is None else ByKind.of(nodes, order)
    hidden = model.outputs(jnp.concatenate([x, *aux], axis=-1))
    draft = grown_tree(model, drafter, state, options)
    drafted = accepted_path(model, state, draft, hidden, together, options)
    return with_finite(committed(model, drafter, state, drafted, stops, options))
