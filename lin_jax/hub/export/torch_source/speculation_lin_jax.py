"""Greedy text by speculation: several guessed tokens go through the model at once, and those that it would say stay.

A pass leaves the state as it was. Each layer notes what entered its token mixer, so that the state is taken on by the
tokens that stay alone, without a second pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from .cache_lin_jax import LinJaxCache, state_among
from .drafts_lin_jax import NGrams
from .recurrence_lin_jax import Rows, State

# Guesses of a pass: at first, at most.
FIRST, MOST = 4, 16


def refusal(input_ids: Tensor | None, config: Any, options: dict[str, Any]) -> str | None:
    """The reason why a text cannot be written by speculation; None if it can.

    Args:
        input_ids: `[B, T]` the text before.
        config: the generation's configuration.
        options: all other arguments of `generate`.
    """

    def given(*names: str) -> bool:
        return any(getattr(config, name, None) not in (None, False) for name in names)

    results = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    beams = (config.num_beams or 1) > 1
    reasons = {
        "it takes one prompt as input_ids": input_ids is None
        or input_ids.shape[0] != 1
        or options.get("inputs_embeds") is not None,
        "it is greedy; leave sampling and beams out": beams or given("do_sample", "penalty_alpha", "dola_layers"),
        "it writes one text; leave num_return_sequences out": (config.num_return_sequences or 1) > 1,
        "it drafts by itself; leave assistant_model and prompt_lookup_num_tokens out": given("prompt_lookup_num_tokens")
        or options.get("assistant_model") is not None,
        "it returns no scores, logits or hidden states; leave them out": given(*results),
        "it needs the state; leave use_cache out": config.use_cache is False,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **inputs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Writes one text; the loop that `generate` runs in place of its own.

    Args:
        model: a model with a head.
        input_ids: `[1, T]` the text before.
        logits_processor: of the scores of the next token.
        stopping_criteria: says after each token whether the text has ended.
        generation_config: of the text.
        synced_gpus: not heeded: each process writes its own text.
        streamer: is given every token.
        inputs: arguments of `forward`: the mask, and the state of a text that goes on.
    """
    del synced_gpus
    cache = state_among(inputs.values()) or LinJaxCache(len(model.base_model.layer_stack()))
    drafts = _Drafts(model, input_ids[0].tolist())
    ended, hidden = False, None
    while not ended:
        guesses = [] if hidden is None else drafts.next(hidden, _room(model, generation_config, input_ids, cache))
        if hidden is None:  # the text before, but what is in the state
            mask = inputs.get("attention_mask")
            left = model.trunk(input_ids[:, cache.length :], mask, cache, use_cache=True).last_hidden_state[:, -1:]
            commit = None
        else:
            left, commit = verify(model.base_model, [*input_ids[0, -1:].tolist(), *guesses], cache)
        logits, stayed = model.lm_head(left), []
        for place in range(logits.shape[1]):
            scores = logits_processor(input_ids, logits[:, place].to(torch.float32, copy=True))
            token = scores.argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            stayed.append(int(token))
            if streamer is not None:
                streamer.put(token.cpu())
            ended = bool(stopping_criteria(input_ids, None).all())
            if ended or place == len(guesses) or stayed[-1] != guesses[place]:
                break
        hidden = left[0, len(stayed) - 1]
        if commit is not None:
            commit(len(stayed))
        drafts.said(stayed)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    name = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
    return GenerateDecoderOnlyOutput(sequences=input_ids, **{name: cache})


def verify(model: Any, tokens: Sequence[int], cache: LinJaxCache) -> tuple[Tensor, Callable[[int], None]]:
    """Runs some tokens: the vectors `[1, N, E]` that the head reads, and a function that takes the first of them in.

    Args:
        model: without the head.
        tokens: that may follow those in the cache.
        cache: the state after them, which stays as it is until the function is called.
    """
    x = model.get_input_embeddings()(torch.tensor([tokens], device=model.device))
    position, count = cache.position, torch.tensor([len(tokens)], device=x.device)
    x, context = model.enter(x, position[:, None] + torch.arange(len(tokens), device=x.device))
    mixers: list[Callable[[Rows, State], tuple[Tensor, State]]] = []
    states = []
    for layer, before in zip(model.layer_stack(), cache.states, strict=True):
        x, state = layer(x, context, Rows(position, count, mixers), before)
        states.append(state)

    def commit(stay: int) -> None:
        if stay == len(tokens):
            cache.states = states
        else:
            rows = Rows(position, torch.tensor([stay], device=x.device))
            cache.states = [mix(rows, before)[1] for mix, before in zip(mixers, cache.states, strict=True)]
        cache.advance(torch.tensor([stay], device=x.device), stay)

    return model.leave(x), commit


class _Drafts:
    """Guesses for one text: its own earlier words, else heads; more of them while they are right."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self.ngrams, self.heads = NGrams(tokens), model.draft_heads()
        self.most = FIRST
        self.guesses: list[int] = []

    def next(self, hidden: Tensor, room: int) -> list[int]:
        """The guesses of a pass, after what the head read at the last token but one."""
        most = max(0, min(self.most, room))
        self.guesses = self.ngrams.draft(most)
        if not self.guesses and self.heads is not None:
            self.guesses = self.heads.draft(hidden, most)
        return self.guesses

    def said(self, tokens: list[int]) -> None:
        """Notes what the model said in a pass: the guesses that were right, and one more token."""
        self.ngrams.extend(tokens)
        if self.guesses:
            right = len(tokens) - 1
            self.most = min(MOST, 2 * self.most) if right == len(self.guesses) else max(2, right + 1)


def _room(model: Any, config: Any, input_ids: Tensor, cache: LinJaxCache) -> int:
    """Guesses that can still be said, the token after them being the last; and that have a position."""
    room = MOST if config.max_length is None else config.max_length - input_ids.shape[1] - 1
    table = getattr(model.base_model, "wpe", None)
    return room if table is None else min(room, table.num_embeddings - int(cache.position) - 1)
