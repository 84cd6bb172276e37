"""Large models layer by layer: one small program that every layer of a kind runs, instead of a program of all layers.

XLA compiles each layer of a program anew: seconds for a model of a billion numbers, and hundreds of megabytes. To start
a program for each layer takes a fraction of a millisecond, which is little beside the work of a large one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lin_jax.decoding.engine.programs import Flat
from lin_jax.models import SeparateLayers
from lin_jax.models.by_kind import places

# Numbers in a model and its drafter above which it runs layer by layer.
LARGE = 2**27


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
    """True for a target that runs layer by layer: a large one, whose layers stand alone and may be compiled so."""
    model = modules.structure.outline[0]
    alone = isinstance(model.layers, SeparateLayers) and not model.same_bits
    return alone and sum(leaf.size for leaf in modules.leaves) > LARGE


def layers_alone(modules: Flat) -> Iterator[LayerAlone]:
    """Yields the target's layers in their order."""
    model = modules.structure.outline[0]
    for number, (kind, place) in enumerate(places(model.layers.order or (0,) * model.layers.count)):
        layer = modules.part(lambda model, *others, number=number: model.layers.layers[number])
        yield LayerAlone(layer, kind, np.int32(place), number in model.aux_layers)
