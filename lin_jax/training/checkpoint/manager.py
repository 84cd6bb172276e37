"""Checkpoints of a run: written by Orbax in the background, and read back exactly or not at all.

A checkpoint holds, under `OUTPUT/checkpoints/STEP/`, the parameters that are trained (`model`), the optimiser
(`optimizer`), and as JSON the random key (`key`), the losses of earlier steps (`watch`), the position in the data
(`data`), and what it is a checkpoint of (`about`, a `CheckpointMetadata`). It is written under another name and gets
its own when everything is there, the manifest of checksums included.

With several processes every one calls the same methods; the first decides what is on the disk they share.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.options import AsyncOptions

from lin_jax.errors import UserError
from lin_jax.training.checkpoint.failed_saves import end_writing, remove_unfinished, without_echoes
from lin_jax.training.checkpoint.files import (
    checkpoint_folder,
    first_readable,
    read_metadata,
    saved_steps,
    validation_losses,
)
from lin_jax.training.checkpoint.manifest import seal
from lin_jax.training.checkpoint.metadata import CheckpointMetadata
from lin_jax.training.checkpoint.retention import newest_and_best
from lin_jax.training.checkpoint.state import Restored, parts_of, read_state
from lin_jax.training.checkpoint.storage import no_room, storage_failure
from lin_jax.training.distributed.multihost import broadcast_from_first
from lin_jax.training.train_step import TrainState

UNREADABLE_FOLDER = "unreadable"
ROLLED_BACK_FOLDER = "rolled_back"

_NONE = "none"

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run folder, for the run that writes them. A context manager: leaving waits for the disk.

    Args:
        folder: the run's folder.
        keep: newest checkpoints to keep; None keeps all.
        keep_best: how many to keep besides, if they are older: those with the lowest validation losses.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, keep: int | None = None, keep_best: int = 0) -> None:
        self.run = folder
        self.folder = checkpoint_folder(folder)
        self._losses = dict(broadcast_from_first(lambda: list(validation_losses(folder).items())))
        self._saving: int | None = None
        self._echoes = ExitStack()
        self._failed = False
        self._policy = newest_and_best(keep, keep_best, self._losses)
        self._manager: Any = None
        self._manager = self._open()
        self.latest: int | None = self._manager.latest_step()

    def _open(self) -> Any:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            # Reads no metadata: they are in no manifest, and a damaged one must not keep a run from its sound ones.
            lightweight_initialize=True,
            # Folders are made at once: where a disk has no room for one, threads would wait for it for minutes.
            async_options=AsyncOptions(post_finalization_callback=self._seal, create_directories_asynchronously=False),
        )
        with self._storage_errors():
            broadcast_from_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            return ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        self._echoes.enter_context(without_echoes())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close()
        except UserError as failure:
            if error is None:
                raise
            log.warning("%s", failure)
        finally:
            self._echoes.close()

    def _close(self) -> None:
        if self._failed:
            remove_unfinished(self.folder)
            return
        with self._storage_errors():
            self._manager.close()

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, Any],
        metadata: CheckpointMetadata,
        validation_loss: float | None = None,
    ) -> None:
        """Begins to save; the state may be given away at once. Does nothing if this step is saved already.

        Args:
            step: steps taken so far.
            state: what to save; with several processes its arrays are spread over all of them.
            data: position in the data, as JSON has it; that of the first process is written.
            metadata: what this is a checkpoint of.
            validation_loss: of exactly this state, if it is known.

        Raises:
            UserError: this, or the save before, could not be written.
        """
        if step == self.latest:
            return
        self.wait()
        if validation_loss is not None and math.isfinite(validation_loss):
            self._losses[step] = float(validation_loss)
        label = {"step": step, "validation_loss": self._losses.get(step), "sealed": True}
        self._saving = step
        with self._storage_errors():
            self._manager.save(step, args=parts_of(state, data, {**vars(metadata), **label}), force=True)
        self.latest = step

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
            UserError: it could not be written.
        """
        with self._storage_errors():
            self._manager.wait_until_finished()

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def last_good(self) -> str:
        """Names the newest complete checkpoint, or says that there is none."""
        steps = saved_steps(self.run)
        return str(self.path(steps[-1])) if steps else _NONE

    def restore_latest(self, like: TrainState, metadata: CheckpointMetadata) -> Restored:
        """The newest checkpoint that is whole.

        Those that are not are named in a warning and moved to `OUTPUT/unreadable`, to make room for their steps.

        Args:
            like: a state of the same structure; its arrays (or shapes) say where restored ones are placed.
            metadata: what the checkpoint must be of.

        Raises:
            UserError: there is none, none is whole, or it is of another model.
        """
        return self._restore(lambda step: True, like, metadata, "to resume from; leave --resume out to start the run")

    def restore_before(self, step: int, like: TrainState, metadata: CheckpointMetadata) -> Restored:
        """The newest checkpoint before a step that is whole; the run goes on from there.

        Later ones that are whole are moved to `OUTPUT/rolled_back`; otherwise as `restore_latest`, also while a run
        goes on.

        Raises:
            UserError: there is none, none is whole, or it is of another model.
        """
        return self._restore(
            lambda each: each < step, like, metadata, f"before step {step}; begin anew with another output folder"
        )

    def restore(self, step: int, like: TrainState, metadata: CheckpointMetadata) -> Restored:
        """The checkpoint of one step; the run goes on from there. Otherwise as `restore_before`.

        Raises:
            UserError: there is none of that step, it is damaged, or it is of another model.
        """
        return self._restore(lambda each: each == step, like, metadata, f"of step {step}; name another step")

    def _restore(
        self, wanted: Callable[[int], bool], like: TrainState, metadata: CheckpointMetadata, which: str
    ) -> Restored:
        self.wait()
        steps = broadcast_from_first(lambda: saved_steps(self.run))
        candidates = [step for step in reversed(steps) if wanted(step)]
        if not candidates:
            raise UserError(f"there is no checkpoint in {self.run} {which}")

        def read(step: int) -> Restored:
            metadata.demand_equal(read_metadata(self.run, step), self.path(step))
            return read_state(self.path(step), step, like)

        restored, broken = first_readable(self.run, candidates, read)
        later = [step for step in steps if step > restored.step]
        broadcast_from_first(lambda: self._move(set(later) & set(broken), self.run / UNREADABLE_FOLDER))
        broadcast_from_first(lambda: self._move(set(later) - set(broken), self.run / ROLLED_BACK_FOLDER))
        for step in later:
            self._losses.pop(step, None)
        if later:
            self._manager.close()
            self._manager = self._open()
        self.latest = restored.step
        return restored

    def _move(self, steps: set[int], place: Path) -> None:
        """Moves checkpoints away, whose steps the run will come to again."""
        for step in steps:
            place.mkdir(exist_ok=True)
            os.replace(self.path(step), _free(place / str(step)))

    def _seal(self) -> None:
        """Writes the manifest: in the background, when all parts are there and the whole has no name yet."""
        seal(next(self.folder.glob(f"{self._saving}.*"), self.path(self._saving or 0)))

    @contextmanager
    def full_disk_told(self) -> Iterator[None]:
        """Turns what a full disk raises inside, whoever writes, into one line that says how to go on.

        Raises:
            UserError: there was no room.
        """
        with self._storage_errors(no_room):
            yield

    @contextmanager
    def _storage_errors(self, meant: Callable[[int], bool] = lambda failure: True) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # an OSError, or whatever tensorstore makes of one in its threads
            failure = storage_failure(error)
            if failure is None or not meant(failure):
                raise
            self._failed = True
            if self._manager is not None:
                end_writing(self._manager)
            remove_unfinished(self.folder)
            good = self.last_good()
            remedy = "make room" if no_room(failure) else "mend that"
            then = "start again" if good == _NONE else "go on from it with --resume"
            raise UserError(
                f"cannot write to {self.run}: {os.strerror(failure)}; the last good checkpoint is {good}; "
                f"{remedy} and {then}"
            ) from error


def _free(path: Path) -> Path:
    """The path, or the first of `path.1`, `path.2`, ... that does not exist."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
