"""A text that was read once, to be gone on from many times, also in another process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from lin_jax.decoding.reading import Reading
from lin_jax.errors import UserError

FORMAT = "lin_jax prefix"


@dataclass(frozen=True)
class Prefix:
    """The state after a text, one row of it.

    Attributes:
        reading: the recurrent states and what else is left of the text.
        length: tokens that were read.
        capacity: longest sequence that a growing state can hold; others can go on for ever.
        identity: what stands for the model that read it.
    """

    reading: Reading
    length: int
    capacity: int
    identity: str

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; it is complete or not there."""
        path = Path(path)
        numbers = {"length": str(self.length), "capacity": str(self.capacity)}
        about = {"format": FORMAT, **numbers, "identity": self.identity}
        partial = path.with_name(f".{path.name}.partial")
        try:
            save_file(_named(self.reading), partial, metadata=about)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error}; give another file") from error

    @classmethod
    def load(cls, path: str | Path, like: Callable[[int], Reading], identity: str) -> "Prefix":
        """Reads a file.

        Args:
            path: the file.
            like: shapes of what it should hold, for a capacity.
            identity: what stands for the model that is to go on from it.

        Raises:
            UserError: there is no such file, or it is from another model or drafter.
        """
        try:
            with safe_open(path, framework="flax") as file:
                about = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read a state from {path}: {error}; save one with --save-state") from None
        if about.get("format") != FORMAT:
            raise UserError(f"{path} holds no state of a text; save one with --save-state")
        capacity = int(about["capacity"])
        expected = _named(like(capacity))
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}
        if about["identity"] != identity or shapes != {n: (a.shape, a.dtype) for n, a in arrays.items()}:
            raise UserError(
                f"the state in {path} is that of another model, drafter or type; read the text again with --save-state"
            )
        leaves = [jnp.asarray(arrays[name]) for name in expected]
        reading = jax.tree.unflatten(jax.tree.structure(like(capacity)), leaves)
        return cls(reading, int(about["length"]), capacity, identity)


def _named(reading: Reading) -> dict[str, Any]:
    """The leaves of a reading by their paths, in order."""
    paths = jax.tree_util.tree_flatten_with_path(reading)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}
