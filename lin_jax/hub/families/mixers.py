"""Tensor names of token mixers: published ones where they exist, `mixer.NAME` for the rest.

| in the model | in a checkpoint, behind the attention's own prefix |
| --- | --- |
| factor of the branch beside a local one | `global_factor` (LLaMA), `alpha` (GPT-2, T5) |
| taps of the convolution | `dwconv.weight` (LLaMA, T5), `dconv_ada.weight` (GPT-2) |
| Linformer's projections | `mixer.key_projection`, `mixer.value_projection` `[G, r]` |
| directions of random features and hashes | `mixer.projection` `[M, D]` |
| learnt feature maps of each head | `mixer.query_map`, `mixer.query_bias`, `mixer.key_map`, `mixer.key_bias` |
| balance of a window and the memory before it | `windowed.balance` `[K, R]` |
| decay of the memory | `windowed.decay.rate` `[K]`, or `windowed.decay.weight` `[K, E]` and `.bias` `[K]` |

The augmentation around an attention does not change a name: `performer` and `performer+local` both keep
`mixer.projection`.
"""

from collections.abc import Mapping
from dataclasses import replace

from flax import nnx

from lin_jax.hub.tensors import Entries, TensorEntry, convolution, stacked, stored
from lin_jax.models.by_kind import layers_of_kinds
from lin_jax.models.mixed_stack import KIND
from lin_jax.models.params import mixer_order


def layer_entries(
    model: nnx.Module,
    entries: Mapping[str, TensorEntry],
    stack: tuple[str, ...],
    prefix: str,
    attention: str,
    *,
    alpha: str = "global_factor",
    taps: str = "dwconv.weight",
) -> Entries:
    """Entries of all layers of a causal model, their mixers among them, whether these are all alike or not.

    Args:
        model: the model, which may be abstract.
        entries: a family's table of a layer's entries, without a mixer.
        stack: path of the layers' module.
        prefix: of the names of the layers, before their numbers, such as `model.layers`.
        attention: of the names of a layer's attention, such as `self_attn`.
        alpha: as in `mixer_entries`.
        taps: as in `mixer_entries`.
    """
    config = model.config
    layers = (*stack, "layers")
    order = mixer_order(config)
    if order is None:
        own = mixer_entries(model, layers, ("attention", "mixer"), attention, alpha=alpha, taps=taps)
        return stacked(prefix, {**entries, **own}, layers, config.num_layers)
    found = stacked(prefix, entries, layers, config.num_layers)
    for kind, numbers in enumerate(layers_of_kinds(order)):
        own = mixer_entries(model, stack, ("mixer", f"{KIND}{kind}"), attention, alpha=alpha, taps=taps)
        for at, number in enumerate(numbers):
            found |= {
                f"{prefix}.{number}.{name}": replace(entry.inside(*stack), layer=at) for name, entry in own.items()
            }
    return found


def mixer_entries(
    model: nnx.Module,
    stack: tuple[str, ...],
    path: tuple[str, ...],
    prefix: str,
    *,
    alpha: str = "global_factor",
    taps: str = "dwconv.weight",
    centred: bool = False,
) -> Entries:
    """Entries of one layer's token mixer, to be added to a family's table of layer entries.

    Args:
        model: the model, which may be abstract.
        stack: path of the stacked layers.
        path: path of the mixer inside a layer.
        prefix: of the names of the layer's attention, such as `self_attn`.
        alpha: published name of the factor.
        taps: published name of the convolution's kernel.
        centred: whether the convolution sees both sides.
    """
    whole = (*stack, *path)
    found: Entries = {}
    for variable in stored(model):
        if variable[: len(whole)] != whole:
            continue
        own = variable[len(whole) :]
        name, entry = f"mixer.{own[-1]}", TensorEntry((*path, *own))
        if own == ("alpha",):
            name = alpha
        elif own[0] in ("balance", "decay"):
            name = ".".join(("windowed", *map(str, own)))
        elif own[-2:] == ("convolution", "taps"):
            name, entry = taps, convolution(*path, *own[:-1], centred=centred)
        assert f"{prefix}.{name}" not in found, "two of a mixer's variables have one name"
        found[f"{prefix}.{name}"] = entry
    return found
