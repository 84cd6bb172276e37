"""What a checkpoint is of, and whether that is what a run is about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.training.parameters import differences, listed

# Options of the model that change how it is computed, not what.
_HARMLESS = ("remat", "remat_keeps", "unroll")


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
