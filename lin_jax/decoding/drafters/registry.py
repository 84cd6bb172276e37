"""Drafters by name, and what each of them needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lin_jax.decoding.draft import Drafter
from lin_jax.decoding.drafters.medusa import MedusaDrafter
from lin_jax.decoding.drafters.model import ModelDrafter, SelfDrafter
from lin_jax.decoding.drafters.ngram import NgramDrafter
from lin_jax.decoding.drafters.none import NoDrafter
from lin_jax.decoding.drafters.path import PathDrafter
from lin_jax.decoding.drafters.union import UnionDrafter
from lin_jax.errors import UserError
from lin_jax.models import CausalModel, MedusaHeads, PathHead

NGRAM_MATCHES = 4


@dataclass(frozen=True)
class DraftParts:
    """What drafters are made of.

    Attributes:
        target: the model that is drafted for.
        medusa: its Medusa heads.
        path: its path-conditioned head.
        model: a small model with its vocabulary.
        layers: numbers of the target's layers that draft for it.
    """

    target: CausalModel
    medusa: MedusaHeads | None = None
    path: PathHead | None = None
    model: CausalModel | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        count = self.target.layers.count
        if self.layers is not None and (not self.layers or not all(0 <= each < count for each in self.layers)):
            raise UserError(f"draft layers {list(self.layers)} do not exist; the model's are 0 to {count - 1}")
        sizes = {"draft model": self.model}
        for name, part in sizes.items():
            if part is not None and part.config.vocab_size != self.target.config.vocab_size:
                raise UserError(
                    f"the {name} has {part.config.vocab_size} vocabulary entries, the model "
                    f"{self.target.config.vocab_size}; give one with the same tokenizer"
                )


def _medusa(parts: DraftParts) -> Drafter | None:
    return None if parts.medusa is None else MedusaDrafter(parts.medusa)


def _path(parts: DraftParts) -> Drafter | None:
    return None if parts.path is None else PathDrafter(parts.path)


def _model(parts: DraftParts) -> Drafter | None:
    return None if parts.model is None else ModelDrafter(parts.model)


def _self(parts: DraftParts) -> Drafter | None:
    return None if parts.layers is None else SelfDrafter(parts.target, parts.layers)


DRAFTERS: dict[str, Callable[[DraftParts], Drafter | None]] = {
    "none": lambda parts: NoDrafter(),
    "ngram": lambda parts: NgramDrafter(matches=NGRAM_MATCHES),
    "medusa": _medusa,
    "path": _path,
    "model": _model,
    "self": _self,
}
NEEDS = {
    "medusa": "Medusa heads: train some with objective medusa, and name them with --heads",
    "path": "a path head: train one with objective path, and name it with --heads",
    "model": "a small model: name one with --draft-model",
    "self": "layers to run: name them with --draft-layers",
}


def build_drafter(kind: str, parts: DraftParts) -> Drafter:
    """A drafter by its name, or several by names with `+` between them; ranks count on from one to the next.

    Raises:
        UserError: a name is unknown, or a part that it needs is not there.
    """
    built: list[Drafter] = []
    for name in kind.split("+"):
        if name not in DRAFTERS:
            names = ", ".join(DRAFTERS)
            raise UserError(f"drafter '{name}' is unknown; choose from {names}, also joined as in path+ngram")
        drafter = DRAFTERS[name](parts)
        if drafter is None:
            raise UserError(f"drafter '{name}' needs {NEEDS[name]}; or choose ngram")
        built.append(drafter)
    return built[0] if len(built) == 1 else UnionDrafter(*built)


def available(parts: DraftParts) -> Sequence[str]:
    """The drafters that can be built, each alone and those with a model behind them joined with the n-gram's."""
    alone = [name for name, build in DRAFTERS.items() if name != "none" and build(parts) is not None]
    return [*alone, *(f"{name}+ngram" for name in alone if name != "ngram")]
