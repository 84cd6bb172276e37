"""FLASH (Hua et al. 2022): gated attention units over any token mixer, with scaled sinusoidal positions."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import packed_rows, single_rows
from lin_jax.models.causal import CausalModel
from lin_jax.models.flash.config import FlashConfig
from lin_jax.models.flash.gated_attention import GatedAttentionUnit, flash_linear
from lin_jax.models.layers import LayerNorm, embedding
from lin_jax.models.logical_axes import EMBED, VOCABULARY
from lin_jax.models.rotary import RotaryConfig, computed_once, rotary_table
from lin_jax.models.stack import LayerStack
from pallas_kernels.precision import upcast


class _FlashBody(nnx.Module):
    """Base of a causal FLASH and an encoder: embeddings, units, and the head behind a layer norm."""

    def __init__(self, config: FlashConfig, form: Literal["causal", "bidirectional"], rngs: nnx.Rngs) -> None:
        self.config = config
        param_dtype = jnp.dtype(config.param_dtype)
        self.embed = embedding(config, config.vocab_size, config.hidden_size, config.initializer_range, rngs)
        self.position_scale = nnx.Param(jnp.full((1,), config.hidden_size**-0.5, param_dtype))
        self.layers = LayerStack(
            lambda rngs, layer: GatedAttentionUnit(config, layer, form, rngs=rngs),
            config.num_layers,
            compute=config.compute,
            rngs=rngs,
        )
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, param_dtype)
        self.head = flash_linear(config, config.hidden_size, self.embed.num_embeddings, (EMBED, VOCABULARY), rngs)

    def begin(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T E"], tuple[Array, Array]]:
        """Embeddings of tokens and positions, and the rotary table of the positions."""
        dtype = jnp.dtype(self.config.dtype)
        cos, sin = rotary_table(positions, self.config.hidden_size, RotaryConfig(), dtype)
        waves = jnp.concatenate([sin, cos], axis=-1) * self.position_scale[...].astype(sin.dtype)
        table = rotary_table(positions, self.config.rotary_size, RotaryConfig(), dtype)
        x = self.embed(tokens) + waves.astype(dtype)
        return x, computed_once(table, x)

    def finish(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The final norm."""
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """Logits in float32 or better."""
        return upcast(self.head(hidden[..., : self.config.hidden_size]))


class Flash(_FlashBody, CausalModel):
    """A causal language model. `config.vocab_size` must be set."""

    def __init__(self, config: FlashConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, "causal", rngs)
        self.nodes_read_parents = config.shift_size > 0


class FlashEncoder(_FlashBody):
    """An encoder with a head over the vocabulary at every token. `config.vocab_size` must be set."""

    def __init__(self, config: FlashConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, "bidirectional", rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits at every position; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, segment_ids, mask=mask))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Hidden vectors at every position; arguments as in `CausalModel.hidden`."""
        layout = single_rows(tokens.shape, mask) if segment_ids is None else packed_rows(segment_ids)
        x, table = self.begin(tokens, layout.positions)
        x, _ = self.layers(lambda unit, x, _: (unit.bidirectional(x, table, layout), None), x, None)
        return self.finish(x)
