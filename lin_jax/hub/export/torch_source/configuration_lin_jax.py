"""Configurations of LLaMA, GPT-2 and BERT models whose token mixing is linear attention."""

from typing import Any

import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig

from .versions_lin_jax import require_version

require_version(transformers.__version__)


class LinJaxLlamaConfig(LlamaConfig):
    """A LLaMA's options, those that make a Mistral, Qwen2 or Qwen3 of it, and those of its token mixer.

    Attributes:
        attention: name and sizes of the attention, such as `{"name": "augmented", "group_size": 64, ...}`; a list of
            such objects, one for each layer, where these differ.
        output_bias: whether the projection out of the heads has a bias; `attention_bias` is for those into them.
        query_key_norm: whether queries and keys of each head are normalised before they are rotated.
    """

    model_type = "lin_jax_llama"
    base_model_tp_plan = None
    base_model_pp_plan = None

    attention: dict[str, Any] | list[dict[str, Any]] | None = None
    output_bias: bool = False
    query_key_norm: bool = False

    def validate_architecture(self) -> None:
        """Refuses key/value heads that the query heads cannot share."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )


class LinJaxGPT2Config(GPT2Config):
    """A GPT-2's options and those of its token mixer. There is no dropout.

    Attributes:
        attention: name and sizes of the attention, such as `{"name": "augmented", "group_size": 64, ...}`; a list of
            such objects, one for each layer, where these differ.
    """

    model_type = "lin_jax_gpt2"

    attention: dict[str, Any] | list[dict[str, Any]] | None = None


class LinJaxBertConfig(BertConfig):
    """A BERT's options and those of its token mixer. There is no dropout.

    Attributes:
        attention: name and sizes of the attention, such as `{"name": "augmented", "group_size": 64, ...}`.
    """

    model_type = "lin_jax_bert"

    attention: dict[str, Any] | list[dict[str, Any]] | None = None
