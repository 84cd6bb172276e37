"""Models without one branch of their attention, to see what each branch is worth."""

from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


@runtime_checkable
class AblatableMixer(Protocol):
    """A token mixer that can be had without one of its branches."""

    def ablations(self) -> tuple[str, ...]:
        """Names of the branches, such as window, memory, convolution."""

    def without(self, branch: str) -> Self:
        """The mixer without a branch, over the same parameters."""


def ablations(model: nnx.Module) -> tuple[str, ...]:
    """Names of the branches that some layer's token mixer has, in the order in which they are found."""
    return tuple(dict.fromkeys(name for _, mixer in _mixers(model) for name in mixer.ablations()))


def ablated(model: Model, branch: str) -> Model:
    """A copy of a model, over the same parameters, without one branch in every layer that has it.

    What is left is not trained anew: the figure says what the trained model makes of the branch, and not how good a
    model without it could be.
    """
    copy = nnx.merge(*nnx.split(model))
    for path, mixer in _mixers(copy):
        if branch in mixer.ablations():
            holder: Any = copy
            for part in path[:-1]:
                holder = holder[part] if isinstance(part, int) else getattr(holder, part)
            last = path[-1]
            if isinstance(last, int):
                holder[last] = mixer.without(branch)
            else:
                setattr(holder, str(last), mixer.without(branch))
    return copy


def _mixers(model: nnx.Module) -> list[tuple[tuple[Any, ...], AblatableMixer]]:
    """The outermost mixers that can be ablated, by their paths, whatever holds them."""
    found = {tuple(path): node for path, node in nnx.iter_modules(model) if isinstance(node, AblatableMixer)}
    return [
        (path, node)
        for path, node in sorted(found.items(), key=lambda item: tuple(map(str, item[0])))
        if not any(path[:length] in found for length in range(len(path)))
    ]
