"""Saved decode state of a common prefix: read once, continued many times, also in another process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from lin_jax.decoding.engine.prefill import DecodeState
from lin_jax.errors import UserError
from lin_jax.files import replacement

FORMAT = "lin_jax prefix"
# Tokens at the end of a text that are kept, on which the text of what follows may depend.
TAIL = 64


@dataclass(frozen=True)
class Prefix:
    """Decode state of one row after a text.

    Attributes:
        decode_state: the state, with a batch of one row.
        length: number of tokens in the text.
        capacity: longest sequence that a growing state can hold; a state of constant size has no limit.
        identity: fingerprint of the parameters of the model that read the text.
        tail: last tokens of the text, `TAIL` at the most; a space between it and what follows is kept by them.
    """

    decode_state: DecodeState
    length: int
    capacity: int
    identity: str
    tail: tuple[int, ...] = ()

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; it is complete or absent.

        Raises:
            UserError: the file cannot be written.
        """
        path = Path(path)
        numbers = {"length": str(self.length), "capacity": str(self.capacity)}
        metadata = {"format": FORMAT, **numbers, "identity": self.identity, "tail": json.dumps(self.tail)}
        try:
            with replacement(path) as partial:
                save_file(_named(self.decode_state), partial, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {path}: {error}; give another file") from error

    @classmethod
    def load(cls, path: str | Path, like: Callable[[int], DecodeState], identity: str) -> "Prefix":
        """Reads a file that `save` wrote.

        Args:
            path: the file.
            like: gives the expected shapes and dtypes for a capacity.
            identity: fingerprint of the parameters of the model that will continue the text.

        Raises:
            UserError: there is no such file, or it is from another model or drafter.
        """
        try:
            with safe_open(path, framework="flax") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read a state from {path}: {error}; save one with --save-state") from None
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a saved decode state; save one with --save-state")
        capacity = int(metadata["capacity"])
        expected = _named(like(capacity))
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}
        if metadata["identity"] != identity or shapes != {n: (a.shape, a.dtype) for n, a in arrays.items()}:
            raise UserError(
                f"the state in {path} belongs to another model, drafter or dtype; save it anew with --save-state"
            )
        leaves = [jnp.asarray(arrays[name]) for name in expected]
        decode_state = jax.tree.unflatten(jax.tree.structure(like(capacity)), leaves)
        # Files of earlier versions have no tail.
        tail = tuple(json.loads(metadata.get("tail", "[]")))
        return cls(decode_state, int(metadata["length"]), capacity, identity, tail)


def _named(decode_state: DecodeState) -> dict[str, Any]:
    """Leaves of a decode state by their attribute paths, in order; a saved file names its tensors so."""
    paths = jax.tree_util.tree_flatten_with_path(decode_state)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}
