"""Greedy text by speculation: several guessed tokens go through the model at once, and those that it would say stay.

A pass leaves the state as it was. Each layer notes what entered its token mixer, so that the state is taken on by the
tokens that stay alone, without a second pass. Rows of a batch have their own guesses, and take as many as are right.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from .cache_lin_jax import LinJaxCache, state_among
from .drafts_lin_jax import NGrams
from .recurrence_lin_jax import Rows, State

# Guesses of a pass: at first, at most.
FIRST, MOST = 4, 16
# Options that look at all rows at once, and their values that do nothing, which older versions have as defaults.
ACROSS = {
    "guidance_scale": 1,
    "watermarking_config": None,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
}


def refusal(input_ids: Tensor | None, config: Any, options: dict[str, Any]) -> str | None:
    """The reason why texts cannot be written by speculation; None if they can.

    Args:
        input_ids: `[B, T]` the texts before.
        config: the generation's configuration.
        options: all other arguments of `generate`.
    """

    def given(*names: str) -> bool:
        return any(getattr(config, name, None) not in (None, False) for name in names)

    def passed(*names: str) -> bool:
        return any(options.get(name) is not None for name in names)

    results = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    beams = (config.num_beams or 1) > 1
    several = input_ids is not None and input_ids.shape[0] > 1
    # Rows are looked at one by one, and end apart.
    across = next((name for name, off in ACROSS.items() if getattr(config, name, None) not in (None, off)), None)
    if passed("prefix_allowed_tokens_fn"):
        across = "prefix_allowed_tokens_fn"
    apart = given("stop_strings", "max_time") or passed("stopping_criteria")
    reasons = {
        "it takes prompts as input_ids": input_ids is None or options.get("inputs_embeds") is not None,
        "it is greedy; leave sampling and beams out": beams or given("do_sample", "penalty_alpha", "dola_layers"),
        "it writes one text of a prompt; leave num_return_sequences out": (config.num_return_sequences or 1) > 1,
        "it drafts by itself; leave assistant_model and prompt_lookup_num_tokens out": given("prompt_lookup_num_tokens")
        or options.get("assistant_model") is not None,
        "it returns no scores, logits or hidden states; leave them out": given(*results),
        "it needs the state; leave use_cache out": config.use_cache is False,
        "a streamer is for one prompt; give one": several and passed("streamer"),
        f"{across} is for one prompt; give one": several and across is not None,
        "texts of several prompts end at eos_token_id or a length; give one": several
        and apart
        and config.eos_token_id is None,
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
    """Writes texts; the loop that `generate` runs in place of its own. Each row has guesses of its own.

    Args:
        model: a model with a head.
        input_ids: `[B, T]` the texts before.
        logits_processor: of the scores of the next token; it is given row by row.
        stopping_criteria: says after each token whether the text has ended; likewise.
        generation_config: of the texts.
        synced_gpus: not heeded: each process writes its own texts.
        streamer: is given every token of the one text.
        inputs: arguments of `forward`: the mask, and the state of texts that go on.
    """
    del synced_gpus
    cache = state_among(inputs.values()) or LinJaxCache(len(model.base_model.layer_stack()))
    rows = range(input_ids.shape[0])
    rules = [_Rules(_of_row(logits_processor, row), stopping_criteria, streamer) for row in rows]
    texts = [_Text(tokens[None], _Drafts(model, tokens.tolist())) for tokens in input_ids]
    # The texts before, but what is in the state.
    mask = inputs.get("attention_mask")
    left = model.trunk(input_ids[:, cache.length :], mask, cache, use_cache=True).last_hidden_state[:, -1:]
    commit: Callable[[Sequence[int]], None] | None = None
    while True:
        logits = model.lm_head(left).to(torch.float32, copy=True)
        likeliest = None if logits_processor else logits.argmax(-1).tolist()
        stayed = [
            text.say(rules[row], logits[row], None if likeliest is None else likeliest[row])
            for row, text in enumerate(texts)
        ]
        if commit is not None:
            commit(stayed)
        if all(text.ended for text in texts):
            break
        for row, text in enumerate(texts):
            room = _room(model, generation_config, text.length, int(cache.position[row]))
            text.guess(left[row, stayed[row] - 1], room)
        left, commit = verify(model.base_model, [text.next_tokens for text in texts], cache)
    if streamer is not None:
        streamer.end()
    sequences = _padded(texts, generation_config)
    if not generation_config.return_dict_in_generate:
        return sequences
    behind = [row[text.length - 1 : -1] for row, text in zip(sequences.tolist(), texts, strict=True)]
    if any(behind):  # what has ended first has its padding in the state, as in a plain loop
        verify(model.base_model, behind, cache)[1]([len(row) for row in behind])
    cache.length = sequences.shape[1] - 1
    name = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
    return GenerateDecoderOnlyOutput(sequences=sequences, **{name: cache})


def verify(
    model: Any, tokens: Sequence[Sequence[int]], cache: LinJaxCache
) -> tuple[Tensor, Callable[[Sequence[int]], None]]:
    """Runs some tokens of each row: the vectors `[B, N, E]` that the head reads, and a function that takes tokens in.

    Args:
        model: without the head.
        tokens: of each row, that may follow those in the cache; rows may have different numbers of them, or none.
        cache: the state after them, which stays as it is until the function is called with the number of each row's
            tokens that stay. Its length is left to the caller.
    """
    longest = max(map(len, tokens))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=model.device)
    count = torch.tensor([len(row) for row in tokens], device=model.device)
    position, order = cache.position, torch.arange(longest, device=model.device)
    positions = torch.where(order < count[:, None], position[:, None] + order, 0)
    x, context = model.enter(model.get_input_embeddings()(padded), positions)
    mixers: list[Callable[[Rows, State], tuple[Tensor, State]]] = []
    states = []
    for layer, before in zip(model.layer_stack(), cache.states, strict=True):
        x, state = layer(x, context, Rows(position, count, mixers), before)
        states.append(state)

    def commit(stay: Sequence[int]) -> None:
        taken = torch.tensor(stay, device=count.device)
        if torch.equal(taken, count):
            cache.states = states
        else:
            rows = Rows(position, taken)
            cache.states = [mix(rows, before)[1] for mix, before in zip(mixers, cache.states, strict=True)]
        cache.advance(taken, 0)

    return model.leave(x), commit


@dataclass(frozen=True)
class _Rules:
    """What a row's token is chosen by, and whom it is told; as in `decode`."""

    processor: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: Any


