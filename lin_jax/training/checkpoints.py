"""Checkpoints of a run: written by Orbax in the background, and read back exactly or not at all.

A checkpoint holds, under `OUTPUT/checkpoints/STEP/`, the parameters that learn (`model`), the optimiser (`optimizer`),
and as JSON the random key (`key`), what is remembered of earlier steps (`watch`), the position in the data (`data`),
and what it is a checkpoint of (`about`).
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array
from orbax.checkpoint.checkpoint_managers import LatestN

from lin_jax.errors import UserError
from lin_jax.training.parameters import Params, differences, listed, placed, put_like, shapes
from lin_jax.training.step import TrainState
from lin_jax.training.watch import Watch

CHECKPOINT_FOLDER = "checkpoints"
UNREADABLE_FOLDER = "unreadable"

# Options of the model that change how it is computed, not what.
_HARMLESS = ("remat", "unroll")

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class About:
    """What a checkpoint is of.

    Attributes:
        objective: name of the objective.
        model: the model's configuration, as JSON has it.
        tokenizer: fingerprint of the tokenizer.
        parameters: type and shape of each saved parameter, by path.
        base: for heads, the run they stand on: `run` (path from this run's folder), `step` and `fingerprint`.
    """

    objective: str
    model: dict[str, Any]
    tokenizer: str
    parameters: dict[str, str]
    base: dict[str, Any] | None = None

    def demand_equal(self, saved: "About", where: Path) -> None:
        """Raises a `UserError` that lists what differs, if `saved` is of another model than this one."""
        phrases = differences({"objective": saved.objective}, {"objective": self.objective})
        phrases += differences(_flat(saved.model), _flat(self.model))
        phrases += differences(saved.parameters, self.parameters)
        phrases += differences({"tokenizer": saved.tokenizer}, {"tokenizer": self.tokenizer})
        phrases += differences({"base model": _fingerprint(saved)}, {"base model": _fingerprint(self)})
        if phrases:
            raise UserError(
                f"{where} is a checkpoint of another model: {listed(phrases)}; "
                "use the options it was made with, or another output folder"
            )


def _fingerprint(about: About) -> str | None:
    return None if about.base is None else about.base["fingerprint"]


def _flat(model: dict[str, Any], prefix: str = "model") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in model.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}.{name}")
        elif name not in _HARMLESS:
            flat[f"{prefix}.{name}"] = value
    return flat


@dataclass(frozen=True)
class Restored:
    """What a run goes on from: its state, and where its data stood."""

    state: TrainState
    data: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints of a run folder, for the run that writes them. A context manager: leaving waits for the disk.

    Args:
        folder: the run's folder.
        keep: newest checkpoints to keep; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder = checkpoint_folder(folder)
        options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self.latest: int | None = self._manager.latest_step()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState, data: dict[str, Any], about: About) -> None:
        """Begins to save; the state may be given away at once. Does nothing if this step is saved already.

        Raises:
            UserError: this, or the save before, could not be written.
        """
        if step == self.latest:
            return
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            key=ocp.args.JsonSave(_key_to_json(state.key)),
            watch=ocp.args.JsonSave(state.watch.to_json()),
            data=ocp.args.JsonSave(data),
            about=ocp.args.JsonSave({**vars(about), "step": step}),
        )
        try:
            self._manager.save(step, args=items)
        except OSError as error:
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {error}; the last good one is {self.last_good()}"
            ) from error
        self.latest = step

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._manager.wait_until_finished()

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def last_good(self) -> str:
        """Names the newest complete checkpoint, or says that there is none."""
        steps = saved_steps(self.folder.parent)
        return str(self.path(steps[-1])) if steps else "none"

    def restore_latest(self, like: TrainState, about: About) -> Restored:
        """The newest checkpoint that can be read.

        Those that cannot are named in a warning and moved to `OUTPUT/unreadable`, to make room for their steps.

        Args:
            like: a state of the same structure; its arrays (or shapes) say where restored ones are placed.
            about: what the checkpoint must be of.

        Raises:
            UserError: there is none, none can be read, or it is of another model.
        """
        run = self.folder.parent
        if not saved_steps(run):
            raise UserError(f"there is no checkpoint in {run} to resume from; leave --resume out to start the run")
        return self._restore(None, like, about)

    def restore_before(self, step: int, like: TrainState, about: About) -> Restored:
        """The newest checkpoint of a step before the given one that can be read, as `restore_latest` does it."""
        return self._restore(step, like, about)

    def _restore(self, before: int | None, like: TrainState, about: About) -> Restored:
        run = self.folder.parent

        def read(step: int) -> Restored:
            about.demand_equal(read_about(run, step), self.path(step))
            return _restore_state(self.path(step), step, like)

        restored, broken = newest_readable(run, read, before)
        for step in broken:
            (run / UNREADABLE_FOLDER).mkdir(exist_ok=True)
            os.replace(self.path(step), _free(run / UNREADABLE_FOLDER / str(step)))
        if broken:
            self._manager.reload()
        self.latest = restored.step
        return restored


def _restore_state(folder: Path, step: int, like: TrainState) -> Restored:
    state = TrainState(
        params=_read_arrays(folder / "model", like.params),
        optimizer=_read_arrays(folder / "optimizer", like.optimizer),
        step=jnp.asarray(step, jnp.int32),
        key=_key_from_json(_read_json(folder / "key")),
        watch=_read_watch(folder / "watch", like.watch),
    )
    return Restored(state, _read_json(folder / "data"), step)


def _read_arrays(folder: Path, like: Any) -> Any:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder, placed(like))


def _read_json(folder: Path) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder)


def _read_watch(folder: Path, like: Watch) -> Watch:
    """What is remembered of earlier steps; nothing, if the checkpoint is of a version that did not."""
    window = like.losses.shape[0]
    return put_like(Watch.from_json(_read_json(folder), window) if folder.exists() else Watch.new(window), like)


# Not Orbax's own form of a random key: it logs a false alarm ("Skipping merge") at every save.
def _key_to_json(key: Array) -> dict[str, Any]:
    return {"implementation": str(jax.random.key_impl(key)), "data": jax.random.key_data(key).tolist()}


def _key_from_json(saved: dict[str, Any]) -> Array:
    return jax.random.wrap_key_data(jnp.asarray(saved["data"], jnp.uint32), impl=saved["implementation"])


def _free(path: Path) -> Path:
    """The path, or the first of `path.1`, `path.2`, ... that does not exist."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def checkpoint_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints; absolute, as Orbax wants it."""
    return (run / CHECKPOINT_FOLDER).absolute()


def saved_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, in order; Orbax renames a folder when it is complete."""
    folder = checkpoint_folder(run)
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []


def newest_readable(run: Path, read: Callable[[int], Loaded], before: int | None = None) -> tuple[Loaded, list[int]]:
    """What `read(step)` returns for the newest step (before one, if given) it works for, and the newer it does not.

    Raises:
        UserError: it works for none, or raises one itself.
    """
    broken: list[int] = []
    for step in reversed([each for each in saved_steps(run) if before is None or each < before]):
        try:
            return read(step), broken
        except UserError:
            raise
        except Exception as error:  # Orbax and its storage raise dozens of kinds for a damaged file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("%s cannot be read, trying the one before: %s", checkpoint_folder(run) / str(step), reason)
            broken.append(step)
    raise UserError(f"no checkpoint in {checkpoint_folder(run)} can be read; restore one from a backup, or start anew")


def read_about(run: Path, step: int) -> About:
    """What a checkpoint is of."""
    content = dict(_read_json(checkpoint_folder(run) / str(step) / "about"))
    content.pop("step")
    return About(**content)


def read_params(run: Path, step: int, like: Params) -> Params:
    """The parameters of a checkpoint, shaped and placed like the given ones.

    Raises:
        UserError: the checkpoint's parameters have other names or shapes; the message lists what differs.
    """
    where = checkpoint_folder(run) / str(step)
    if phrases := differences(read_about(run, step).parameters, shapes(like)):
        raise UserError(f"{where} is a checkpoint of another model: {listed(phrases)}")
    return _read_arrays(where / "model", like)
