"""Compiled programs at hand: modules flattened once for many calls, and compilation while decoding goes on."""

import logging
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

log = logging.getLogger(__name__)


class _Structure:
    """Tree structure that compares by identity: equal structures are one object, see `structure_of`."""

    def __init__(self, treedef: Any) -> None:
        self.treedef = treedef

    @cached_property
    def outline(self) -> tuple[Any, ...]:
        """The modules with numbers of arrays in their places."""
        modules: tuple[Any, ...] = jax.tree.unflatten(self.treedef, range(self.treedef.num_leaves))
        return modules


_STRUCTURES: dict[Any, _Structure] = {}


def _structure_of(treedef: Any) -> _Structure:
    return _STRUCTURES.setdefault(treedef, _Structure(treedef))


@jax.tree_util.register_pytree_node_class
class Flat:
    """Modules as a list of arrays: passing them to a compiled program costs a fraction of walking through the modules.

    Args:
        leaves: the arrays.
        structure: what they are parts of.
    """

    def __init__(self, leaves: Any, structure: _Structure) -> None:
        self.leaves = leaves
        self.structure = structure

    @classmethod
    def of(cls, *modules: Any) -> "Flat":
        """Flattens modules; `whole` gives them back, inside a program or outside."""
        leaves, treedef = jax.tree.flatten(modules)
        return cls(tuple(leaves), _structure_of(treedef))

    def whole(self) -> tuple[Any, ...]:
        """The modules."""
        modules: tuple[Any, ...] = jax.tree.unflatten(self.structure.treedef, self.leaves)
        return modules

    def part(self, choose: Callable[..., Any]) -> "Flat":
        """The part of the modules that `choose(*modules)` gives."""
        numbers, treedef = jax.tree.flatten((choose(*self.structure.outline),))
        return Flat(tuple(self.leaves[number] for number in numbers), _structure_of(treedef))

    def tree_flatten(self) -> tuple[tuple[Any], _Structure]:
        """The arrays as one tuple, and the structure."""
        return (self.leaves,), self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: tuple[Any]) -> "Flat":
        """Inverse of `tree_flatten`."""
        return cls(leaves[0], structure)


class ProgramCompiler:
    """Compiles programs one after the other, in a thread while decoding goes on, or at once.

    Python waits for a program that is being compiled before it exits; with a cache on the disk the next call has it.

    Args:
        background: False compiles at once, for measurements and for what must not depend on a clock.
    """

    def __init__(self, *, background: bool = True) -> None:
        self.background = background
        self._ready: set[str] = set()
        self._failed: set[str] = set()
        self._thread: threading.Thread | None = None

    def is_ready(self, key: str) -> bool:
        """True if a program was compiled here."""
        return key in self._ready

    def add(self, key: str) -> None:
        """Notes that a program was compiled."""
        self._ready.add(key)

    def request(self, key: str, compile_program: Callable[[], Any]) -> None:
        """Compiles a program, unless that failed before or another one is being compiled.

        Args:
            key: name of the program.
            compile_program: calls it on arguments of the right shapes.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if busy or key in self._ready or key in self._failed:
            return
        if not self.background:
            jax.block_until_ready(compile_program())
            self.add(key)
            return
        # These settings belong to a thread.
        settings = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]

        def work() -> None:
            try:
                with jax.enable_x64(settings):
                    jax.block_until_ready(compile_program())
                self.add(key)
            except Exception as error:
                # Decoding goes on with what there is.
                self._failed.add(key)
                log.warning("a draft shape cannot be compiled and is left out (%s)", str(error).partition("\n")[0])

        self._thread = threading.Thread(target=work, name="lin_jax compiler", daemon=False)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for a program that is being compiled, at most so long; False if it still is."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()


def shapes_of(tree: Any) -> Any:
    """Shapes, types and devices of a tree's arrays, from which `blank` makes new ones.

    A program is compiled anew for arrays that are bound to devices, as those of a checkpoint are and what is computed
    from them, where it has been compiled for arrays that are not.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None),
        tree,
    )


def blank(shapes: Any) -> Any:
    """Arrays of zeros with the given shapes, types and devices."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
