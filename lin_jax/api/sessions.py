"""Sessions of models in memory: copies that are laid out for decoding, kept as long as the models are."""

import weakref
from typing import Any

import jax
from flax import nnx

from lin_jax.api.origins import origin_of
from lin_jax.data import Tokenizer
from lin_jax.session import Session

_sessions: "weakref.WeakKeyDictionary[Any, tuple[list[Any], Session]]" = weakref.WeakKeyDictionary()


def session_of(model: Any, tokenizer: Tokenizer) -> Session:
    """A session with a copy of the model, made anew when the model has other values."""
    leaves = jax.tree.leaves(nnx.state(model))
    known = _sessions.get(model)
    if known is not None and len(known[0]) == len(leaves):
        same = all(ref() is leaf for ref, leaf in zip(known[0], leaves, strict=True))
        if same and known[1].tokenizer is tokenizer:
            return known[1]
    origin = origin_of(model)
    ends, weights = (None, "stored") if origin is None else (origin.end_tokens or None, origin.weights)
    session = Session.of(model, tokenizer, ends, weights=weights)
    _sessions[model] = ([weakref.ref(leaf) for leaf in leaves], session)
    return session
