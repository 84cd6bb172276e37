"""Rotary positions (Su et al. 2021) with the frequency scalings that Hugging Face checkpoints name."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lin_jax.errors import UserError
from pallas_kernels.implementations import targets_single_cpu
from pallas_kernels.ordering import truth
from pallas_kernels.precision import accumulation_dtype

# Tokens from which on their table is kept: of fewer, the table takes no longer than keeping it.
_MANY_TOKENS = 8


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary frequencies. The fields and their meaning are those of Hugging Face's `rope_parameters`.

    A recurrent state cannot rotate old keys anew when a text grows, so `dynamic` and `longrope`, whose frequencies
    depend on the length, take them for `context_length` once and for all.

    Attributes:
        theta: base of the frequencies.
        scaling: default, linear, dynamic, yarn, longrope, llama3 or proportional.
        factor: length of a text as a multiple of that in pretraining.
        original_context_length: context length in pretraining.
        context_length: length that `dynamic` and `longrope` are set for; None means the pretraining length.
        attention_factor: factor on cos and sin (yarn, longrope); None derives it as the papers do.
        beta_fast: yarn: rotations above which a frequency is kept.
        beta_slow: yarn: rotations below which a frequency is divided by `factor`.
        mscale: yarn: weight in the derived attention factor.
        mscale_all_dim: yarn: weight in its denominator.
        truncate: yarn: whether the bounds are rounded to whole dimensions.
        low_freq_factor: llama3: lower bound of the smoothed band.
        high_freq_factor: llama3: upper bound of the smoothed band.
        short_factor: longrope: divisors `[D/2]` up to the pretraining length.
        long_factor: longrope: divisors `[D/2]` beyond it.
        partial_rotary_factor: proportional: share of the head that is rotated at all.
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original_context_length: int = 2048
    context_length: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise UserError(f"rotary.scaling '{self.scaling}' is unknown; choose one of {', '.join(SCALINGS)}")
        if self.scaling == "longrope" and (self.short_factor is None or self.long_factor is None):
            raise UserError("rotary.scaling 'longrope' needs rotary.short_factor and rotary.long_factor")
        if self.partial_rotary_factor != 1 and self.scaling != "proportional":
            raise UserError(
                f"rotary.partial_rotary_factor {self.partial_rotary_factor} does not go with rotary.scaling "
                f"'{self.scaling}'; only 'proportional' rotates a part of the head"
            )


def _base(theta: float, size: int) -> np.ndarray:
    return theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)


def _default(config: RotaryConfig, size: int) -> tuple[np.ndarray, float]:
    return _base(config.theta, size), 1.0


def _linear(config: RotaryConfig, size: int) -> tuple[np.ndarray, float]:
    return _base(config.theta, size) / config.factor, 1.0


def _dynamic(config: RotaryConfig, size: int) -> tuple[np.ndarray, float]:
    """NTK-aware: the base grows with the text's length."""
    original = config.original_context_length
    length = max(config.context_length or original, original)
    growth = config.factor * length / original - (config.factor - 1)
    return _base(config.theta * growth ** (size / (size - 2)), size), 1.0


