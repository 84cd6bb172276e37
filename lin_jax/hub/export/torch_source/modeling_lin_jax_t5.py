"""T5 with linear attention: an encoder, and a decoder that writes on a recurrent state; a classifier on both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqSequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from .attention_lin_jax import Mixer  # noqa: F401 - from a folder, transformers 4 copies what is named here, no more
from .both_sides_lin_jax import mix_both_sides  # noqa: F401
from .cache_lin_jax import LinJaxCache, given_state
from .causal_lm_lin_jax import STATE_FIELD, LinJaxDecodingModel, LinJaxForCausalLM, LinJaxModel
from .configuration_lin_jax import LinJaxT5Config
from .cross_attention_lin_jax import read  # noqa: F401
from .drafts_lin_jax import DraftHeads
from .int8_lin_jax import Int8Linear  # noqa: F401
from .linear_attention_lin_jax import LinearAttention  # noqa: F401
from .norms_lin_jax import LinJaxRMSNorm
from .other_attention_lin_jax import FullAttention  # noqa: F401
from .pretrained_lin_jax import LinJaxPreTrainedModel  # noqa: F401
from .recurrence_lin_jax import State
from .relative_bias_lin_jax import relative_bias  # noqa: F401
from .speculation_lin_jax import decode
from .t5_layers_lin_jax import (
    LinJaxT5DecoderLayer,
    LinJaxT5EncoderLayer,
    Places,
    bias_of,
    projection,
    scaled_start,
)
from .versions_lin_jax import require_version  # noqa: F401
from .windowed_attention_lin_jax import WindowedMemory  # noqa: F401


class LinJaxT5PreTrainedModel(LinJaxDecodingModel):
    """Settings of transformers for T5s."""

    config_class = LinJaxT5Config
    base_model_prefix = "transformer"
    _no_split_modules = ["LinJaxT5EncoderLayer", "LinJaxT5DecoderLayer"]


class LinJaxT5Encoder(LinJaxT5PreTrainedModel):
    """The encoder.

    Args:
        config: of the model.
        embedding: returns the model's embedding, which is no part of the encoder: it is in a file once.
    """

    def __init__(self, config: LinJaxT5Config, embedding: Callable[[], nn.Module]) -> None:
        super().__init__(config)
        self.get_input_embeddings = embedding
        self.block = nn.ModuleList(LinJaxT5EncoderLayer(config, layer) for layer in range(config.num_layers))
        self.final_layer_norm = LinJaxRMSNorm(config.d_model, config.layer_norm_epsilon)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden vectors `[B, S, E]`.

        Args:
            input_ids: `[B, S]` tokens.
            attention_mask: `[B, S]`, zero where a token may not be attended to; positions count whole rows.
            inputs_embeds: `[B, S, E]` instead of tokens.
            output_hidden_states: return what enters every layer, too.
            kwargs: ignored.

        Raises:
            ValueError: there are no inputs, or two kinds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        passed = [self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds]
        real = presence(passed[0], attention_mask)
        bias = bias_of(self.block[0].layer[0].SelfAttention.relative_attention_bias, self.config, both_sides=True)
        for layer in self.block:
            passed.append(layer(passed[-1], bias, real))
        encoded = self.final_layer_norm(passed[-1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutput(encoded, hidden_states=(*passed[:-1], encoded) if output_hidden_states else None)


class LinJaxT5Decoder(LinJaxT5PreTrainedModel, LinJaxModel):
    """The decoder: a causal language model of what follows encoded rows, which are part of its state.

    Args:
        config: of the model.
        embedding: as of the encoder.
    """

    def __init__(self, config: LinJaxT5Config, embedding: Callable[[], nn.Module]) -> None:
        super().__init__(config)
        self.get_input_embeddings = embedding
        self.block = nn.ModuleList(LinJaxT5DecoderLayer(config, layer) for layer in range(config.num_decoder_layers))
        self.final_layer_norm = LinJaxRMSNorm(config.d_model, config.layer_norm_epsilon)
        self.post_init()

    @property
    def attentions(self) -> list[dict[str, Any]]:
        """The attention that has a state."""
        return [self.config.attention["decoder"]]

    def layer_stack(self) -> nn.ModuleList:
        """The layers."""
        return self.block

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Places]:
        """Embeddings, the biases of distances, and the positions themselves."""
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        return x, Places(bias_of(table, self.config, both_sides=False), positions)

    def leave(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.final_layer_norm(x)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LinJaxCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: LinJaxCache | None = None,
        encoded: Tensor | None = None,
        encoded_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Vectors `[B, T, E]` that the head reads; arguments as in `LinJaxModel.forward`, and two more.

        Args:
            input_ids: `[B, T]` tokens that follow those in the cache.
            attention_mask: of the decoder's own tokens.
            past_key_values: the state after what came before.
            inputs_embeds: `[B, T, E]` instead of tokens.
            use_cache: whether to return the state.
            output_hidden_states: return what enters every layer, too.
            cache: the same as `past_key_values`.
            encoded: `[B, S, E]` the encoder's output; not needed on a state, which holds what is read of it.
            encoded_mask: `[B, S]`, zero where the encoder had no token.
            kwargs: a state is taken from here, too.

        Raises:
            ValueError: there are neither encoded rows nor a state.
        """
        given = given_state((cache, past_key_values), kwargs.values())
        kept = given is not None or self._keeps_state(use_cache)
        if given is None and encoded is None:
            raise ValueError("there is nothing to read; give input_ids, or encoder_outputs")
        state = LinJaxCache(len(self.block)) if given is None else given
        if state.position is None:
            real = presence(encoded, encoded_mask)
            mixer: State | None = {} if kept else None
            state.states = [{"source": layer.source(encoded, real), "mixer": mixer} for layer in self.block]
        options = {"use_cache": True, "output_hidden_states": output_hidden_states, "return_dict": True}
        outputs = LinJaxModel.forward(self, input_ids, attention_mask, state, inputs_embeds, **options)
        after = {STATE_FIELD: state} if kept else {}
        return BaseModelOutputWithPast(outputs.last_hidden_state, hidden_states=outputs.hidden_states, **after)


