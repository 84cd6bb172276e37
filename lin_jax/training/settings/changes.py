"""Changes to the settings of a run that is resumed: said, and written down."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.config_file import load_run_config
from lin_jax.training.optimizer import learning_rate


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
    old, new = (dict(_flat(plain(config))) for config in (before, now))
    lines = [
        f"{name} is {_shown(new.get(name))} from step {step} on; it was {_shown(old.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if name != "output" and old.get(name) != new.get(name)
    ]
    rates = [float(learning_rate(config.optimizer, config.training.steps, step)) for config in (before, now)]
    if lines and rates[0] != rates[1]:
        lines.append(f"the learning rate of the next step is {rates[1]:.3g}; it was to be {rates[0]:.3g}")
    return lines


def write_config(config: RunConfig) -> None:
    """Writes a run's settings to its folder.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        config.save(Path(config.output) / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"cannot write to {config.output}: {error.strerror}; make it writable") from error


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