def _yarn(config: RotaryConfig, size: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): fast frequencies kept, slow ones divided, a ramp between."""

    def dimension(rotations: float) -> float:
        ratio = config.original_context_length / (rotations * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    base = _base(config.theta, size)
    return base / config.factor * ramp + base * (1 - ramp), _yarn_attention_factor(config)


def _yarn_attention_factor(config: RotaryConfig) -> float:
    def scale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _longrope(config: RotaryConfig, size: int) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024): a divisor of its own for every frequency."""
    original = config.original_context_length
    long = (config.context_length or original) > original
    divisors = np.asarray(config.long_factor if long else config.short_factor, np.float64)
    if divisors.shape != (size // 2,):
        name = "long_factor" if long else "short_factor"
        raise UserError(f"rotary.{name} has {divisors.size} numbers; a head of size {size} needs {size // 2}")
    factor = config.attention_factor
    if factor is None:
        factor = 1.0 if config.factor <= 1 else math.sqrt(1 + math.log(config.factor) / math.log(original))
    return _base(config.theta, size) / divisors, factor


def _llama3(config: RotaryConfig, size: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: low frequencies divided, high ones kept, a smooth band between."""
    base = _base(config.theta, size)
    rotations = config.original_context_length * base / (2 * math.pi)
    smooth = (rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return base * (smooth + (1 - smooth) / config.factor), 1.0


def _proportional(config: RotaryConfig, size: int) -> tuple[np.ndarray, float]:
    """Only the fastest frequencies rotate, the rest of the head stands still."""
    turning = np.arange(size // 2) < int(config.partial_rotary_factor * size // 2)
    return np.where(turning, _base(config.theta, size), 0.0) / config.factor, 1.0


SCALINGS: dict[str, Callable[[RotaryConfig, int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def rotary_table(
    positions: Int[Array, "B T"], head_dim: int, config: RotaryConfig, dtype: jnp.dtype
) -> tuple[Float[Array, "B T D2"], Float[Array, "B T D2"]]:
    """Cosines and sines `[B, T, D/2]` of the rotation at each position, in float32 or better."""
    frequencies, factor = SCALINGS[config.scaling](config, head_dim)
    wide = accumulation_dtype(dtype)
    angles = positions[..., None].astype(wide) * jnp.asarray(frequencies, wide)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


@dataclass(frozen=True)
class RotaryTurn:
    """Rotary positions for mixers that turn queries and keys themselves (`attention.protocols.Turn`).

    Attributes:
        config: of the frequencies.
    """

    config: RotaryConfig

    def __call__(
        self, vectors: Float[Array, "B *tokens_heads D"], positions: Int[Array, "#B *tokens"]
    ) -> Float[Array, "B *tokens_heads D"]:
        """Vectors turned by the positions of their tokens; axes behind those of positions are heads."""
        return self._turned(vectors, rotary_table(*self._places(vectors, positions), vectors.dtype), positions)

    def back(
        self, vectors: Float[Array, "B *tokens_heads D"], positions: Int[Array, "#B *tokens"]
    ) -> Float[Array, "B *tokens_heads D"]:
        """Vectors as they were before they were turned."""
        cos, sin = rotary_table(*self._places(vectors, positions), vectors.dtype)
        factor = SCALINGS[self.config.scaling](self.config, vectors.shape[-1])[1]
        return self._turned(vectors, (cos / factor**2, -sin / factor**2), positions)

    def _places(self, vectors: Array, positions: Array) -> tuple[Array, int, RotaryConfig]:
        return positions.reshape(positions.shape[0], -1), vectors.shape[-1], self.config

    def _turned(self, vectors: Array, table: tuple[Array, Array], positions: Array) -> Array:
        tokens = math.prod(positions.shape[1:])
        return rotate(vectors.reshape(vectors.shape[0], tokens, -1, vectors.shape[-1]), table).reshape(vectors.shape)


def computed_once(table: tuple[Array, Array], given: Float[Array, "B T E"]) -> tuple[Array, Array]:
    """The rotary table of many tokens, kept as numbers by a program for CPUs.

    Where layers are not a loop, XLA would compute cosines and sines anew for every rotation, which takes longer than
    the rotation.

    Args:
        table: cosines and sines.
        given: anything that depends on the batch, and so is not known when the program is compiled.
    """
    few = given.shape[0] * given.shape[1] < _MANY_TOKENS
    if few or not targets_single_cpu():
        return table
    return jax.lax.cond(truth(given), lambda table: table, lambda table: jax.tree.map(jnp.zeros_like, table), table)


def rotate(
    vectors: Float[Array, "B T H D"], table: tuple[Float[Array, "B T D2"], Float[Array, "B T D2"]]
) -> Float[Array, "B T H D"]:
    """Rotates the pairs `(x_k, x_{k + D/2})` of each head."""
    cos, sin = table
    return _rotated(vectors.astype(cos.dtype), cos, sin).astype(vectors.dtype)


@jax.custom_vjp
def _rotated(
    vectors: Float[Array, "B T H D"], cos: Float[Array, "#B T D2"], sin: Float[Array, "#B T D2"]
) -> Float[Array, "B T H D"]:
    """The rotation; its gradient is the inverse one, which as derived by JAX takes three times as long on CPUs.

    Nothing learns through the table.
    """
    first, second = jnp.split(vectors, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rotated_forward(vectors: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rotated(vectors, cos, sin), (cos, sin)


def _rotated_backward(table: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    cos, sin = table
    return _rotated(cotangent, cos, -sin), None, None


_rotated.defvjp(_rotated_forward, _rotated_backward)
