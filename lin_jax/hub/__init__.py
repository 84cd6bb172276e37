"""Models from and to Hugging Face folders: configurations, tensors, tokenizers, adapters and model cards."""

from lin_jax.hub.load import from_pretrained as from_pretrained
from lin_jax.hub.save import save_pretrained as save_pretrained
