"""Token mixers by name: an attention, and the augmentation behind it, as in `performer+local+convolution`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lin_jax.attention.augmentation import WrappedAttention
from lin_jax.attention.composition import ComposedAttention
from lin_jax.attention.config import AttentionConfig, Conventions
from lin_jax.attention.convolution import Convolution
from lin_jax.attention.decay import ConstantDecay, Decay, TokenDecay
from lin_jax.attention.feature_maps import (
    Clustered,
    EluPlusOne,
    Exponential,
    FeatureMap,
    HashCollisions,
    Hedgehog,
    Identity,
    LearntFeatures,
    PositiveRandomFeatures,
    RandomFourierFeatures,
    Relu,
)
from lin_jax.attention.full import FullAttention
from lin_jax.attention.linear import LinearBranch
from lin_jax.attention.linformer import LinformerAttention
from lin_jax.attention.local import LOCAL_SCORES, LocalBranch
from lin_jax.attention.protocols import Form, Turn
from lin_jax.attention.sliding import SlidingSoftmax
from lin_jax.attention.transnormer import TransNormerAttention
from lin_jax.attention.windowed_attention import WindowedAttention
from lin_jax.attention.windowed_kernels import has_window_kernels
from lin_jax.attention.yoso import YosoAttention
from lin_jax.errors import UserError
from pallas_kernels.windows.window import AttentionWindow

ALIASES = {"augmented": "flash_global+local+convolution"}
AUGMENTATIONS = ("local", "convolution", "window")
ANY_SIDE: tuple[Form, ...] = ("causal", "bidirectional")
ANY: tuple[Form, ...] = ("causal", "bidirectional", "cross")


class Name(NamedTuple):
    """A parsed attention name: the base, and the augmentation that is added to it."""

    base: str
    local: bool
    convolution: bool
    window: bool = False


def parse_name(name: str) -> Name:
    """Parses an attention's name.

    Raises:
        UserError: the base or an addition is unknown, or the base has a local branch of its own already.
    """
    base, *added = ALIASES.get(name, name).split("+")
    if base not in REGISTRY:
        known = ", ".join([*ALIASES, *REGISTRY])
        raise UserError(
            f"attention.name '{name}' is unknown; choose one of {known}, with +local, +convolution or +window behind it"
        )
    if unknown := [part for part in added if part not in AUGMENTATIONS]:
        raise UserError(f"attention.name '{name}': '+{unknown[0]}' is unknown; add +local, +convolution or +window")
    if "local" in added and REGISTRY[base].has_local:
        raise UserError(f"attention.name '{name}': {base} has a local branch already; leave +local away")
    if "window" in added and not REGISTRY[base].positive:
        able = ", ".join(other for other, entry in REGISTRY.items() if entry.positive)
        raise UserError(f"attention.name '{name}': +window needs positive features; choose one of {able}")
    if {"local", "window"} <= set(added):
        raise UserError(f"attention.name '{name}': a window takes the place of the local branch; leave +local away")
    return Name(base, "local" in added, "convolution" in added, "window" in added)


@dataclass(frozen=True)
class Sizes:
    """Form, heads and sizes that a mixer is built for.

    Attributes:
        form: causal, bidirectional or cross.
        heads: query heads H.
        kv_heads: key/value heads K.
        head_dim: size D of queries and keys as the mixer gets them.
        value_dim: size E of values.
        conventions: the model's.
        layer: number of the layer.
        param_dtype: type of the parameters.
        rngs: random keys.
        turn: the model's rotary positions, where the mixer gets queries and keys that are not turned; else None.
    """

    form: Form
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    conventions: Conventions
    layer: int | Array
    param_dtype: Any
    rngs: nnx.Rngs
    turn: Turn | None = None


Builder = Callable[[AttentionConfig, Name, Sizes], Any]


class AttentionEntry(NamedTuple):
    """An attention of the registry.

    Attributes:
        build: makes it.
        forms: that it has.
        has_local: whether it has a local branch of its own.
        growing: whether its state grows with the text.
        positive: whether it is a positive feature map, which can share a normaliser with a window.
        additive: whether it has a memory of sums, which can decay.
    """

    build: Builder
    forms: tuple[Form, ...]
    has_local: bool = False
    growing: bool = False
    positive: bool = False
    additive: bool = False


def _local(config: AttentionConfig, sizes: Sizes, *, unit: bool) -> LocalBranch:
    if config.local_score not in LOCAL_SCORES:
        raise UserError(
            f"attention.local_score '{config.local_score}' is unknown; choose one of {', '.join(LOCAL_SCORES)}"
        )
    conventions = sizes.conventions
    return LocalBranch(
        LOCAL_SCORES[config.local_score],
        unit=unit,
        scale=1 / config.group_size if conventions.inverse_group else 1.0,
        bias=conventions.bias,
        size=sizes.head_dim // 2 if conventions.separate else None,
    )


def _convolution(config: AttentionConfig, name: Name, sizes: Sizes) -> Convolution | None:
    if not name.convolution or sizes.form == "cross":
        return None
    return Convolution(
        config.kernel_size,
        sizes.heads,
        sizes.kv_heads,
        centred=sizes.form == "bidirectional" and sizes.conventions.centred,
        read_padding=config.convolve_padding,
        param_dtype=sizes.param_dtype,
    )


def _composed(config: AttentionConfig, sizes: Sizes, **parts: Any) -> ComposedAttention:
    return ComposedAttention(
        sizes.kv_heads,
        sizes.head_dim,
        sizes.value_dim,
        group_size=config.group_size,
        implementation=config.implementation,
        param_dtype=sizes.param_dtype,
        **parts,
    )


def _flash(*, local: bool, grouped: bool, angular: bool = False) -> Builder:
    """A builder of FLASH's branches over unit queries and keys."""

    def build(config: AttentionConfig, name: Name, sizes: Sizes) -> ComposedAttention:
        if config.decay != "none":
            return _decayed_flash(config, name, sizes, local=local or name.local)
        conventions = sizes.conventions
        bidirectional = sizes.form == "bidirectional"
        start = sizes.head_dim // 2 if conventions.separate else 0
        mean: Any = None
        if conventions.inverse_group and bidirectional:
            mean = "row" if conventions.length == "row" else "present"
        linear = LinearBranch(
            Identity(sizes.head_dim - start, start),
            reach="earlier",
            scale=1 / config.group_size if conventions.inverse_group and mean is None else 1.0,
        )
        factored = conventions.factor and (name.local or angular)
        return _composed(
            config,
            sizes,
            local=_local(config, sizes, unit=False) if local or name.local else None,
            linear=linear if grouped else None,
            convolution=_convolution(config, name, sizes),
            initial_alpha=config.initial_alpha if factored else None,
            unit_inputs=conventions.unit,
            unit_values=conventions.unit_values,
            angular=angular,
            merged_norm=conventions.merged_norm,
            mean=mean,
        )

    return build


