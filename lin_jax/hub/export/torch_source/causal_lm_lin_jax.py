"""What the language models here share: padding, the states of layers, and the interface of transformers.

Padding never enters a state, and positions count real tokens: inside the model the real tokens of each row stand in
front, whatever side the padding was on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_lin_jax import LinJaxCache
from .recurrence_lin_jax import Rows


class LinJaxPreTrainedModel(PreTrainedModel):
    """Settings of transformers for models that decode on a recurrent state."""

    supports_gradient_checkpointing = False
    _is_stateful = True
    _keep_in_fp32_modules_strict = [r"\.projection$"]  # random directions: rounded ones give other features
    _skip_keys_device_placement = ["past_key_values"]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initial_values"):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)


class LinJaxModel(LinJaxPreTrainedModel):
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """What the head reads, `[B, T, E]`.

        Args:
            input_ids: `[B, T]` tokens that follow those in the cache.
            attention_mask: `[B, T]`, or longer by what is in the cache: zero at padding, on any side.
            past_key_values: what came before.
            inputs_embeds: `[B, T, E]` instead of tokens.
            use_cache: whether to return the state. None is what the configuration says, but no state in training, nor
                for yoso, whose state samples what is an expectation without one.
            output_hidden_states: return what enters every layer, too.
            kwargs: ignored; positions follow from the mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is None and self._keeps_state(use_cache):
            cache = LinJaxCache(len(self.layer_stack()))
        padding = _Padding(x, attention_mask)
        *entered, left = self._run(padding, x, cache)
        x = padding.restored(self.leave(left))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = (*map(padding.restored, entered), x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache, hidden_states=hidden_states)

    def _keeps_state(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            samples = self.config.attention["name"].startswith("yoso")
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


class LinJaxForCausalLM(LinJaxPreTrainedModel, GenerationMixin):
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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, V]` of the next token and, with labels, the mean cross entropy.

        Args:
            input_ids: as in `LinJaxModel.forward`, like the arguments that are not named here.
            attention_mask: zero at padding, on any side.
            past_key_values: what came before.
            inputs_embeds: `[B, T, E]` instead of tokens.
            labels: `[B, T]` the tokens themselves, -100 where there is no loss; they are shifted here.
            use_cache: whether to return the state.
            output_hidden_states: return what enters every layer, too.
            logits_to_keep: how many positions from the end to compute logits for, or which; 0 is all.
            kwargs: for the loss.
        """
        outputs = self.base_model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class _Padding:
    """Which tokens of a batch are padding, and the way of all others to the front of their rows and back.

    Args:
        x: `[B, T, ...]`.
        attention_mask: as in `LinJaxModel.forward`.
    """

    def __init__(self, x: Tensor, attention_mask: Tensor | None) -> None:
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; give [batch, tokens]")
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
