"""Shares of attention's branches in the output of each head, layer by layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lin_jax.attention import single_rows
from lin_jax.errors import UserError
from lin_jax.evaluation.ablation import AblatableMixer, ablations
from lin_jax.models import CausalModel
from lin_jax.models.by_kind import ByKind
from lin_jax.models.prenorm_block import PreNormBlock
from lin_jax.models.stack import LayerStack
from pallas_kernels.precision import upcast


def branch_shares(model: CausalModel, tokens: Int[Array, "B T"]) -> dict[str, Float[np.ndarray, "L H"]]:
    """Measures how much of each head's output changes where a branch of its attention is left out.

    Every layer reads what it reads in the whole model, so that the figures of one layer do not depend on those below
    it. Branches may cancel each other, so that shares of one head need not add up to one.

    Args:
        model: a LLaMA or GPT-2.
        tokens: `[B, T]` a text, or several of one length.

    Returns:
        By the name of the branch, `|o - o without it| / |o|` over all tokens, for each layer and query head; NaN in
        layers that have no such branch.

    Raises:
        UserError: the model has layers of another kind, or a token that it does not know.
    """
    if not (isinstance(model.layers, LayerStack) and isinstance(model.layers.layers, PreNormBlock)):
        raise UserError(f"branches of a {type(model).__name__} are not measured; give a LLaMA or GPT-2")
    tokens = jnp.asarray(tokens, jnp.int32)
    if not 0 <= int(jnp.min(tokens)) <= int(jnp.max(tokens)) < model.config.vocab_size:
        raise UserError(f"a token is not among the model's {model.config.vocab_size}; encode with its own tokenizer")
    return {name: np.asarray(shares) for name, shares in _shares(model, tokens).items()}


@jax.jit
def _shares(model: CausalModel, tokens: Int[Array, "B T"]) -> dict[str, Float[Array, "L H"]]:
    names = ablations(model)
    layout = single_rows(tokens.shape, None)
    x, context = model.begin(tokens, layout.positions)

    def step(block: PreNormBlock, x: Array, _: None) -> tuple[Array, dict[str, Array]]:
        mixer = block.attention.mixer
        qkv = block.attention.project(block.attention_norm(x), context)
        whole, _ = mixer.parallel(qkv, layout)
        own = mixer.ablations() if isinstance(mixer, AblatableMixer) else ()
        found = {name: jnp.full(whole.shape[-2], math.nan, upcast(whole).dtype) for name in names}
        for name in own:
            rest, _ = mixer.without(name).parallel(qkv, layout)
            found[name] = _length(upcast(whole) - upcast(rest)) / _length(upcast(whole))
        return block.finish(x, block.attention.merge(whole)), found

    _, found = model.run(step, x, None)
    shares: dict[str, Array] = found.in_order() if isinstance(found, ByKind) else found
    return shares


def _length(outputs: Float[Array, "B T H E"]) -> Float[Array, " H"]:
    return jnp.sqrt(jnp.sum(jnp.square(outputs), axis=(0, 1, 3)))
