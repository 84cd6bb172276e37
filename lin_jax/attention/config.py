"""Options of token mixers: those that a user chooses, and those that a model family fixes."""

from dataclasses import dataclass
from typing import Literal

from lin_jax.errors import UserError
from pallas_kernels.augmented_attention.api import IMPLEMENTATIONS


@dataclass(frozen=True)
class Conventions:
    """Preparation of queries, keys and scores, as it differs between published models and no user chooses it.

    Attributes:
        unit: scale queries and keys of the local and grouped branches (and of `square`) to length one.
        unit_values: the same for the values of both branches, not of the convolution (T5).
        separate: queries and keys hold those of the local and of the grouped branch side by side (FLASH).
        inverse_group: divide local scores and the grouped branch by the group size (FLASH); where the branch is
            bidirectional, divide it by `length` instead.
        bias: place of the local branch's relative bias: on the scores, or on the weights after the score function.
        merged_norm: divide all heads' outputs together by `1e-4` plus their length, before the convolution (T5).
        softmax_scale: factor of softmax scores: `D^-1/2`, one, or the inverse length (FLASH).
        length: the length that `square`, a softmax scaled by it and FLASH's bidirectional branch divide by: the tokens
            that the query sees, or the row's, padding included, as published for FLASH, which cannot decode.
        centred: whether a bidirectional convolution sees both sides, or the past only (FLASH).
        factor: whether the grouped branch beside a local one has a learnt factor alpha (not in FLASH).
    """

    unit: bool = True
    unit_values: bool = False
    separate: bool = False
    inverse_group: bool = False
    bias: Literal["scores", "weights"] = "weights"
    merged_norm: bool = False
    softmax_scale: Literal["root", "one", "length"] = "root"
    length: Literal["position", "row"] = "position"
    centred: bool = True
    factor: bool = True


@dataclass(frozen=True)
class AttentionConfig:
    """Name and sizes of a token mixer.

    Attributes:
        name: an attention of the registry, with `+local` and `+convolution` behind it for the augmentation, such as
            `performer+local+convolution`; `augmented` is short for `flash_global+local+convolution`.
        group_size: tokens in a group, by absolute position.
        kernel_size: odd size of the centred convolution kernel whose future half is masked away in causal models.
        local_score: score function of the local branch: relu_squared, laplace or yoso.
        initial_alpha: initial value of the learnt factor of the branch beside a local one.
        features: random features of performer and rfa; None takes twice the head's size.
        rank: summaries of each group in linformer.
        hashes: hash tables of yoso.
        hash_bits: bits of each hash of yoso; a table has `2^hash_bits` rows.
        diagonal_layers: first layers that transnormer gives softmax attention inside groups.
        convolve_padding: let the convolution of an encoder read padding, as the published T5 does.
        implementation: of the kernels for the local and grouped branches and the convolution: xla, tpu, gpu, or the
            last two interpreted; None takes what suits the platform. Softmax over whole rows goes through cuDNN on a
            GPU unless this is xla.
    """

    name: str = "augmented"
    group_size: int = 64
    kernel_size: int = 63
    local_score: str = "relu_squared"
    initial_alpha: float = 0.0
    features: int | None = None
    rank: int = 4
    hashes: int = 16
    hash_bits: int = 6
    diagonal_layers: int = 1
    convolve_padding: bool = False
    implementation: str | None = None

    @classmethod
    def of(cls, attention: "str | AttentionConfig") -> "AttentionConfig":
        """Takes a name for the configuration with that name, and a configuration as it is.

        Raises:
            UserError: it is neither.
        """
        if isinstance(attention, AttentionConfig):
            return attention
        if not isinstance(attention, str):
            raise UserError(f"attention is {attention!r}; give a name, such as 'augmented', or an AttentionConfig")
        return cls(attention)

    def __post_init__(self) -> None:
        for name in ("group_size", "rank", "hashes", "hash_bits"):
            if getattr(self, name) < 1:
                raise UserError(f"attention.{name} is {getattr(self, name)}; give a positive number")
        if self.features is not None and self.features < 2:
            raise UserError(f"attention.features is {self.features}; give at least 2")
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise UserError(
                f"attention.implementation is '{self.implementation}'; choose one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.diagonal_layers < 0:
            raise UserError(f"attention.diagonal_layers is {self.diagonal_layers}; give zero or more")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(
                f"attention.kernel_size is {self.kernel_size}; give an odd number, so that the kernel has a centre"
            )