def kernel_attention(features: Callable[[AttentionConfig, Sizes], FeatureMap], finish: str = "divided") -> Builder:
    """A builder of linear attention over all keys, by a feature map, with whatever a name adds to it.

    Args:
        features: makes the feature map, for a configuration and the sizes of a layer.
        finish: what becomes of the sums, a name of `linear.FINISHES`; `divided` is by the sum of the weights.
    """

    def build(config: AttentionConfig, name: Name, sizes: Sizes) -> Any:
        linear = LinearBranch(features(config, sizes), reach="all", finish=finish)
        # A source has no window: all of it is in the memory.
        if (name.window and sizes.form != "cross") or config.decay != "none":
            return _windowed_kernel(config, name, sizes, linear)
        return _composed(
            config,
            sizes,
            local=_local(config, sizes, unit=True) if name.local else None,
            linear=linear,
            convolution=_convolution(config, name, sizes),
            initial_alpha=config.initial_alpha if name.local else None,
        )

    return build


def _windowed_kernel(config: AttentionConfig, name: Name, sizes: Sizes, linear: LinearBranch) -> WindowedAttention:
    """Linear attention by a feature map with a window, with decay, or with both."""
    window = AttentionWindow(0)
    if name.window:
        window = AttentionWindow(config.window, config.group_size, config.window_groups, config.sinks)
    elif name.local:
        window = AttentionWindow(None, config.group_size, groups=0)
    return _windowed(
        config,
        name,
        sizes,
        window=window,
        linear=linear,
        softmax=name.window,
        near=_local(config, sizes, unit=True) if name.local else None,
        initial_alpha=config.initial_alpha if name.local else None,
    )