class LinJaxT5Model(LinJaxT5PreTrainedModel):
    """Embedding, encoder and decoder."""

    def __init__(self, config: LinJaxT5Config) -> None:
        super().__init__(config)
        self.shared = scaled_start(nn.Embedding(config.vocab_size, config.d_model), config, 1.0)
        stacks = LinJaxT5Encoder, LinJaxT5Decoder
        self.encoder, self.decoder = (stack(config, self.get_input_embeddings) for stack in stacks)
        self.add_head(config)
        self.post_init()

    def add_head(self, config: LinJaxT5Config) -> None:
        """Adds a reader of the decoder's vectors: none here."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the embedding."""
        self.shared = value

    def get_encoder(self, *args: Any, **kwargs: Any) -> LinJaxT5Encoder:
        """The encoder."""
        return self.encoder

    def get_decoder(self, *args: Any, **kwargs: Any) -> LinJaxT5Decoder:
        """The decoder."""
        return self.decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: LinJaxCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: LinJaxCache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Vectors `[B, T, E]` of the decoder.

        Args:
            input_ids: `[B, S]` tokens of the encoder.
            attention_mask: `[B, S]`, zero where the encoder has no token.
            decoder_input_ids: `[B, T]` tokens of the decoder, which follow those in the state.
            decoder_attention_mask: zero at the decoder's padding, on any side.
            encoder_outputs: the encoder's, instead of its tokens.
            past_key_values: the decoder's state after what came before, with what it reads of the encoder.
            inputs_embeds: `[B, S, E]` instead of the encoder's tokens.
            decoder_inputs_embeds: `[B, T, E]` instead of the decoder's.
            use_cache: whether to return the state.
            output_hidden_states: return what enters every layer, too.
            cache: the same as `past_key_values`, by its name since transformers 5.24.
            kwargs: a state is taken from here, too.

        Raises:
            ValueError: there is nothing to read: neither an encoder's input or output, nor a state.
        """
        state = given_state((cache, past_key_values), kwargs.values())
        if encoder_outputs is None and (input_ids is not None or inputs_embeds is not None):
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds, output_hidden_states, return_dict=True
            )
        encoded = None if encoder_outputs is None else encoder_outputs[0]
        outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            state,
            decoder_inputs_embeds,
            use_cache,
            output_hidden_states,
            encoded=encoded,
            encoded_mask=attention_mask,
            return_dict=True,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            encoder_last_hidden_state=encoded,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            **{STATE_FIELD: getattr(outputs, STATE_FIELD)},
        )


class LinJaxT5ForConditionalGeneration(LinJaxT5Model, LinJaxForCausalLM):
    """A text-to-text model."""

    _tied_weights_keys = {"lm_head.weight": "shared.weight"}

    def add_head(self, config: LinJaxT5Config) -> None:
        """Adds the head over the vocabulary."""
        self.lm_head = projection(config, config.d_model, config.vocab_size, 1.0)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        self.lm_head = value

    def read_by_head(self, x: Tensor) -> Tensor:
        """The vectors that the head reads, from those that leave the decoder."""
        return x * self.config.d_model**-0.5 if self.config.tie_word_embeddings else x

    def drafted_loop(self) -> Callable[..., Any]:
        """The loop of speculation, over the decoder."""
        return decode_with_source

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Inputs of the decoder that predicts labels: these, one place later; negative ones become padding."""
        return shifted(labels, self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: LinJaxCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: LinJaxCache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits `[B, T, V]` of the next token and, with labels, the mean cross entropy.

        Args:
            input_ids: as in `LinJaxT5Model.forward`, like the arguments that are not named here.
            attention_mask: `[B, S]`, zero where the encoder has no token.
            decoder_input_ids: `[B, T]` tokens of the decoder; with labels alone, these one place later.
            decoder_attention_mask: zero at the decoder's padding, on any side.
            encoder_outputs: the encoder's, instead of its tokens.
            past_key_values: the decoder's state.
            inputs_embeds: `[B, S, E]` instead of the encoder's tokens.
            decoder_inputs_embeds: `[B, T, E]` instead of the decoder's.
            labels: `[B, T]` tokens, -100 where there is no loss; they are not shifted.
            use_cache: whether to return the state.
            output_hidden_states: return what enters every layer, too.
            cache: the same as `past_key_values`, by its name since transformers 5.24.
            kwargs: a state is taken from here, too.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = shifted(labels, self.config)
        outputs = LinJaxT5Model.forward(
            self,
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            given_state((cache, past_key_values), kwargs.values()),
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        logits, loss = self.lm_head(self.read_by_head(outputs.last_hidden_state)), None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device))
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=outputs.decoder_hidden_states,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            **{STATE_FIELD: getattr(outputs, STATE_FIELD)},
        )


