"""Metadata of a checkpoint, compared with those of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.models.compute import RESULT_NEUTRAL
from lin_jax.models.params import differences, listed


@dataclass(frozen=True)
class CheckpointMetadata:
    """Objective, model, tokenizer, parameters and base of a checkpoint.

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

    def demand_equal(self, saved: "CheckpointMetadata", where: Path) -> None:
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


def _fingerprint(metadata: CheckpointMetadata) -> str | None:
    return None if metadata.base is None else metadata.base["fingerprint"]


def _flat(model: dict[str, Any], prefix: str = "model") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in model.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}.{name}")
        # Absent is null: options that came later are in no older checkpoint.
        elif name not in RESULT_NEUTRAL and value is not None:
            flat[f"{prefix}.{name}"] = value
    return flat
