"""Large models layer by layer: one small program that every layer of a kind runs, instead of a program of all layers.

XLA compiles each layer of a program anew, which takes seconds for a model of some layers. A program of one layer is
there in one, and to start it for every layer takes a fraction of a millisecond, little beside the work of a large one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from lin_jax.decoding.engine.programs import Flat
from lin_jax.models import SeparateLayers
from lin_jax.models.by_kind import places

# Numbers in a model and its drafter above which it runs layer by layer where no program of all layers is there.
LARGE = 2**26
# Numbers above which plain steps stay so: a program of all layers takes seconds to compile, and some hundred megabytes,
# for a tenth of a step's time.
VERY_LARGE = 2**29


class LayerAlone(NamedTuple):
    """A layer for a program of its own.

    Attributes:
        layer: the layer.
        kind: number of its kind, which is 0 where all layers are alike.
        place: number among those of its kind.
        is_aux: whether draft heads read its outputs.
    """

    layer: Flat
    kind: int
    place: np.int32
    is_aux: bool


def runs_by_layers(modules: Flat) -> bool:
    """True for a target that can run layer by layer: a large one on a CPU, whose layers may be compiled alone.

    Accelerators would wait for the host.
    """
    model = modules.structure.outline[0]
    alone = isinstance(model.layers, SeparateLayers) and not model.same_bits
    return alone and _numbers(modules) > LARGE and jax.default_backend() == "cpu"


def stays_by_layers(modules: Flat) -> bool:
    """True for one that `runs_by_layers` and is so large that nothing else is made for plain steps."""
    return runs_by_layers(modules) and _numbers(modules) > VERY_LARGE


def _numbers(modules: Flat) -> int:
    return sum(leaf.size for leaf in modules.leaves)


def layers_alone(modules: Flat) -> Iterator[LayerAlone]:
    """Yields the target's layers in their order."""
    model = modules.structure.outline[0]
    for number, (kind, place) in enumerate(places(model.layers.order or (0,) * model.layers.count)):
        layer = modules.part(lambda model, *others, number=number: model.layers.layers[number])
        yield LayerAlone(layer, kind, np.int32(place), number in model.aux_layers)