def _decayed_flash(config: AttentionConfig, name: Name, sizes: Sizes, *, local: bool) -> WindowedAttention:
    """FLASH's branches with a memory that decays, as LLaMA and GPT-2 have them."""
    conventions = sizes.conventions
    if conventions.separate or conventions.inverse_group or conventions.unit_values or conventions.merged_norm:
        raise UserError(f"attention.decay of '{config.name}' is for LLaMA and GPT-2; set it to 'none'")
    return _windowed(
        config,
        name,
        sizes,
        window=AttentionWindow(None, config.group_size, groups=0),
        linear=LinearBranch(Identity(sizes.head_dim), reach="earlier"),
        near=_local(config, sizes, unit=False) if local else None,
        initial_alpha=config.initial_alpha if name.local else None,
        unit_inputs=conventions.unit,
    )


def _windowed(
    config: AttentionConfig, name: Name, sizes: Sizes, *, linear: LinearBranch, **parts: Any
) -> WindowedAttention:
    if config.implementation not in (None, "xla") and (what := _without_kernels(config, name, sizes, linear)):
        raise UserError(
            f"attention.implementation is '{config.implementation}', and no kernel computes {what}; "
            "leave it out, or give 'xla' there"
        )
    decay: Decay | None = None
    if config.decay == "constant":
        decay = ConstantDecay(sizes.kv_heads, param_dtype=sizes.param_dtype)
    elif config.decay == "token":
        decay = TokenDecay(sizes.kv_heads, sizes.value_dim, param_dtype=sizes.param_dtype)
    return WindowedAttention(
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.value_dim,
        scale=_softmax_scale(sizes),
        decay=decay,
        convolution=_convolution(config, name, sizes),
        implementation=config.implementation,
        turn=sizes.turn,
        linear=linear,
        param_dtype=sizes.param_dtype,
        **parts,
    )


def _without_kernels(config: AttentionConfig, name: Name, sizes: Sizes, linear: LinearBranch) -> str | None:
    """Words for the part of a window or a decay that kernels do not know on any platform; None where they know all."""
    if sizes.turn is not None:
        return "a memory of keys as they were before rotary positions (attention.rotary_memory is false)"
    if not name.window:
        return f"attention.decay '{config.decay}' of '{config.name}', which has no +window"
    if not has_window_kernels(linear.features):
        return f"a window before the features of '{config.name}'"
    if sizes.form != "causal":
        return f"a window in {sizes.form} attention"
    if sizes.conventions.relative:
        return "a window where the model adds a relative bias to scores"
    return None


def _softmax_scale(sizes: Sizes) -> float:
    return 1.0 if sizes.conventions.softmax_scale == "one" else sizes.head_dim**-0.5


def _wrapped(build_base: Callable[[AttentionConfig, Sizes], Any]) -> Builder:
    """A builder of any other attention, with the augmentation around it if the name has one."""

    def build(config: AttentionConfig, name: Name, sizes: Sizes) -> Any:
        base = build_base(config, sizes)
        convolution = _convolution(config, name, sizes)
        if not name.local and convolution is None:
            return base
        around = _composed(
            config,
            sizes,
            local=_local(config, sizes, unit=True) if name.local else None,
            convolution=convolution,
        )
        alpha = config.initial_alpha if name.local else None
        return WrappedAttention(base, around, initial_alpha=alpha, param_dtype=sizes.param_dtype)

    return build


