"""Rows, batches and token sources: the types that the stages of the data pipeline hand on to one another."""

from typing import Protocol

import numpy as np

# One row of a batch by name, such as `tokens` `[T]`.
Row = dict[str, np.ndarray]
# Rows stacked on the host, such as `tokens` `[B, T]`.
HostBatch = dict[str, np.ndarray]


class TokenSource(Protocol):
    """Random access to tokens, `{"tokens": int32 [N]}`: a document, or a piece of a long one, at each index.

    Attributes:
        fingerprint: digest of all texts in their order.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...