class _Text:
    """One row's text.

    Args:
        tokens: `[1, T]` the text before.
        drafts: its guesses.
    """

    def __init__(self, tokens: Tensor, drafts: "_Drafts") -> None:
        self.tokens, self.drafts = tokens, drafts
        self.guesses: list[int] = []
        self.ended = False

    @property
    def length(self) -> int:
        """Tokens so far, padding before them included."""
        return self.tokens.shape[1]

    @property
    def next_tokens(self) -> list[int]:
        """What goes into the next pass: the last token and the guesses; nothing of a text that has ended."""
        return [] if self.ended else [int(self.tokens[0, -1]), *self.guesses]

    def guess(self, hidden: Tensor, room: int) -> None:
        """Guesses of the next pass, after what the head read at the last token but one."""
        self.guesses = [] if self.ended else self.drafts.next(hidden, room)

    def say(self, rules: _Rules, logits: Tensor, likeliest: Sequence[int] | None) -> int:
        """Adds the tokens of a pass: guesses as long as they are right, and one more; returns their number.

        Args:
            rules: what a token is chosen by.
            logits: `[N, V]` in float32, after the last token and after each guess.
            likeliest: token of each of the N, where nothing changes the scores.
        """
        if self.ended:
            return 0
        said: list[int] = []
        for place in range(len(self.guesses) + 1):
            if likeliest is None:
                token = int(rules.processor(self.tokens, logits[place][None]).argmax())
            else:
                token = likeliest[place]
            self.tokens = torch.cat([self.tokens, self.tokens.new_full((1, 1), token)], dim=1)
            said.append(token)
            if rules.streamer is not None:
                rules.streamer.put(torch.tensor([token]))
            self.ended = bool(rules.criteria(self.tokens, None).all())
            if self.ended or place == len(self.guesses) or token != self.guesses[place]:
                break
        self.drafts.said(said)
        return len(said)


def _of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors as one row needs them: repetition penalties know the length of each row's padding."""
    found = LogitsProcessorList()
    for each in processors:
        lengths = getattr(each, "prompt_ignore_length", None)
        if isinstance(lengths, Tensor) and lengths.dim():
            each = copy.copy(each)
            each.prompt_ignore_length = lengths[row : row + 1]
        found.append(each)
    return found


def _padded(texts: Sequence[_Text], config: Any) -> Tensor:
    """The texts `[B, T]`, padded on the right behind what has ended first."""
    longest, padding = max(text.length for text in texts), getattr(config, "_pad_token_tensor", None)
    value = 0 if padding is None else int(padding)
    return torch.cat([nn.functional.pad(text.tokens, (0, longest - text.length), value=value) for text in texts])


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


def _room(model: Any, config: Any, length: int, position: int) -> int:
    """Guesses that can still be said, the token after them being the last; and that have a position.

    Args:
        model: a model with a head.
        config: the generation's.
        length: tokens of the text.
        position: of them, those in the state.
    """
    room = MOST if config.max_length is None else config.max_length - length - 1
    table = getattr(model.base_model, "wpe", None)
    return room if table is None else min(room, table.num_embeddings - position - 1)