def _softmax(config: AttentionConfig, sizes: Sizes) -> FullAttention | SlidingSoftmax:
    if config.window is None:
        return _full(config, sizes, "softmax")
    scale = sizes.conventions.softmax_scale
    if sizes.form != "causal" or scale == "length":
        kind = f"{sizes.form} softmax" if sizes.form != "causal" else "softmax that is scaled by the length"
        raise UserError(f"attention.window {config.window} is given for {kind}, which has none; leave it away")
    return SlidingSoftmax(
        sizes.kv_heads,
        sizes.head_dim,
        sizes.value_dim,
        window=config.window,
        sinks=config.sinks,
        scale=sizes.head_dim**-0.5 if scale == "root" else 1.0,
        implementation=config.implementation,
    )


def _full(config: AttentionConfig, sizes: Sizes, weights: Any) -> FullAttention:
    return FullAttention(
        sizes.kv_heads,
        sizes.head_dim,
        sizes.value_dim,
        weights=weights,
        conventions=sizes.conventions,
        implementation=config.implementation,
    )


def _linformer(config: AttentionConfig, sizes: Sizes) -> LinformerAttention:
    if config.rank > config.group_size:
        raise UserError(
            f"attention.rank {config.rank} is more than attention.group_size {config.group_size}; give fewer summaries"
        )
    return LinformerAttention(
        sizes.kv_heads,
        sizes.head_dim,
        sizes.value_dim,
        group_size=config.group_size,
        rank=config.rank,
        param_dtype=sizes.param_dtype,
    )


def _transnormer(config: AttentionConfig, sizes: Sizes) -> TransNormerAttention:
    features = EluPlusOne(sizes.head_dim)
    return TransNormerAttention(
        _composed(config, sizes, local=LocalBranch(None, scale=sizes.head_dim**-0.5, bias="scores")),
        _composed(config, sizes, linear=LinearBranch(features, reach="all", finish="root_mean_square")),
        layer=sizes.layer,
        diagonal_layers=config.diagonal_layers,
    )


def _yoso(config: AttentionConfig, sizes: Sizes) -> YosoAttention:
    features = HashCollisions(sizes.head_dim, config.hashes, config.hash_bits, rngs=sizes.rngs)
    linear = LinearBranch(features, reach="all", finish="unit")
    return YosoAttention(_composed(config, sizes, linear=linear), config.hash_bits)


def _random_features(config: AttentionConfig, sizes: Sizes) -> int:
    return config.features or 2 * sizes.head_dim


def _hedgehog(config: AttentionConfig, sizes: Sizes) -> FeatureMap:
    return Hedgehog(sizes.head_dim, sizes.heads, sizes.kv_heads, param_dtype=sizes.param_dtype)


def _exponential(config: AttentionConfig, sizes: Sizes) -> FeatureMap:
    return _learnt(Exponential, config, sizes)


def _clustered(config: AttentionConfig, sizes: Sizes) -> FeatureMap:
    return _learnt(Clustered, config, sizes)


def _learnt(kind: type[LearntFeatures], config: AttentionConfig, sizes: Sizes) -> FeatureMap:
    return kind(
        sizes.head_dim,
        _random_features(config, sizes),
        sizes.heads,
        sizes.kv_heads,
        scale=_softmax_scale(sizes),
        param_dtype=sizes.param_dtype,
        rngs=sizes.rngs,
    )


