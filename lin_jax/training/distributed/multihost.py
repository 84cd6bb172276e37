"""Several processes of one run that act as one: the first decides, all do the same."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lin_jax.errors import UserError

Decision = TypeVar("Decision")


def is_first() -> bool:
    """True in the process that decides, and writes what is written once."""
    return jax.process_index() == 0


def broadcast_from_first(decide: Callable[[], Decision]) -> Decision:
    """Calls `decide` on the first process, and returns its result on all of them; every process must call this.

    Files on a shared disk do not look the same everywhere at every moment, so that what follows from a look at them
    is for one process to say.

    Args:
        decide: called on the first process alone; what it returns must be what JSON can hold.

    Raises:
        UserError: `decide` raised it, on whichever process.
        RuntimeError: it raised something else, on the others than the first.
    """
    if jax.process_count() == 1:
        return decide()
    failure: Exception | None = None
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": decide()}
        except Exception as error:  # told to all, and raised below
            failure, outcome = error, {"error": str(error), "user": isinstance(error, UserError)}
    outcome = _from_first(outcome)
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise (UserError if outcome["user"] else RuntimeError)(outcome["error"])
    return outcome["value"]


def all_gather_json(value: Any) -> list[Any]:
    """Gathers a JSON value of each process, in the order of their numbers; every process must call this."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(content.size)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: content.size] = content
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, lengths, strict=True)]


def _from_first(value: Any) -> Any:
    """A JSON value of the first process, on all."""
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(content.size, np.int32)))
    if not is_first():
        content = np.zeros(size, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(content), np.uint8)
    return json.loads(received.tobytes().decode())
