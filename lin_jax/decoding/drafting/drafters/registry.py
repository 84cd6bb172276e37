"""Drafters by name, and the parts that each of them needs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.drafters.copy import CopyDrafter
from lin_jax.decoding.drafting.drafters.likeliest import LikeliestDrafter
from lin_jax.decoding.drafting.drafters.medusa import MedusaDrafter
from lin_jax.decoding.drafting.drafters.model import ModelDrafter, SelfDrafter
from lin_jax.decoding.drafting.drafters.ngram import NgramDrafter
from lin_jax.decoding.drafting.drafters.none import NoDrafter
from lin_jax.decoding.drafting.drafters.path import PathDrafter
from lin_jax.decoding.drafting.drafters.suffix import SuffixDrafter
from lin_jax.decoding.drafting.drafters.union import UnionDrafter
from lin_jax.decoding.drafting.text_memory import TextMemory
from lin_jax.errors import UserError
from lin_jax.models import CausalModel, MedusaHeads, PathHead

# Occurrences of the last tokens that the n-gram drafter uses, and tokens that it copies: many, for a text in circles.
NGRAM_MATCHES, NGRAM_DEPTH = 4, 31
# Drafters that copy from the memory of earlier texts.
READERS = ("suffix", "copy")


@dataclass(frozen=True)
class DraftParts:
    """Parts from which drafters are built; None for missing ones.

    Attributes:
        target: the model that is drafted for.
        medusa: its Medusa heads.
        path: its path-conditioned head.
        model: a small model with the same vocabulary.
        layers: indices of the target's layers that draft for it.
        memory: earlier texts, from which some drafters copy.
    """

    target: CausalModel
    medusa: MedusaHeads | None = None
    path: PathHead | None = None
    model: CausalModel | None = None
    layers: tuple[int, ...] | None = None
    memory: TextMemory = field(default_factory=TextMemory, compare=False)

    def __post_init__(self) -> None:
        count = self.target.layers.count
        if self.layers is not None and (not self.layers or not all(0 <= each < count for each in self.layers)):
            raise UserError(f"draft layers {list(self.layers)} do not exist; give numbers from 0 to {count - 1}")
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
    "ngram": lambda parts: NgramDrafter(depth=NGRAM_DEPTH, matches=NGRAM_MATCHES),
    "suffix": lambda parts: SuffixDrafter(parts.memory),
    "copy": lambda parts: CopyDrafter(parts.memory),
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
    """Builds a drafter by name, or of several.

    Names joined with `+` are a union, whose ranks continue from one drafter to the next; names joined with `/`, which
    bind more closely, are one drafter that guesses the likeliest tokens of all.

    Args:
        kind: name or joined names.
        parts: parts to build from.

    Raises:
        UserError: a name is unknown, or a part that it needs is missing.
    """
    sides = [[_single(name, parts) for name in side.split("/")] for side in kind.split("+")]
    built = [side[0] if len(side) == 1 else LikeliestDrafter(*side) for side in sides]
    return built[0] if len(built) == 1 else UnionDrafter(*built)


def _single(name: str, parts: DraftParts) -> Drafter:
    if name not in DRAFTERS:
        names = ", ".join(DRAFTERS)
        raise UserError(
            f"drafter '{name}' is unknown; choose one of {names}, or several joined as in path+ngram or path/suffix"
        )
    drafter = DRAFTERS[name](parts)
    if drafter is None:
        raise UserError(f"drafter '{name}' needs {NEEDS[name]}; or choose ngram")
    return drafter


def reads_memory(kind: str) -> bool:
    """True for a drafter, by name or joined names, that copies from the memory of earlier texts."""
    return not set(READERS).isdisjoint(re.split(r"[+/]", kind))


def available(parts: DraftParts) -> Sequence[str]:
    """Names of the drafters that can be compared in advance: each alone, and others joined with the n-gram drafter.

    What drafters are worth that copy from memory shows only in use, as it fills.
    """
    left_out = ("none", *READERS)
    alone = [name for name, build in DRAFTERS.items() if name not in left_out and build(parts) is not None]
    return [*alone, *(f"{name}+ngram" for name in alone if name != "ngram")]