REGISTRY: dict[str, AttentionEntry] = {
    "softmax": AttentionEntry(_wrapped(_softmax), ANY, growing=True),
    "flash_local": AttentionEntry(_flash(local=True, grouped=False), ANY, has_local=True),
    "flash_global": AttentionEntry(_flash(local=False, grouped=True), ANY, additive=True),
    "flash": AttentionEntry(_flash(local=True, grouped=True), ANY, has_local=True, additive=True),
    "linformer": AttentionEntry(_wrapped(_linformer), ANY_SIDE, growing=True),
    "performer": AttentionEntry(
        kernel_attention(
            lambda config, sizes: PositiveRandomFeatures(
                sizes.head_dim, _random_features(config, sizes), rngs=sizes.rngs
            ),
            "divided",
        ),
        ANY,
        positive=True,
        additive=True,
    ),
    "transnormer": AttentionEntry(_wrapped(_transnormer), ANY_SIDE),
    "yoso": AttentionEntry(_wrapped(_yoso), ANY_SIDE),
    "relu": AttentionEntry(
        kernel_attention(lambda config, sizes: Relu(sizes.head_dim), "divided"), ANY, positive=True, additive=True
    ),
    "elu": AttentionEntry(
        kernel_attention(lambda config, sizes: EluPlusOne(sizes.head_dim), "divided"), ANY, positive=True, additive=True
    ),
    "hedgehog": AttentionEntry(kernel_attention(_hedgehog, "divided"), ANY, positive=True, additive=True),
    "exponential": AttentionEntry(kernel_attention(_exponential, "divided"), ANY, positive=True, additive=True),
    "clustered": AttentionEntry(kernel_attention(_clustered, "divided"), ANY, positive=True, additive=True),
    "rfa": AttentionEntry(
        kernel_attention(
            lambda config, sizes: RandomFourierFeatures(
                sizes.head_dim, _random_features(config, sizes), rngs=sizes.rngs
            ),
            "divided_above_floor",
        ),
        ANY,
        additive=True,
    ),
    "linear_angular": AttentionEntry(_flash(local=True, grouped=True, angular=True), ANY_SIDE, has_local=True),
    "square": AttentionEntry(_wrapped(lambda config, sizes: _full(config, sizes, "square")), ANY_SIDE, growing=True),
}

_BUILT_IN = frozenset(REGISTRY)


def register(name: str, entry: AttentionEntry) -> None:
    """Adds an attention of one's own under a name, which models then take like any other.

    It lasts as long as the process. The same name may be registered again, as a notebook's cell does that is run twice;
    models that were made before keep what they have.

    Args:
        name: a name without `+`, which is not one of this package.
        entry: the attention; `kernel_attention` makes the builder of one by a feature map.

    Raises:
        UserError: the name is not free, or is none.
    """
    if not name.isidentifier():
        raise UserError(f"attention name '{name}' is no word; give letters, digits and underscores")
    if name in _BUILT_IN or name in ALIASES:
        raise UserError(f"attention name '{name}' is taken; give another")
    if not entry.forms:
        raise UserError(f"attention '{name}' has no form; give causal, bidirectional or cross")
    REGISTRY[name] = entry


def register_feature_map(
    name: str, build: Callable[[AttentionConfig, Sizes], FeatureMap], *, positive: bool, finish: str = "divided"
) -> None:
    """Adds linear attention by a feature map of one's own, for this process.

    Args:
        name: of the attention, to which augmentations are added like to any other.
        build: makes the feature map.
        positive: True if features are never negative, so that a window may share a normaliser with them.
        finish: what becomes of the sums: divided (by the sum of scores) or divided_above_floor (which counts 0.01
            at the least).

    Raises:
        UserError: the name has other characters than letters, digits and underscores, or is one of the package's own.
    """
    register(name, AttentionEntry(kernel_attention(build, finish), ANY, positive=positive, additive=True))


