"""What the language models here share: padding, the states of layers, and the interface of transformers.

Padding never enters a state, and positions count real tokens: inside the model the real tokens of each row stand in
front, whatever side the padding was on.
"""

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_lin_jax import LinJaxCache, given_state, state_among
from .drafts_lin_jax import DraftHeads
from .pretrained_lin_jax import LinJaxPreTrainedModel
from .recurrence_lin_jax import Rows
from .speculation_lin_jax import decode, refusal
from .versions_lin_jax import lost_state_message, warn_if_untried

# What outputs call the state, and `generate` looks for: `past_key_values` until transformers 5.23, then `cache`.
STATE_FIELD = "cache" if "cache" in {each.name for each in fields(CausalLMOutputWithPast)} else "past_key_values"


class LinJaxDecodingModel(LinJaxPreTrainedModel):
    """Settings of transformers for models that decode on a recurrent state."""

    _is_stateful = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class LinJaxModel(LinJaxDecodingModel):
    """A stack of decoder layers; a subclass says how tokens enter and leave it."""

    def layer_stack(self) -> nn.ModuleList:
        """The layers; each of them maps `(x, context, rows, state)` to `(x, state)`."""
        raise NotImplementedError

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """What enters the first layer, from embeddings `[B, T, E]`, and what all layers need to know of positions."""
        raise NotImplementedError

    def leave(self, x: Tensor) -> Tensor:
        """What the head reads, from what leaves the last layer."""
        raise NotImplementedError

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """What the head reads, `[B, T, E]`.

        Args:
            input_ids: `[B, T]` tokens that follow those in the cache.
            attention_mask: `[B, T]`, or longer by what is in the cache: zero at padding, on any side.
            past_key_values: the state after what came before.
            inputs_embeds: `[B, T, E]` instead of tokens.
            use_cache: whether to return the state. None is what the configuration says, but no state in training, nor
                for yoso, whose state samples what is an expectation without one.
            output_hidden_states: return what enters every layer, too.
            cache: the same as `past_key_values`, by its name since transformers 5.24.
            kwargs: a state is taken from here, too; all else is ignored, as positions follow from the mask.

        Raises:
            TypeError: the state is none of this model's.
            ValueError: there are no inputs, or two kinds; or the mask is longer than the state and the tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        cache = given_state((cache, past_key_values), kwargs.values())
        padding = _Padding(x, attention_mask, before=0 if cache is None else cache.length)
        if cache is None and self._keeps_state(use_cache):
            cache = LinJaxCache(len(self.layer_stack()))
        *entered, left = self._run(padding, x, cache)
        x = padding.restored(self.leave(left))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = (*map(padding.restored, entered), x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **{STATE_FIELD: cache})

    @property
    def attentions(self) -> list[dict[str, Any]]:
        """The attentions that have a state."""
        given = self.config.attention
        return given if isinstance(given, list) else [given]

    def _keeps_state(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            samples = any(each["name"].startswith("yoso") for each in self.attentions)
            return self.config.use_cache and not self.training and not samples
        return use_cache

    def _run(self, padding: "_Padding", x: Tensor, cache: LinJaxCache | None) -> list[Tensor]:
        """What enters every layer, and what leaves the last; the cache is taken on."""
        count = padding.real.sum(1)
        position = torch.zeros_like(count) if cache is None or cache.position is None else cache.position
        order = torch.arange(x.shape[1], device=x.device)
        positions = torch.where(order < count[:, None], position[:, None] + order, 0)
        x, context = self.enter(padding.to_back(x), positions)
        passed = [x]
        for number, layer in enumerate(self.layer_stack()):
            x, state = layer(x, context, Rows(position, count), None if cache is None else cache.states[number])
            passed.append(x)
            if cache is not None:
                cache.states[number] = state
        if cache is not None:
            cache.advance(count, x.shape[1])
        return passed


class LinJaxForCausalLM(LinJaxDecodingModel, GenerationMixin):
    """A model and a head."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LinJaxCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: LinJaxCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, V]` of the next token and, with labels, the mean cross entropy.

        Args:
            input_ids: as in `LinJaxModel.forward`, like the arguments that are not named here.
            attention_mask: zero at padding, on any side.
            past_key_values: the state after what came before.
            inputs_embeds: `[B, T, E]` instead of tokens.
            labels: `[B, T]` the tokens themselves, -100 where there is no loss; they are shifted here.
            use_cache: whether to return the state.
            output_hidden_states: return what enters every layer, too.
            logits_to_keep: how many positions from the end to compute logits for, or which; 0 is all.
            cache: the same as `past_key_values`, by its name since transformers 5.24.
            kwargs: for the loss; a state is taken from here, too.
        """
        outputs = self.trunk(
            input_ids,
            attention_mask,
            given_state((cache, past_key_values), kwargs.values()),
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        state = {STATE_FIELD: getattr(outputs, STATE_FIELD)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **state)

    def trunk(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """The vectors that the head reads; arguments are those of `LinJaxModel.forward`."""
        return self.base_model(*args, **kwargs)

    # What it takes differs between versions, and `generate` looks at the names.
    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of `forward` in the next step of `generate`.

        Raises:
            RuntimeError: they leave out a part of the text that is not in the state.
        """
        warn_if_untried(transformers.__version__)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        state, ids = state_among(inputs.values()), inputs.get("decoder_input_ids", inputs.get("input_ids"))
        given = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        kept, total = 0 if state is None else state.length, input_ids.shape[1]
        mask = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" in inputs and given == total > kept > 0 and (mask is None or mask.shape[1] == total):
            # Of a decoder's text without a mask, transformers 5 leaves what the state has consumed.
            inputs["decoder_input_ids"] = ids[:, kept:]
        if given + kept < total:
            raise RuntimeError(lost_state_message(given, kept, total, transformers.__version__))
        return inputs

    def generate_with_drafts(self, inputs: Tensor | None = None, *args: Any, speculative: bool, **options: Any) -> Any:
        """Texts as `generate` writes them, on demand with several guessed tokens in each pass, which are verified.

        Args:
            inputs: tokens `[B, T]`; also as `input_ids`.
            args: more arguments of `generate` by their place.
            speculative: whether to guess. Texts are the greedy ones, token for token.
            options: more arguments of `generate` by name.

        Raises:
            ValueError: another text than the greedy one of each prompt is asked for.
        """
        plain = super().generate
        if not speculative:
            return plain(inputs, *args, **options)
        tokens = options.get("input_ids") if inputs is None else inputs
        config = copy.deepcopy(options.get("generation_config") or self.generation_config)
        config.update(**options)
        reason = "it takes what generate takes by name" if args else refusal(tokens, config, options)
        if reason is not None:
            raise ValueError(f"no speculation: {reason}, or leave speculative out")
        # A loop of one's own is not handed the streamer.
        loop = partial(self.drafted_loop(), streamer=options.get("streamer"))
        return plain(inputs, custom_generate=loop, **options)

    def drafted_loop(self) -> Callable[..., Any]:
        """The loop that writes a text by speculation."""
        return decode

    def draft_heads(self) -> DraftHeads | None:
        """The Medusa heads in the model's folder, which are read once; None without any."""
        if "_draft_heads" not in vars(self):
            vars(self)["_draft_heads"] = DraftHeads.beside(self)
        return vars(self)["_draft_heads"]


