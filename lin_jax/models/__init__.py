"""Language models built from token mixers."""

from lin_jax.models.llama import Llama as Llama
from lin_jax.models.llama import LlamaConfig as LlamaConfig
from lin_jax.models.medusa import MedusaHeads as MedusaHeads
from lin_jax.models.rotary import RotaryConfig as RotaryConfig