def build_mixer(
    config: str | AttentionConfig,
    *,
    form: Form = "causal",
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    conventions: Conventions | None = None,
    layer: int | Array = 0,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
    turn: Turn | None = None,
) -> Any:
    """The token mixer that a configuration names: a `TokenMixer`, `BidirectionalMixer` or `CrossMixer` by its form.

    Args:
        config: its name and sizes, or its name alone.
        form: causal, bidirectional or cross.
        heads: query heads H.
        kv_heads: key/value heads K.
        head_dim: size D of queries and keys as the mixer gets them.
        value_dim: size E of values; None means D.
        conventions: the model's; None is those of LLaMA and GPT-2.
        layer: number of the layer, from 0.
        param_dtype: type of the parameters.
        rngs: random keys.
        turn: rotary positions of a model that has them, for mixers that turn queries and keys themselves.

    Raises:
        UserError: no attention or score function has the configured name, or it does not have this form.
    """
    config = AttentionConfig.of(config)
    if config.pattern is not None or config.layers is not None:
        raise UserError(
            f"attention {config.label} is not one for all layers, as this model needs; give one, or a LLaMA or GPT-2"
        )
    name = parse_name(config.name)
    entry = REGISTRY[name.base]
    if form not in entry.forms:
        able = ", ".join(other for other, entry in REGISTRY.items() if form in entry.forms)
        raise UserError(f"attention.name '{config.name}' has no {form} form; choose one of {able}")
    if config.decay != "none" and not entry.additive:
        able = ", ".join(other for other, entry in REGISTRY.items() if entry.additive)
        raise UserError(
            f"attention.decay is '{config.decay}', and {name.base} has no memory that decays; choose one of {able}"
        )
    if config.decay != "none" and form != "causal":
        raise UserError(
            f"attention.decay is '{config.decay}', and {form} attention has no direction to decay in; "
            "set it to 'none' there"
        )
    if config.window is not None and not (name.window or name.base == "softmax"):
        raise UserError(f"attention.window is {config.window}, and '{config.name}' has none; add +window to its name")
    if config.sinks and not (name.window or softmax_window(config) is not None):
        raise UserError(
            f"attention.sinks is {config.sinks}, and '{config.name}' has no window that they would stay beside; "
            "add +window to its name, or give softmax a window"
        )
    own_turn = _turn(config, name, turn)
    value_dim = head_dim if value_dim is None else value_dim
    conventions = conventions or Conventions()
    sizes = Sizes(form, heads, kv_heads, head_dim, value_dim, conventions, layer, param_dtype, rngs, own_turn)
    return entry.build(config, name, sizes)


def _turn(config: AttentionConfig, name: Name, turn: Turn | None) -> Turn | None:
    """Rotary positions for a window whose memory is to read what they have not turned; None where all is turned."""
    if config.rotary_memory or name.base == "softmax":
        return None
    if not name.window:
        raise UserError(
            f"attention.rotary_memory is false, and '{config.name}' has no memory beside a window; "
            "add +window to its name, or give true"
        )
    if turn is None:
        raise UserError("attention.rotary_memory is false, and this model has no rotary positions; leave it out")
    return turn


def max_draft_depth(config: AttentionConfig) -> int | None:
    """Largest depth of a draft tree below its root: less than a group; None for attention that knows no groups.

    Of a mix, that of the layers with the smallest groups.
    """
    groups = [each.group_size for each in config.kinds if _has_groups(each)]
    return min(groups) - 1 if groups else None


def _has_groups(config: AttentionConfig) -> bool:
    name = parse_name(config.name)
    if name.window or config.decay != "none":
        return False
    return name.local or name.base not in ("softmax", "square")


def has_growing_state(config: AttentionConfig) -> bool:
    """True where the state grows with the text, so that it needs the text's largest length: of a layer, or of all."""
    return any(REGISTRY[parse_name(each.name).base].growing and softmax_window(each) is None for each in config.kinds)


def softmax_window(config: AttentionConfig) -> int | None:
    """Tokens that softmax over the last of them sees; None for softmax over all, and for any other attention."""
    return config.window if parse_name(config.name).base == "softmax" else None