class _Padding:
    """Which tokens of a batch are padding, and the way of all others to the front of their rows and back.

    Args:
        x: `[B, T, ...]`.
        attention_mask: as in `LinJaxModel.forward`.
        before: tokens that the state holds.

    Raises:
        ValueError: the mask is of more tokens than these, or of fewer.
    """

    def __init__(self, x: Tensor, attention_mask: Tensor | None, before: int = 0) -> None:
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; give [batch, tokens]")
        if attention_mask is not None and attention_mask.shape[1] > x.shape[1] + before:
            raise ValueError(
                f"attention_mask is of {attention_mask.shape[1]} tokens, but {x.shape[1]} came with a state of "
                f"{before}; give the state that an earlier call returned"
            )
        if attention_mask is None:
            self.real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            self.real = attention_mask[:, -x.shape[1] :].bool().to(x.device)
        self.order = (~self.real).int().argsort(dim=1, stable=True)

    def to_back(self, x: Tensor) -> Tensor:
        """Rows `[B, T, E]` with all padding behind."""
        return x.take_along_dim(self.order[..., None], dim=1)

    def restored(self, x: Tensor) -> Tensor:
        """Rows as they were given, zero at padding."""
        return x.take_along_dim(self.order.argsort(dim=1)[..., None], dim=1).masked_fill(~self.real[..., None], 0)
