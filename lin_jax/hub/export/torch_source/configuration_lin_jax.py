"""Configurations of LLaMA, GPT-2, BERT, FLASH and T5 models whose token mixing is linear attention."""

from typing import Any

import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig

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


class LinJaxFlashConfig(PretrainedConfig):
    """A FLASH's options, by the names that they have in JAX, and those of its token mixer.

    Attributes:
        query_key_size: size S of queries and keys.
        expansion_factor: size of values and gate, as a multiple of `hidden_size`.
        norm: norm before each unit: scale or layer.
        shift_tokens: whether half of each unit's input comes from the token before.
        relative_buckets: buckets of distances that have a bias.
        relative_max_distance: distances from here on share the last bucket.
        length_scale: of other attentions than those by groups.
        norm_eps: epsilon of the norms.
        attention: name and sizes of the attention, such as `{"name": "flash", "group_size": 64, ...}`.
    """

    model_type = "flash_gau"

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 8
    query_key_size: int = 128
    expansion_factor: float = 2.0
    norm: str = "scale"
    shift_tokens: bool = True
    relative_buckets: int = 32
    relative_max_distance: int = 128
    length_scale: str = "position"
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    attention: dict[str, Any] | list[dict[str, Any]] | None = None

    @property
    def inner_size(self) -> int:
        """Size of values and gate."""
        return int(self.hidden_size * self.expansion_factor)


class LinJaxT5Config(PretrainedConfig):
    """A T5's options, by the names that they have in transformers, and those of its token mixers. There is no dropout.

    Attributes:
        feed_forward_proj: `relu`, or `gated-gelu`.
        tie_word_embeddings: whether the head is the embedding; what it reads is then scaled by `d_model^-0.5`.
        attention: of the `encoder`, of the `decoder`, and `cross` of one to the other: objects such as
            `{"name": "augmented", "group_size": 64, ...}` by these names.
    """

    model_type = "lin_jax_t5"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0
    attention: dict[str, Any] | None = None
