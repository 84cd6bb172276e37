"""What the processes of one run tell each other, beside arrays."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this is the process that writes files and talks to people."""
    return jax.process_index() == 0


def everyones(value: Any) -> list[Any]:
    """What each process has, as JSON has it, in the order of their numbers; a collective, unless there is only one."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(content.size)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: content.size] = content
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, lengths, strict=True)]


def wait_for_all(reason: str) -> None:
    """Returns when every process has come this far; the reason is the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(reason)
