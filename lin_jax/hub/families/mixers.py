"""Tensor names of token mixers: published ones where they exist, `mixer.NAME` for the rest.

| in the model | in a checkpoint, behind the attention's own prefix |
| --- | --- |
| factor of the branch beside a local one | `global_factor` (LLaMA), `alpha` (GPT-2, T5) |
| taps of the convolution | `dwconv.weight` (LLaMA, T5), `dconv_ada.weight` (GPT-2) |
| Linformer's projections | `mixer.key_projection`, `mixer.value_projection` `[G, r]` |
| directions of random features and hashes | `mixer.projection` `[M, D]` |

The augmentation around an attention does not change a name: `performer` and `performer+local` both keep
`mixer.projection`.
"""

from flax import nnx

from lin_jax.hub.tensors import Entries, TensorEntry, convolution, stored


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
        elif own[-2:] == ("convolution", "taps"):
            name, entry = taps, convolution(*path, *own[:-1], centred=centred)
        assert f"{prefix}.{name}" not in found, "two of a mixer's variables have one name"
        found[f"{prefix}.{name}"] = entry
    return found
