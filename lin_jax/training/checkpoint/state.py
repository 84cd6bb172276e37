"""A training state as the parts of a checkpoint, and back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array

from lin_jax.models.params import put_like
from lin_jax.training.checkpoint.files import read_arrays, read_json
from lin_jax.training.distributed.multihost import broadcast_from_first
from lin_jax.training.monitoring.spike_detection import LossHistory
from lin_jax.training.train_step import TrainState


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint: the state of a run, and the position in its data."""

    state: TrainState
    data: dict[str, Any]
    step: int


def parts_of(state: TrainState, data: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """Builds the arguments that Orbax writes; arrays may be spread over many devices and processes."""
    return ocp.args.Composite(
        model=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(state.optimizer),
        key=ocp.args.JsonSave(_key_to_json(state.key)),
        watch=ocp.args.JsonSave(state.history.to_json()),
        data=ocp.args.JsonSave(data),
        about=ocp.args.JsonSave(metadata),
    )


def read_state(folder: Path, step: int, like: TrainState) -> Restored:
    """The state in a checkpoint of a step, each array placed as the one in its place in `like`."""
    key, watch, data = broadcast_from_first(lambda: [read_json(folder / name) for name in ("key", "watch", "data")])
    state = TrainState(
        params=read_arrays(folder / "model", like.params),
        optimizer=read_arrays(folder / "optimizer", like.optimizer),
        step=_placed_as(like.step, lambda: jnp.asarray(step, jnp.int32)),
        key=_placed_as(like.key, lambda: _key_from_json(key)),
        history=put_like(LossHistory.from_json(watch, like.history.losses.shape[0]), like.history),
    )
    return Restored(state, data, step)


def _placed_as(like: Any, make: Callable[[], Array]) -> Array:
    """A value that every process can make, in the place of another one, if that has a place."""
    sharding = getattr(like, "sharding", None)
    # Compiled, because a random key cannot be put onto the devices of another process.
    return make() if sharding is None else jax.jit(make, out_shardings=sharding)()


# Not Orbax's own form of a random key: it logs a false alarm ("Skipping merge") at every save.
def _key_to_json(key: Array) -> dict[str, Any]:
    return {"implementation": str(jax.random.key_impl(key)), "data": jax.random.key_data(key).tolist()}


def _key_from_json(saved: dict[str, Any]) -> Array:
    return jax.random.wrap_key_data(jnp.asarray(saved["data"], jnp.uint32), impl=saved["implementation"])
