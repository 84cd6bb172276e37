"""The checkpoints in a run's folder, as they lie on disk: which there are, which are whole, and what is in them."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from lin_jax.errors import UserError
from lin_jax.models.params import Params, differences, listed, placed, shapes
from lin_jax.training.checkpoint.manifest import MANIFEST_FILE, damage
from lin_jax.training.checkpoint.metadata import CheckpointMetadata
from lin_jax.training.distributed.multihost import broadcast_from_first, is_first

CHECKPOINT_FOLDER = "checkpoints"

# Parts of a checkpoint, as paths of files begin.
ALL_PARTS = ("",)
METADATA_PART = ("about/",)
MODEL_PARTS = ("about/", "model/")

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def checkpoint_folder(run: Path) -> Path:
    """The folder of a run's checkpoints; absolute, as Orbax wants it."""
    return (run / CHECKPOINT_FOLDER).absolute()


def saved_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, in order; Orbax renames a folder when it is complete."""
    folder = checkpoint_folder(run)
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []


def validation_losses(run: Path) -> dict[int, float]:
    """The validation loss of each checkpoint that was written right after a validation, by step, the best one first."""
    losses = {}
    for step in saved_steps(run):
        folder = checkpoint_folder(run) / str(step)
        loss = None if problem(folder, METADATA_PART) else read_json(folder / "about").get("validation_loss")
        if loss is not None:
            losses[step] = loss
    return dict(sorted(losses.items(), key=lambda each: (each[1], -each[0])))


def best_first(run: Path) -> list[int]:
    """Steps of the checkpoints with a validation loss, the best one first.

    Raises:
        UserError: none has one.
    """
    if not (losses := validation_losses(run)):
        raise UserError(
            f"no checkpoint in {run} was written right after a validation, so none is known to be the best; "
            "leave 'best' out to take the newest"
        )
    return list(losses)


def problem(folder: Path, parts: tuple[str, ...] = ALL_PARTS) -> str | None:
    """Why a checkpoint must not be used, or None; see `manifest.damage`.

    A checkpoint gets its manifest before its name. One without has lost it since, unless it says itself that it is of
    a time before there were any; then nothing is known against it.
    """
    if (folder / MANIFEST_FILE).exists() or _sealed(folder):
        return damage(folder, parts)
    return None


def _sealed(folder: Path) -> bool:
    """True if a checkpoint had a manifest when it was written."""
    try:
        return bool(read_json(folder / "about").get("sealed"))
    except (OSError, ValueError, AttributeError):
        return True


def first_readable(
    run: Path,
    steps: Sequence[int],
    read: Callable[[int], Loaded],
    parts: tuple[str, ...] = ALL_PARTS,
    otherwise: str = "the one before",
) -> tuple[Loaded, list[int]]:
    """Returns `read(step)` for the first of some checkpoints that is whole, and the steps that were not.

    Args:
        run: the run's folder.
        steps: which checkpoints, in the order in which they are wanted.
        read: reads one.
        parts: what it reads; the rest is not looked at.
        otherwise: what is tried after one that is damaged, for the warning.

    Raises:
        UserError: none is whole, or a whole one cannot be read here, or `read` raises one itself.
    """
    broken: list[int] = []
    for step in steps:
        folder = checkpoint_folder(run) / str(step)
        reason = broadcast_from_first(partial(problem, folder, parts))
        if reason is None:
            try:
                return read(step), broken
            except UserError:
                raise
            except Exception as error:  # Orbax and its storage raise dozens of kinds
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                if _sealed(folder):
                    raise UserError(
                        f"{folder} is whole, but cannot be read into this run: {reason}; "
                        "use the options it was made with, or another output folder"
                    ) from error
        if is_first():
            log.warning("%s cannot be read, trying %s: %s", folder, otherwise, reason)
        broken.append(step)
    raise UserError(f"no checkpoint in {checkpoint_folder(run)} can be read; restore one from a backup, or start anew")


def newest_readable(
    run: Path, read: Callable[[int], Loaded], parts: tuple[str, ...] = ALL_PARTS
) -> tuple[Loaded, list[int]]:
    """Returns `read(step)` for the newest checkpoint that is whole, and the newer steps that are not.

    Raises:
        UserError: none is whole, or a whole one cannot be read here, or `read` raises one itself.
    """
    return first_readable(run, broadcast_from_first(lambda: saved_steps(run)[::-1]), read, parts)


def read_metadata(run: Path, step: int) -> CheckpointMetadata:
    """Reads the metadata of a checkpoint."""
    content = read_json(checkpoint_folder(run) / str(step) / "about")
    return CheckpointMetadata(**{each.name: content[each.name] for each in fields(CheckpointMetadata)})


def read_params(run: Path, step: int, like: Params) -> Params:
    """The parameters of a checkpoint, shaped and placed like the given ones.

    Raises:
        UserError: the checkpoint's parameters have other names or shapes; the message lists what differs.
    """
    where = checkpoint_folder(run) / str(step)
    if phrases := differences(read_metadata(run, step).parameters, shapes(like)):
        raise UserError(f"{where} is a checkpoint of another model: {listed(phrases)}")
    return read_arrays(where / "model", like)


def read_arrays(folder: Path, like: Any) -> Any:
    """The arrays of a part of a checkpoint, each placed as the one in its place in `like`; all processes together."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder, placed(like))


def read_json(folder: Path) -> Any:
    """A part of a checkpoint that is JSON."""
    return json.loads((folder / "metadata").read_text())
