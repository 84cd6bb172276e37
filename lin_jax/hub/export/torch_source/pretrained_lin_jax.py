"""The base of all models here: initial values of what is in no file, int8 layers, random directions in float32."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .int8_lin_jax import put_int8_layers


class LinJaxPreTrainedModel(PreTrainedModel):
    """Settings of transformers for all models here."""

    supports_gradient_checkpointing = False

    def post_init(self) -> None:
        """Puts int8 layers in, and keeps random directions in float32: rounded ones give other features."""
        put_int8_layers(self)
        super().post_init()
        # Not an attribute of the class: transformers 4 refuses names that are not those of parameters.
        self._keep_in_fp32_modules_strict = {r"(?<=\.)projection$"}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initial_values"):
            for name, value in module.initial_values().items():
                tensor = getattr(module, name)
                if not getattr(tensor, "_is_hf_initialized", False):  # it was not read from a file
                    with torch.no_grad():
                        tensor.copy_(value)
