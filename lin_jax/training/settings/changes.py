"""Changes to the settings of a run that is resumed, said and written down, or of one that is finished, said."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.config_file import load_run_config
from lin_jax.training.optimizer import learning_rate

# Settings that do not alter what a finished run has learnt.
_WITHOUT_EFFECT = (
    "output",
    "mesh.",
    "data.cache",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_",
    "training.plot",
    "training.monitoring.",
    "training.profile.",
    "training.wandb.",
)
# Settings that a run fills in itself where they are not given, or gives another value.
_FILLED_IN = ("model.vocab_size", "model.num_labels")
_BY_A_TASK = ("data.sequence_length",)
_BY_EPOCHS = ("training.steps",)
# Places, which may have moved together with the run.
_PLACES = ("init_from", "teacher")


def changes(folder: Path, now: RunConfig, step: int) -> list[str]:
    """Compares the settings of a run with those in its folder, a line for each difference.

    Args:
        folder: the run's folder.
        now: settings with which it is resumed.
        step: steps taken so far.
    """
    if not (folder / CONFIG_FILE).exists():
        return [f"{folder} has no {CONFIG_FILE} to compare with; it is written anew"]
    try:
        before = load_run_config(folder)
    except UserError as error:
        return [f"{error}; {CONFIG_FILE} is written anew"]
    lines = [
        f"{name} is {_shown(new)} from step {step} on; it was {_shown(old)}"
        for name, old, new in _differences(before, now)
        if name != "output"
    ]
    rates = [float(learning_rate(config.optimizer, config.training.steps, step)) for config in (before, now)]
    if lines and rates[0] != rates[1]:
        lines.append(f"the learning rate of the next step is {rates[1]:.3g}; it was to be {rates[0]:.3g}")
    return lines


def changes_of_finished(folder: Path, now: RunConfig) -> list[str]:
    """Compares the settings with which a finished run is asked for with those that made it, a line for each difference.

    Args:
        folder: the run's folder.
        now: settings that are asked for.
    """
    try:
        before = load_run_config(folder)
    except UserError as error:
        return [f"{error}; what {folder} was made with is not known"]
    given = [
        *(_BY_A_TASK if now.data.task is not None else ()),
        *(_BY_EPOCHS if now.training.epochs is not None else ()),
    ]
    return [
        f"{folder} is finished and stays as it is, with {name} {_shown(old)}, not {_shown(new)}; "
        "give another output to train anew"
        for name, old, new in _differences(before, now)
        if not name.startswith(_WITHOUT_EFFECT)
        and name not in given
        and not (name in _FILLED_IN and new is None)
        and not (name in _PLACES and Path(str(old)).name == Path(str(new)).name)
    ]


def check_optimizer(folder: Path, now: RunConfig) -> None:
    """Refuses to go on with another optimizer than that of the moments in a run's checkpoints.

    Raises:
        UserError: one of both has Muon.
    """
    try:
        before = load_run_config(folder).optimizer.muon
    except UserError:
        return  # `changes` says so.
    if (before is None) != (now.optimizer.muon is None):
        verb = "added to" if before is None else "left out of"
        raise UserError(f"optimizer.muon cannot be {verb} a run that goes on; give it as it was, or another --output")


def write_config(config: RunConfig) -> None:
    """Writes a run's settings to its folder.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        config.save(Path(config.output) / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"cannot write to {config.output}: {error.strerror}; make it writable") from error


def _differences(before: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields name, old and new value of each setting that differs."""
    old, new = (dict(_flat(plain(config))) for config in (before, now))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
