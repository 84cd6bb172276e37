"""Hugging Face in and out: configurations, tensors, tokenizers and whole folders."""

from lin_jax.hub.pretrained import from_pretrained as from_pretrained
from lin_jax.hub.saving import save_pretrained as save_pretrained
