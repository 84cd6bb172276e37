"""T5 with linear attention: an encoder, and a decoder that writes on a recurrent state; a classifier on both."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

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

from .attention_lin_jax import (
    AttentionOptions,
    Conventions,
    Mixer,
    build_attention,
    build_convolution,
    build_factor,
    build_window,
    mix_tokens,
)
from .both_sides_lin_jax import mix_both_sides
from .cache_lin_jax import LinJaxCache, given_state
from .causal_lm_lin_jax import STATE_FIELD, LinJaxDecodingModel, LinJaxForCausalLM, LinJaxModel
from .configuration_lin_jax import LinJaxT5Config
from .cross_attention_lin_jax import condense, read
from .drafts_lin_jax import NGrams  # noqa: F401 - from a folder, transformers 4 copies what is named here, no more
from .linear_attention_lin_jax import LinearAttention  # noqa: F401
from .norms_lin_jax import LinJaxRMSNorm
from .other_attention_lin_jax import FullAttention  # noqa: F401
from .pretrained_lin_jax import LinJaxPreTrainedModel  # noqa: F401
from .recurrence_lin_jax import Bias, Rows, State
from .relative_bias_lin_jax import relative_bias
from .speculation_lin_jax import decode  # noqa: F401
from .versions_lin_jax import require_version  # noqa: F401
from .windowed_attention_lin_jax import WindowedMemory  # noqa: F401

T5 = Conventions(unit_values=True, merged_norm=True, softmax_scale="one")


class Places(NamedTuple):
    """What all decoder layers need to know: the bias of distances, and the positions `[B, T]` of their tokens."""

    bias: Bias
    positions: Tensor


def random_values(shape: tuple[int, ...], deviation: float) -> dict[str, Tensor]:
    """Where a matrix of weights begins."""
    return {"weight": torch.randn(shape) * deviation}


def scaled_start(module: nn.Module, config: LinJaxT5Config, deviation: float) -> Any:
    """A layer whose weights begin with a standard deviation, times the model's factor."""
    module.initial_values = partial(random_values, module.weight.shape, config.initializer_factor * deviation)
    return module


def projection(config: LinJaxT5Config, size_in: int, size_out: int, deviation: float) -> nn.Linear:
    """A linear layer without bias."""
    return scaled_start(nn.Linear(size_in, size_out, bias=False), config, deviation)


