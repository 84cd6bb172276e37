"""Global batches from shards; batches and positions do not depend on the number of processes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lin_jax.data.types import HostBatch
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from grain import DatasetIterator

# `{"identity": values that the position is valid for, "shards": the position of each shard, by its number as text}`.
DataPosition = dict[str, Any]


class ShardedRows:
    """Endless global batches, or some of their rows; shard n gives rows n R to (n+1) R of every batch.

    Args:
        shards: iterators over rows, by number of the shard: those that the wanted rows come from.
        rows_per_shard: rows R of a batch that each gives.
        rows: the rows of the batch that are wanted, from and to before.
    """

    def __init__(self, shards: Mapping[int, "DatasetIterator"], rows_per_shard: int, rows: tuple[int, int]) -> None:
        self._shards = shards
        self._rows_per_shard = rows_per_shard
        first = min(shards) * rows_per_shard
        self._wanted = slice(rows[0] - first, rows[1] - first)

    def __next__(self) -> HostBatch:
        """Returns the wanted rows of the next batch; all of a shard are read, so that every process moves it alike."""
        rows = [next(shard) for shard in self._shards.values() for _ in range(self._rows_per_shard)]
        wanted = rows[self._wanted]
        return {name: np.stack([row[name] for row in wanted]) for name in wanted[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the position of each open shard, by its number as text."""
        return {str(number): shard.get_state() for number, shard in self._shards.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes at a position that holds at least the shards that are open here.

        Raises:
            UserError: the position lacks one of them.
        """
        missing = [number for number in self._shards if str(number) not in state]
        if missing:
            raise UserError(
                f"the saved data position lacks shard {missing[0]}; save the merged positions of all processes"
            )
        for number, shard in self._shards.items():
            shard.set_state(_with_tuples(state[str(number)]))


def shards_of(rows: tuple[int, int], rows_per_shard: int) -> range:
    """The shards that rows of a global batch come from."""
    return range(rows[0] // rows_per_shard, -(-rows[1] // rows_per_shard))


def merged_positions(positions: Sequence[DataPosition]) -> DataPosition:
    """Merges the positions of several processes after the same step into one for any number of processes.

    Processes whose rows overlap hold the same shards; together they must hold all.

    Args:
        positions: results of `TrainingBatches.get_state` in each process, in any order.

    Raises:
        UserError: the positions are not of one run and one step, or a shard is missing.
    """
    identity: dict[str, Any] = positions[0]["identity"]
    shards: dict[str, Any] = {}
    for position in positions:
        if position["identity"] != identity:
            raise UserError(
                f"data positions of different runs cannot be merged ({identity} and {position['identity']}); "
                "give every process the same configuration and the same data"
            )
        for number, state in position["shards"].items():
            # Tuples and lists are the same to JSON.
            if _with_tuples(shards.setdefault(number, state)) != _with_tuples(state):
                raise UserError(f"processes are at different positions in data shard {number}; save at the same step")
    missing = set(range(identity["shards"])) - {int(number) for number in shards}
    if missing:
        raise UserError(f"no process holds data shard {min(missing)}; let their rows cover the whole batch")
    return {"identity": dict(identity), "shards": {number: shards[number] for number in sorted(shards, key=int)}}


def _with_tuples(state: Any) -> Any:
    """Undoes what JSON does to grain's packing state: read as a list, an empty slice passes for a remainder.

    Without this a position saved where a row ends with its document would lose the next document.
    """
    if isinstance(state, list):
        return [_with_tuples(each) for each in state]
    if not isinstance(state, dict):
        return state
    return {
        name: {key: tuple(part) for key, part in value.items()} if name == "remainder_slices" else _with_tuples(value)
        for name, value in state.items()
    }
