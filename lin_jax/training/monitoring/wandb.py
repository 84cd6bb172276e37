"""Figures for Weights & Biases, when asked for."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lin_jax.errors import UserError

RUN_ID_FILE = "wandb_id.txt"
MODES = ("online", "offline", "disabled")


@dataclass(frozen=True)
class WandbConfig:
    """Project and mode of Weights & Biases for the figures of a run.

    Attributes:
        project: its project there; null does without Weights & Biases.
        name: what the run is called there; null calls it like its folder.
        mode: online, offline (written to the run's folder, for `wandb sync`) or disabled.
    """

    project: str | None = None
    name: str | None = None
    mode: str = "online"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"training.wandb.mode is '{self.mode}'; choose one of {', '.join(MODES)}")


def import_wandb() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "training.wandb.project is set, and the package wandb is not installed; "
            "install it with 'pip install wandb', or leave training.wandb.project out"
        ) from error
    return wandb


class WeightsAndBiases:
    """A run there, which a resumed run goes on with.

    Args:
        config: where.
        folder: the run's folder; it remembers the run's id.
        description: the run's whole configuration, to be shown there.
    """

    def __init__(self, config: WandbConfig, folder: Path, description: dict[str, Any]) -> None:
        remembered = folder / RUN_ID_FILE
        self._run = import_wandb().init(
            project=config.project,
            name=config.name or folder.absolute().name,
            mode=config.mode,
            id=remembered.read_text().strip() if remembered.exists() else None,
            resume="allow",
            dir=str(folder),
            config=description,
        )
        remembered.write_text(f"{self._run.id}\n")
        # Its own count of steps only rises; steps that a resumed run repeats would be dropped.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Adds a point to the curve of each figure."""
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        """Sends what is still on its way."""
        self._run.finish()
