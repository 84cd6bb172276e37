"""Models, heads and what drafters are made of, as they are read to decode with."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer
from lin_jax.decoding.drafting.drafters import DraftParts
from lin_jax.errors import UserError
from lin_jax.evaluation.head_accuracy import ACCURACY_FILE, HeadAccuracy
from lin_jax.hub.medusa import has_heads, load_medusa_heads
from lin_jax.models import CausalModel, LayerStack, MedusaHeads, PathHead, SeparateLayers
from lin_jax.models.params import abstract_model
from lin_jax.models.stored_weights import WeightStorage, computed_in, storage_for, store, store_heads
from lin_jax.training.model_source import ModelSource, check_tokenizer, holds_heads

log = logging.getLogger(__name__)

# Folders inside a run's where heads for its model are looked for.
HEAD_FOLDERS = ("heads", "path")
STORED = WeightStorage()


def storage_of(source: ModelSource, storage: WeightStorage) -> WeightStorage:
    """The way a model's weights are stored: int8 where its files hold that, else as asked for."""
    return replace(storage, weights="int8") if source.rounded else storage


def draft_parts(
    model: CausalModel,
    heads: Sequence[MedusaHeads | PathHead] = (),
    small: CausalModel | None = None,
    layers: Sequence[int] | None = None,
    storage: WeightStorage = STORED,
) -> DraftParts:
    """Gathers what drafters are made of; the model's layers are taken apart and its weights stored for decoding."""
    if isinstance(model.layers, LayerStack):
        model.layers = SeparateLayers.of(model.layers)
        chosen = storage_for(model, storage)
        store(model, chosen)
        for each in heads:
            store_heads(each, chosen, model.config.dtype)
    model.same_bits = storage.same_bits
    path = next((each for each in heads if isinstance(each, PathHead)), None)
    model.aux_layers = () if path is None else path.layers
    return DraftParts(
        target=model,
        medusa=next((each for each in heads if isinstance(each, MedusaHeads)), None),
        path=path,
        model=small,
        layers=None if layers is None else tuple(layers),
    )


def load_for_decoding(
    source: ModelSource,
    dtype: str | None = None,
    storage: WeightStorage = STORED,
    *,
    attention: AttentionConfig | None = None,
    whole: bool = False,
) -> CausalModel:
    """Reads a model to decode with; `draft_parts` takes it apart if that is not done yet.

    Args:
        source: where it is.
        dtype: type that is computed in; None is what suits the device.
        storage: how its weights are stored.
        attention: another attention than its own; what that adds is initialized.
        whole: keep it as models that learn are, since heads are still to be checked against it.

    Raises:
        UserError: the place holds no model that writes texts, or a damaged one.
    """
    storage = storage_of(source, storage)
    if source.is_run:
        model = source.model(attention=attention)
        check_causal(model, str(source.place))
        return computed_in(model, dtype or default_dtype(model.config.dtype), abstract_model)
    compute = source.config.compute
    compute = replace(compute, dtype=dtype or default_dtype(compute.dtype))
    model = source.model(
        attention=attention,
        compute=compute,
        storage=None if whole else lambda model: storage_for(model, storage),
    )
    check_causal(model, str(source.place))
    return model


def default_dtype(own: str) -> str:
    """The type to compute in for a model with a type of its own: that one, but float32 for bfloat16 on a CPU."""
    return "float32" if own == "bfloat16" and jax.default_backend() == "cpu" else own


def check_causal(model: Any, name: str) -> None:
    """Refuses a model that does not write texts.

    Raises:
        UserError: it is none.
    """
    if not isinstance(model, CausalModel):
        raise UserError(f"{name} holds a {type(model).__name__}, which does not write texts; give a causal model")


def check_entries(source: ModelSource, tokenizer: Tokenizer, model: CausalModel) -> None:
    """Refuses or warns of a tokenizer with more entries than the model knows."""
    if source.is_run:
        check_tokenizer(source, tokenizer)
    elif tokenizer.vocab_size > model.config.vocab_size:
        # Often an added token, such as one for padding, that no text holds.
        log.warning(
            "the tokenizer in %s has %d entries, the model %d: a prompt with one of those beyond is refused",
            source.place,
            tokenizer.vocab_size,
            model.config.vocab_size,
        )


def head_sources(places: Sequence[str | Path], source: ModelSource) -> list[ModelSource]:
    """Places of heads: the given ones first, then those that lie in the model's own folder."""
    folder = source.place
    inside = [ModelSource(folder / name) for name in HEAD_FOLDERS if (folder / name).is_dir()]
    if _beside(folder):
        inside.insert(0, source)
    return [*(ModelSource(Path(place)) for place in places), *inside]


def load_heads(sources: Sequence[ModelSource], model: Any) -> list[MedusaHeads | PathHead]:
    """Reads the heads of some places."""
    return [load_medusa_heads(each.place, model) if has_heads(each.place) else each.heads(model) for each in sources]


def recorded_accuracy(
    sources: Sequence[ModelSource], heads: Sequence[MedusaHeads | PathHead]
) -> dict[str, Float[np.ndarray, "K R"]]:
    """Shares of right guesses by depth and rank that training recorded, by the name of the drafter that uses the heads.

    Args:
        sources: places of heads.
        heads: the heads of each; of several of a kind the first count.
    """
    found: dict[str, Float[np.ndarray, "K R"]] = {}
    for source, each in zip(sources, heads, strict=True):
        name = "path" if isinstance(each, PathHead) else "medusa"
        if name in found:
            continue
        found[name] = np.zeros((0, 0))
        # Without the file, as beside published heads, or with a damaged one, nothing is known.
        with suppress(OSError, ValueError, KeyError, TypeError):
            table = HeadAccuracy.load(source.place / ACCURACY_FILE).accepted.astype(float)
            if table.ndim == 2 and np.all((table >= 0) & (table <= 1)):
                found[name] = table
    return {name: table for name, table in found.items() if table.size}


def _beside(folder: Path) -> bool:
    """True where heads lie in the same files as the model."""
    return has_heads(folder) or holds_heads(folder)


def heads_are_near(folder: Path) -> bool:
    """True where heads lie in a model's folder, in its files or in a folder inside."""
    return _beside(folder) or any((folder / name).is_dir() for name in HEAD_FOLDERS)