class LinJaxT5ForSequenceClassification(LinJaxT5PreTrainedModel):
    """Classes of texts: the decoder reads the text once more, and a head its vector at the last end token."""

    def __init__(self, config: LinJaxT5Config) -> None:
        super().__init__(config)
        self.transformer = LinJaxT5Model(config)
        size, deviation = config.d_model, config.d_model**-0.5
        parts = {"dense": nn.Linear(size, size), "out_proj": nn.Linear(size, config.num_labels)}
        self.classification_head = nn.ModuleDict(
            {name: scaled_start(part, config, deviation) for name, part in parts.items()}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqSequenceClassifierOutput:
        """Logits `[B, L]` of the classes and, with labels, the mean cross entropy; of one class, the squared error.

        Args:
            input_ids: `[B, S]` tokens. Where a row has no end token, its last token that is there stands for it.
            attention_mask: `[B, S]`, zero where there is no token.
            labels: `[B]` classes, or numbers where there is one class.
            kwargs: for the trunk.
        """
        outputs = self.transformer(
            input_ids, attention_mask, shifted(input_ids, self.config), use_cache=False, **kwargs
        )
        order = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        ends = torch.isin(input_ids, torch.tensor(self.config.eos_token_id, device=input_ids.device))
        real = torch.ones_like(ends) if attention_mask is None else attention_mask.bool()
        last = (torch.where(ends.any(1, keepdim=True), ends, real) * order).argmax(1)
        summary = outputs.last_hidden_state[torch.arange(len(last), device=last.device), last]
        logits, loss = self.classification_head["out_proj"](self.classification_head["dense"](summary).tanh()), None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits[:, 0], labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return Seq2SeqSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=outputs.decoder_hidden_states,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
        )


class Reading:
    """A T5's decoder as a language model of what follows encoded rows, in the form that speculation takes.

    Args:
        model: the T5.
        encoded: `[B, S, E]` the encoder's output.
        mask: `[B, S]`, zero where it had no token.
    """

    def __init__(self, model: LinJaxT5ForConditionalGeneration, encoded: Tensor | None, mask: Tensor | None) -> None:
        self.model, self.lm_head, self.device = model, model.lm_head, model.device
        self.source = {"encoded": encoded, "encoded_mask": mask}
        self.layer_stack, self.enter = model.decoder.layer_stack, model.decoder.enter
        self.get_input_embeddings = model.get_input_embeddings

    @property
    def base_model(self) -> "Reading":
        """The same."""
        return self

    def leave(self, x: Tensor) -> Tensor:
        """The vectors that the head reads, from those that leave the last layer."""
        return self.model.read_by_head(self.model.decoder.leave(x))

    def trunk(self, input_ids: Tensor, mask: Tensor | None, cache: LinJaxCache, **options: Any) -> Any:
        """The vectors that the head reads; arguments as in `LinJaxModel.forward`."""
        outputs = self.model.decoder(input_ids, mask, cache, **options, **self.source)
        return BaseModelOutputWithPast(self.model.read_by_head(outputs.last_hidden_state))

    def draft_heads(self) -> DraftHeads | None:
        """The Medusa heads in the model's folder; None without any."""
        return self.model.draft_heads()


def decode_with_source(model: LinJaxT5ForConditionalGeneration, *args: Any, **inputs: Any) -> Any:
    """Writes texts about encoded rows; arguments as in `decode`, and those of the encoder.

    None of these has a name here: `generate` would keep what is named from the encoder.
    """
    encoder_outputs, mask = inputs.pop("encoder_outputs", None), inputs.pop("attention_mask", None)
    reading = Reading(model, None if encoder_outputs is None else encoder_outputs[0], mask)
    return decode(reading, *args, attention_mask=inputs.pop("decoder_attention_mask", None), **inputs)


def shifted(labels: Tensor, config: LinJaxT5Config) -> Tensor:
    """Labels one place later, behind the first token of every text; negative ones become padding."""
    first = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    inputs = torch.cat([first, labels[:, :-1]], dim=1)
    return inputs.masked_fill(inputs < 0, config.pad_token_id)


def presence(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, S]` whether there is a token."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
