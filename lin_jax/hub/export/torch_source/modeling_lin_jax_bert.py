"""BERT with linear attention: an encoder, a masked language model, a classifier."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .attention_lin_jax import (
    AttentionOptions,
    Mixer,
    build_attention,
    build_convolution,
    build_factor,
    build_window,
)
from .both_sides_lin_jax import mix_both_sides
from .configuration_lin_jax import LinJaxBertConfig
from .int8_lin_jax import Int8Linear  # noqa: F401
from .linear_attention_lin_jax import LinearAttention  # noqa: F401 - from a folder, transformers 4 copies what is named
from .other_attention_lin_jax import FullAttention  # noqa: F401
from .pretrained_lin_jax import LinJaxPreTrainedModel
from .recurrence_lin_jax import Rows  # noqa: F401
from .versions_lin_jax import require_version  # noqa: F401
from .windowed_attention_lin_jax import WindowedMemory  # noqa: F401


class LinJaxBertSelfAttention(nn.Module):
    """Queries, keys and values of a token mixer."""

    def __init__(self, config: LinJaxBertConfig, layer: int) -> None:
        super().__init__()
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.options = AttentionOptions.of(config.attention, layer)
        heads, head_dim = {"heads": self.heads, "kv_heads": self.heads}, size // self.heads
        self.mixer = build_attention(self.options, head_dim, layer, **heads)
        self.windowed = build_window(self.options, head_dim, **heads)
        self.global_factor = build_factor(self.options)
        self.dwconv = build_convolution(self.options, self.heads)

    def initial_values(self) -> dict[str, Tensor]:
        """The start of the learnt factor."""
        return {} if self.global_factor is None else {"global_factor": build_factor(self.options).data}

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Outputs `[B, T, E]`."""
        parts = (part(x).unflatten(2, (self.heads, -1)) for part in (self.query, self.key, self.value))
        mixer = Mixer(self.options, self.mixer, self.global_factor, self.dwconv, self.windowed)
        return mix_both_sides(mixer, *parts, real).flatten(2)


class LinJaxBertResidual(nn.Module):
    """A projection back into the residual stream, and the norm behind their sum."""

    def __init__(self, config: LinJaxBertConfig, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, inner: Tensor, x: Tensor) -> Tensor:
        """The stream after the layer."""
        return self.LayerNorm(x + self.dense(inner))


class LinJaxBertLayer(nn.Module):
    """One layer."""

    def __init__(self, config: LinJaxBertConfig, layer: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": LinJaxBertSelfAttention(config, layer),
                "output": LinJaxBertResidual(config, config.hidden_size),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = LinJaxBertResidual(config, config.intermediate_size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Outputs `[B, T, E]`."""
        x = self.attention["output"](self.attention["self"](x, real), x)
        return self.output(nn.functional.gelu(self.intermediate["dense"](x)), x)


class LinJaxBertEmbeddings(nn.Module):
    """Sums of word, position and type embeddings, normalised."""

    def __init__(self, config: LinJaxBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, words: Tensor, types: Tensor | None) -> Tensor:
        """Rows from their words' embeddings `[B, T, E]`."""
        if types is None:
            types = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        places = torch.arange(words.shape[1], device=words.device)
        return self.LayerNorm(words + self.token_type_embeddings(types) + self.position_embeddings(places))


class LinJaxBertPreTrainedModel(LinJaxPreTrainedModel):
    """Settings of transformers for encoders."""

    config_class = LinJaxBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["LinJaxBertLayer"]


class LinJaxBertModel(LinJaxBertPreTrainedModel):
    """The encoder.

    Args:
        config: its configuration.
        add_pooling_layer: whether it has a pooler.
    """

    def __init__(self, config: LinJaxBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = LinJaxBertEmbeddings(config)
        layers = nn.ModuleList(LinJaxBertLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = None
        if add_pooling_layer:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of words."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the embedding of words."""
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Hidden vectors `[B, T, E]` of the last layer and, with a pooler, of each row.

        Args:
            input_ids: `[B, T]` tokens.
            attention_mask: `[B, T]`, zero where a token may not be attended to.
            token_type_ids: `[B, T]` kinds of tokens; None is 0.
            inputs_embeds: `[B, T, E]` instead of tokens.
            output_hidden_states: return what enters every layer, too.
            kwargs: ignored.

        Raises:
            ValueError: there are no inputs, or two kinds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        words = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(words.shape[:2], device=words.device)
        passed = [self.embeddings(words, token_type_ids)]
        for layer in self.encoder["layer"]:
            passed.append(layer(passed[-1], attention_mask.bool()))
        pooled = None if self.pooler is None else self.pooler["dense"](passed[-1][:, 0]).tanh()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=passed[-1],
            pooler_output=pooled,
            hidden_states=tuple(passed) if output_hidden_states else None,
        )


class LinJaxBertForMaskedLM(LinJaxBertPreTrainedModel):
    """The encoder with a head for the token at each place."""

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}

    def __init__(self, config: LinJaxBertConfig) -> None:
        super().__init__(config)
        self.bert = LinJaxBertModel(config, add_pooling_layer=False)
        self.cls = nn.ModuleDict({"predictions": LinJaxBertPredictions(config)})
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which is the embedding of words."""
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        self.cls["predictions"].decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits `[B, T, V]` of every place's own token and, with labels, the mean cross entropy.

        Args:
            input_ids: as in `LinJaxBertModel.forward`, like the arguments that are not named here.
            attention_mask: zero where a token may not be attended to.
            labels: `[B, T]` tokens, -100 where there is no loss.
            kwargs: for the encoder.
        """
        outputs = self.bert(input_ids, attention_mask, **kwargs)
        logits = self.cls["predictions"](outputs.last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class LinJaxBertPredictions(nn.Module):
    """A transform of hidden vectors, and the head."""

    def __init__(self, config: LinJaxBertConfig) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, T, V]`."""
        x = self.transform["LayerNorm"](nn.functional.gelu(self.transform["dense"](x)))
        return self.decoder(x) + self.bias


class LinJaxBertForSequenceClassification(LinJaxBertPreTrainedModel):
    """The encoder with a linear head on its pooled vector."""

    def __init__(self, config: LinJaxBertConfig) -> None:
        super().__init__(config)
        self.bert = LinJaxBertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits `[B, L]` of the classes and, with labels, the mean cross entropy; of one class, the squared error.

        Args:
            input_ids: as in `LinJaxBertModel.forward`, like the arguments that are not named here.
            attention_mask: zero where a token may not be attended to.
            labels: `[B]` classes, or numbers where there is one class.
            kwargs: for the encoder.
        """
        outputs = self.bert(input_ids, attention_mask, **kwargs)
        logits, loss = self.classifier(outputs.pooler_output), None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits[:, 0], labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
