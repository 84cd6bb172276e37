"""A trained model, ready to decode: tokenizer, drafters, and this machine's plans."""

from lin_jax.session.loading import check_causal, default_dtype, draft_parts, load_for_decoding
from lin_jax.session.plan_search import PLAN_FILE
from lin_jax.session.session import PREFILL_CHUNK, SAME_BITS_CHUNK, Session, check_length

__all__ = [
    "PLAN_FILE",
    "PREFILL_CHUNK",
    "SAME_BITS_CHUNK",
    "Session",
    "check_causal",
    "check_length",
    "default_dtype",
    "draft_parts",
    "load_for_decoding",
]
