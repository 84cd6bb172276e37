"""Sizes and options of a FLASH."""

import math
from dataclasses import dataclass, field
from typing import Literal

from lin_jax.attention import AttentionConfig, Conventions, parse_name
from lin_jax.errors import UserError
from lin_jax.models.compute import ComputeConfig, check_choice

# Attentions whose branches have queries and keys of their own.
TWO_BRANCHES = ("flash_local", "flash_global", "flash", "linear_angular")
# Features of queries and keys that are rotated, at most.
_ROTATED = 32


@dataclass(frozen=True)
class FlashConfig(ComputeConfig):
    """Sizes and options of a FLASH.

    Attributes:
        vocab_size: entries of the vocabulary; None takes the tokenizer's.
        hidden_size: width E of the residual stream.
        num_layers: gated attention units.
        query_key_size: size S of queries and keys.
        expansion_factor: size of values and gate, as a multiple of hidden_size.
        norm: norm before each unit: scale (Nguyen and Salazar 2019) or layer.
        shift_tokens: take the first half of every unit's input from the token before.
        relative_buckets: buckets of distances that have a bias.
        relative_max_distance: distances from here on share the last bucket.
        length_scale: divisor of the scores of softmax and square: the query's `position`, counted from one, or the
            length of the `row`, as in the published code, which cannot decode.
        norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial weights.
        attention: the token mixer.
    """

    vocab_size: int | None = None
    hidden_size: int = 256
    num_layers: int = 8
    query_key_size: int = 128
    expansion_factor: float = 2.0
    norm: Literal["scale", "layer"] = "scale"
    shift_tokens: bool = True
    relative_buckets: int = 32
    relative_max_distance: int = 128
    length_scale: Literal["position", "row"] = "position"
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attention", AttentionConfig.of(self.attention))
        check_choice(self, "norm", ("scale", "layer"))
        check_choice(self, "length_scale", ("position", "row"))
        if self.hidden_size % 2:
            raise UserError(f"model.hidden_size is {self.hidden_size}; sines and cosines need an even size")
        if self.rotary_size % 2:
            raise UserError(f"model.query_key_size is {self.query_key_size}; rotary positions need an even size")
        if self.inner_size < 1:
            raise UserError(f"model.expansion_factor is {self.expansion_factor}; give a positive number")
        if self.relative_buckets < 4 or self.relative_buckets % 2:
            raise UserError(f"model.relative_buckets is {self.relative_buckets}; give an even number, at least 4")
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"model.relative_max_distance is {self.relative_max_distance}; give more than "
                f"{self.relative_buckets // 2}, the distances that {self.relative_buckets} buckets tell apart"
            )

    @property
    def inner_size(self) -> int:
        """Size of values and gate."""
        return int(self.hidden_size * self.expansion_factor)

    @property
    def rotary_size(self) -> int:
        """Number of features of queries and keys that are rotated."""
        return min(_ROTATED, self.query_key_size)

    @property
    def shift_size(self) -> int:
        """Number of features of a unit's input that come from the token before."""
        return math.ceil(self.hidden_size / 2) if self.shift_tokens else 0

    @property
    def two_branches(self) -> bool:
        """True where queries and keys are those of two branches, side by side."""
        return parse_name(self.attention.name).base in TWO_BRANCHES

    @property
    def conventions(self) -> Conventions:
        """Conventions of FLASH's mixers."""
        return Conventions(
            unit=False,
            separate=self.two_branches,
            inverse_group=self.two_branches,
            bias="scores",
            softmax_scale="length",
            length=self.length_scale,
            centred=False,
            factor=False,
            relative=True,
        )