class LinJaxT5Attention(nn.Module):
    """Projections around a token mixer.

    Args:
        config: of the model.
        part: which of its attentions: encoder, decoder or cross.
        layer: number of the layer, from 0; the first has the biases of all layers.
    """

    def __init__(self, config: LinJaxT5Config, part: str, layer: int) -> None:
        super().__init__()
        size, self.heads, self.head_dim = config.d_model, config.num_heads, config.d_kv
        inner = self.heads * self.head_dim
        self.q = projection(config, size, inner, (size * self.head_dim) ** -0.5)
        self.k = projection(config, size, inner, size**-0.5)
        self.v = projection(config, size, inner, size**-0.5)
        self.o = projection(config, inner, size, inner**-0.5)
        self.options = AttentionOptions.of(config.attention[part], layer, T5)
        if part == "cross":  # A source has no window, and values that are read have no neighbours.
            self.options = replace(self.options, convolution=False, window=False)
        heads = {"heads": self.heads, "kv_heads": self.heads}
        self.mixer = build_attention(self.options, self.head_dim, layer, **heads)
        self.windowed = build_window(self.options, self.head_dim, **heads)
        self.alpha = build_factor(self.options)
        self.dwconv = build_convolution(self.options, self.heads)
        self.relative_attention_bias = None
        if part != "cross" and layer == 0:
            table = nn.Embedding(config.relative_attention_num_buckets, self.heads)
            self.relative_attention_bias = scaled_start(table, config, size**-0.5)

    def initial_values(self) -> dict[str, Tensor]:
        """The start of the learnt factor."""
        return {} if self.alpha is None else {"alpha": build_factor(self.options).data}

    def split(self, part: nn.Linear, x: Tensor) -> Tensor:
        """Projections `[B, T, H, D]` by heads."""
        return part(x).unflatten(2, (self.heads, self.head_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, T, H, D]` of tokens that read each other."""
        return self.split(self.q, x), self.split(self.k, x), self.split(self.v, x)

    def mixing(self, bias: Bias | None = None) -> Mixer:
        """What mixes."""
        return Mixer(self.options, self.mixer, self.alpha, self.dwconv, self.windowed, bias)


class LinJaxT5FeedForward(nn.Module):
    """`wo(relu(wi(x)))`, or `wo(gelu(wi_0(x)) * wi_1(x))` with GELU by tanh."""

    def __init__(self, config: LinJaxT5Config) -> None:
        super().__init__()
        size, inner = config.d_model, config.d_ff
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, projection(config, size, inner, size**-0.5))
        self.wo = projection(config, inner, size, inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to every token."""
        if self.gated:
            return self.wo(nn.functional.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(self.wi(x).relu())


class LinJaxT5SubLayer(nn.Module):
    """A part of a layer, under its name, and the norm before it."""

    def __init__(self, config: LinJaxT5Config, name: str, part: nn.Module) -> None:
        super().__init__()
        setattr(self, name, part)
        self.layer_norm = LinJaxRMSNorm(config.d_model, config.layer_norm_epsilon)


class LinJaxT5EncoderLayer(nn.Module):
    """One encoder layer."""

    def __init__(self, config: LinJaxT5Config, layer: int) -> None:
        super().__init__()
        attention = LinJaxT5SubLayer(config, "SelfAttention", LinJaxT5Attention(config, "encoder", layer))
        self.layer = nn.ModuleList([attention, LinJaxT5SubLayer(config, "DenseReluDense", LinJaxT5FeedForward(config))])

    def forward(self, x: Tensor, bias: Bias, real: Tensor) -> Tensor:
        """Outputs `[B, S, E]`."""
        first, last = self.layer
        attention = first.SelfAttention
        mixed = mix_both_sides(attention.mixing(bias), *attention.project(first.layer_norm(x)), real)
        x = x + attention.o(mixed.flatten(2))
        return x + last.DenseReluDense(last.layer_norm(x))


class LinJaxT5DecoderLayer(nn.Module):
    """One decoder layer. Its state holds what it reads of the encoder, under `source`, beside its mixer's."""

    def __init__(self, config: LinJaxT5Config, layer: int) -> None:
        super().__init__()
        parts = {
            "SelfAttention": LinJaxT5Attention(config, "decoder", layer),
            "EncDecAttention": LinJaxT5Attention(config, "cross", layer),
            "DenseReluDense": LinJaxT5FeedForward(config),
        }
        self.layer = nn.ModuleList(LinJaxT5SubLayer(config, name, part) for name, part in parts.items())

    def source(self, encoded: Tensor, real: Tensor) -> State:
        """The memory of an encoder's output `[B, S, E]`, of which the mask `[B, S]` says what is there."""
        attention = self.layer[1].EncDecAttention
        return condense(
            attention.mixing(), attention.split(attention.k, encoded), attention.split(attention.v, encoded), real
        )

    def forward(self, x: Tensor, context: Places, rows: Rows, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, T, E]`, and the state after them: of the mixer's, None stays None."""
        own, cross, last = self.layer
        attention, source = own.SelfAttention, state["source"]
        inputs = attention.project(own.layer_norm(x))
        if rows.mixers is not None:
            rows.mixers.append(partial(self.mix, context.bias, inputs))
        mixed, after = self.mix(context.bias, inputs, Rows(rows.position, rows.count), state)
        x = x + attention.o(mixed.flatten(2))

        attention = cross.EncDecAttention
        queries = attention.split(attention.q, cross.layer_norm(x))
        found = read(attention.mixing(), queries, context.positions, source)
        x = x + attention.o(found.flatten(2))
        return x + last.DenseReluDense(last.layer_norm(x)), after

    def mix(self, bias: Bias, inputs: tuple[Tensor, Tensor, Tensor], rows: Rows, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, T, H, D]` of the token mixer, and the layer's state after these tokens."""
        mixed, after = mix_tokens(self.layer[0].SelfAttention.mixing(bias), *inputs, rows, state["mixer"])
        return mixed, {"source": state["source"], "mixer": after}


def bias_of(table: nn.Embedding, config: LinJaxT5Config, *, both_sides: bool) -> Bias:
    """The biases of distances in all layers of a stack."""
    most, heads = config.relative_attention_max_distance, config.num_heads
    return lambda distances: relative_bias(table.weight, distances, most, heads, both_sides=both_sides)


class LinJaxT5PreTrainedModel(LinJaxDecodingModel):
    """Settings of transformers for T5s."""

    config_class = LinJaxT5Config
    base_model_prefix = "transformer"
    _no_split_modules = ["LinJaxT5EncoderLayer", "LinJaxT5DecoderLayer"]


class _ReadsShared:
    """A stack that reads the embedding of its model, of which it is no part: the embedding is in a file once."""

    def read_from(self, embedding: Callable[[], nn.Embedding]) -> None:
        """Names the embedding, by a function."""
        vars(self)["_embedding"] = embedding

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of the model."""
        return vars(self)["_embedding"]()


class LinJaxT5Encoder(_ReadsShared, LinJaxT5PreTrainedModel):
    """The encoder."""

    def __init__(self, config: LinJaxT5Config) -> None:
        super().__init__(config)
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


class LinJaxT5Decoder(_ReadsShared, LinJaxT5PreTrainedModel, LinJaxModel):
    """The decoder: a causal language model of what follows encoded rows, which are part of its state."""

    def __init__(self, config: LinJaxT5Config) -> None:
        super().__init__(config)
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
        self.encoder, self.decoder = LinJaxT5Encoder(config), LinJaxT5Decoder(config)
        for stack in (self.encoder, self.decoder):
            stack.read_from(self.get_input_embeddings)
        self.post_init()

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

    def __init__(self, config: LinJaxT5Config) -> None:
        super().__init__(config)
        self.lm_head = projection(config, config.d_model, config.vocab_size, 1.0)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        self.lm_head = value

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
        hidden = outputs.last_hidden_state
        logits, loss = (
            self.lm_head(hidden * self.config.d_model**-0.5 if self.config.tie_word_embeddings else hidden),
            None,
        )
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


def shifted(labels: Tensor, config: LinJaxT5Config) -> Tensor:
    """Labels one place later, behind the first token of every text; negative ones become padding."""
    first = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    inputs = torch.cat([first, labels[:, :-1]], dim=1)
    return inputs.masked_fill(inputs < 0, config.pad_token_id)


def presence(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, S]` whether there is a token."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
