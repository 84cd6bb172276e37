"""Attentions as they should not be, for the study alone: a filter that sees the future, and an inexact boundary.

`unmasked` is augmented linear attention whose convolution has no mask: a centred filter over whole rows. `masked` is
the same with the same parameters as it decodes: no future is there, and its half of the filter reads nothing.
`published_boundary` is FLASH's global attention, with what its name adds, that verifies a draft as the published code
of You et al. (2024) does: where a draft goes on in the next group, the group that just ended is in nobody's memory yet.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention import AttentionConfig
from lin_jax.attention.augmentation import WrappedAttention
from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.composition import ComposedAttention
from lin_jax.attention.convolution import Convolution
from lin_jax.attention.layout import Layout
from lin_jax.attention.registry import REGISTRY, AttentionEntry, Name, Sizes
from lin_jax.attention.state import TreePairs
from pallas_kernels.pairs import merge_heads
from pallas_kernels.types import QKV, AugmentedState, Nodes, TreeArrays

UNMASKED, MASKED, PUBLISHED = "unmasked", "masked", "published_boundary"
# The attention that they change.
GLOBAL = "flash_global"


class UnmaskedConvolution(Convolution):
    """A centred filter that sees later tokens of whole rows where it is let; decoding has none to show it.

    Args:
        kernel_size: odd size of the filter.
        heads: query heads H.
        kv_heads: key/value heads K.
        sees_future: read later tokens in `parallel`; never where a state is continued.
        param_dtype: type of the taps.
    """

    def __init__(self, kernel_size: int, heads: int, kv_heads: int, *, sees_future: bool, param_dtype: Any) -> None:
        super().__init__(kernel_size, heads, kv_heads, centred=True, param_dtype=param_dtype)
        self.sees_future = sees_future

    def parallel(
        self, values: Float[Array, "B T K E"], layout: Layout, window: Float[Array, "B W_1 K E"] | None = None
    ) -> Float[Array, "B T K R E"]:
        """Filters whole rows, the future included; arguments as in `Convolution.parallel`."""
        if self.sees_future and window is None:
            return self.bidirectional(values, layout)
        return self._past().parallel(values, layout, window)

    def verify(
        self,
        values: Float[Array, "B N K E"],
        depth: Int[Array, "*#B N"],
        ancestors: Bool[Array, "*#B N N"],
        window: Float[Array, "B W_1 K E"],
    ) -> Float[Array, "B N K R E"]:
        """Filters tree nodes, which have a past only; arguments as in `Convolution.verify`."""
        return self._past().verify(values, depth, ancestors, window)

    def _past(self) -> Convolution:
        """The half of the filter that looks back."""
        taps = self.taps[...][:, self.ahead :]
        past = Convolution(2 * self.width - 1, taps.shape[0], self.kv_heads)
        past.taps = nnx.Param(taps)
        return past


class PublishedBoundary(ComposedAttention):
    """Linear attention over groups that forgets the unfinished group for all drafted tokens behind its end."""

    def verify(
        self, qkv: QKV, tree: TreeArrays, state: AugmentedState, bias: RelativeBias | None = None
    ) -> tuple[Float[Array, "B N H E"], Nodes]:
        """Outputs for the nodes of a tree: pairs inside a group, and finished groups; arguments as in the base."""
        assert self.linear is not None
        assert state.memory is not None
        queries, keys, values = self._inputs(qkv)
        nodes = Nodes(keys, values)
        pairs = TreePairs.of(state, nodes, tree)
        direct, _ = self._pairs(queries, pairs.keys, pairs.values, pairs.masks.same_group, None, None)
        outputs = self._combined(self._outputs(direct, self.linear.recall(queries, state.memory)), values)
        if self.convolution is not None and state.window is not None:
            outputs = outputs + self.convolution.verify(values, tree.depth, tree.ancestors, state.window)
        return merge_heads(outputs).astype(values.dtype), nodes


def register() -> None:
    """Adds these attentions to the registry of this process; again, it changes nothing."""
    REGISTRY[UNMASKED] = AttentionEntry(_filtered(sees_future=True), ("causal",))
    REGISTRY[MASKED] = AttentionEntry(_filtered(sees_future=False), ("causal",))
    REGISTRY[PUBLISHED] = AttentionEntry(_published, ("causal",))


def published(attention: str) -> str:
    """Name of FLASH's global attention with the published boundary, and with what a name of ours adds to it."""
    base, *added = attention.split("+")
    assert base == GLOBAL
    return "+".join([PUBLISHED, *added])


def _filtered(*, sees_future: bool) -> Any:
    def build(config: AttentionConfig, name: Name, sizes: Sizes) -> WrappedAttention:
        filtered = UnmaskedConvolution(
            config.kernel_size, sizes.heads, sizes.kv_heads, sees_future=sees_future, param_dtype=sizes.param_dtype
        )
        around = ComposedAttention(
            sizes.kv_heads,
            sizes.head_dim,
            sizes.value_dim,
            group_size=config.group_size,
            convolution=filtered,
            param_dtype=sizes.param_dtype,
        )
        base = REGISTRY[GLOBAL].build(config, Name(GLOBAL, local=True, convolution=False), sizes)
        return WrappedAttention(base, around, initial_alpha=None, param_dtype=sizes.param_dtype)

    return build


def _published(config: AttentionConfig, name: Name, sizes: Sizes) -> PublishedBoundary:
    exact = REGISTRY[GLOBAL].build(config, name._replace(base=GLOBAL), sizes)
    return PublishedBoundary(
        sizes.kv_heads,
        sizes.head_dim,
        sizes.value_dim,
        group_size=config.group_size,
        local=exact.local,
        linear=exact.linear,
        convolution=exact.convolution,
        initial_alpha=config.initial_alpha,
        unit_inputs=exact.unit_inputs,
        implementation=config.implementation,
        param_dtype=sizes.param_dtype,
    )
