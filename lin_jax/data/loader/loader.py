"""Iterator over training batches: prefetched in a thread, with an exact position, and timed."""

import time
from typing import Any

from lin_jax.data.loader.clock import SourceClock
from lin_jax.data.loader.prefetch import Prefetcher
from lin_jax.data.loader.sharding import DataPosition, ShardedRows
from lin_jax.data.types import HostBatch
from lin_jax.errors import UserError


class TrainingBatches:
    """An endless iterator over batches whose position is plain JSON.

    Batches are made in a thread while the last ones are in use; the position is always that of the batches returned,
    never of those read ahead.

    Args:
        rows: makes the batches.
        identity: values by name that a position is valid for, and no others.
        clock: times the sources.
        depth: number of batches that are made ahead, at most.
    """

    def __init__(self, rows: ShardedRows, identity: dict[str, Any], clock: SourceClock, depth: int) -> None:
        self._rows = rows
        self._identity = identity
        self._clock = clock
        self._depth = depth
        self._state = rows.get_state()
        self._ahead: Prefetcher[tuple[HostBatch, dict[str, Any], str]] | None = None
        self._waited = 0.0
        self._waiting_since: float | None = None
        self._slowest = clock.lap()

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> HostBatch:
        """Returns the next batch.

        Raises:
            UserError: a stream is empty or damaged.
        """
        self._waiting_since = time.monotonic()
        try:
            if self._ahead is None:
                self._ahead = Prefetcher(_reader(self._rows, self._clock), self._depth)
            batch, self._state, self._slowest = self._ahead.take()
        finally:
            self._waited = time.monotonic() - self._waiting_since
            self._waiting_since = None
        return batch

    @property
    def waited(self) -> float:
        """Seconds that the last `next` waited for its batch; from another thread during a `next`, seconds so far."""
        since = self._waiting_since
        return self._waited if since is None else time.monotonic() - since

    @property
    def source_name(self) -> str:
        """The source that took longest in the last batch; during a `next`, the source that is being read."""
        current = self._clock.current
        return self._slowest if current is None or self._waiting_since is None else current

    def get_state(self) -> DataPosition:
        """Returns the position after the batches returned so far, fit for `json.dumps`.

        It holds the shards that this process reads; `merged_positions` merges those of all processes.
        """
        return {"identity": dict(self._identity), "shards": dict(self._state)}

    def set_state(self, state: DataPosition) -> None:
        """Resumes exactly at a saved position, also after a round trip through JSON.

        The position may be from a run on any number of processes.

        Raises:
            UserError: the position was saved with another seed, corpus, mixture, tokenizer, sequence length or number
                of shards, or it lacks a shard that is read here.
        """
        saved = state["identity"]
        for name, value in self._identity.items():
            if name not in saved or saved[name] != value:
                raise UserError(
                    f"the saved data position is for {name} {saved.get(name)} and this run has {value}; "
                    f"use the same {name}, or start a new run"
                )
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._rows.set_state(state["shards"])
        self._state = self._rows.get_state()


def _reader(rows: ShardedRows, clock: SourceClock) -> Any:
    """The function of the thread; it must not refer to the iterator, which could then never be freed."""

    def read() -> tuple[HostBatch, dict[str, Any], str]:
        batch = next(rows)
        return batch, rows.get_state(), clock.lap()

    return read
