"""Names of tensors as others wrote them: wrappers around a model, and the prefix of its trunk there or not."""

from collections.abc import Mapping
from typing import Any

from lin_jax.errors import UserError

# What torch.compile, DistributedDataParallel, FSDP and checkpointing of activations put into names.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_names(tensors: Mapping[str, Any], wrappers: frozenset[str] = WRAPPERS) -> dict[str, Any]:
    """The tensors under names without wrappers.

    Args:
        tensors: tensors by the names of a file.
        wrappers: parts between dots that are left out.

    Raises:
        UserError: two names are the same without them.
    """
    plain: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        own = ".".join(part for part in name.split(".") if part not in wrappers)
        if own in plain:
            raise UserError(f"{origin[own]} and {name} are one tensor, {own}; keep one of them")
        plain[own], origin[own] = tensor, name
    return plain


def rooted(tensors: Mapping[str, Any], prefix: str, anchor: str, top: tuple[str, ...]) -> dict[str, Any]:
    """The tensors under names whose trunk begins with the prefix, as those of a model with a head do.

    A trunk that was saved alone lacks the prefix; a model inside another has more in front of it.

    Args:
        tensors: tensors by name.
        prefix: of the trunk's names, such as `model.`.
        anchor: name of a tensor of each trunk, without the prefix.
        top: beginnings of names beside the trunk, such as `lm_head.`.
    """
    found = [name for name in tensors if f".{name}".endswith(f".{anchor}")]
    before = found[0].removesuffix(anchor) if len(found) == 1 else prefix
    if before == prefix:
        return dict(tensors)
    outer = before.removesuffix(prefix)

    def own(name: str) -> str:
        inner = name.removeprefix(outer)
        if inner.startswith(top) or not name.startswith(before):
            return inner
        return prefix + name.removeprefix(before)

    return {own(name): tensor for name, tensor in tensors.items()}
