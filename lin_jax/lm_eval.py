"""Models of this package in EleutherAI's lm-evaluation-harness: `lm_eval run --model lin_jax`.

The harness finds the class by the entry point `lm_eval.models`, in versions that look for such; importing this module,
as `python -m lin_jax lm-eval` does, registers it with any. Texts are tokenized, cut and scored as by the harness's own
`hf` model, so that figures compare. What requests share, such as few-shot examples, is read once, and answers are
written with lossless speculation.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from lin_jax.data import Tokenizer
from lin_jax.data.tokenizers.tokenizer import whole_characters
from lin_jax.decoding import Generator, Sampling
from lin_jax.decoding.scoring import ContinuationScorer, PrefixGroup, shared_prefix_groups
from lin_jax.errors import UserError
from lin_jax.hub.sizes import context_length, parameter_count
from lin_jax.progress_bar import progress_bar
from lin_jax.session import PREFILL_CHUNK, SAME_BITS_CHUNK, Session
from lin_jax.training.checkpoint.selector import parse_selector

try:
    # The harness registers its own models only while it knows none.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("lm-eval is not installed; install it with 'pip install lin-jax[eval]'") from error

log = logging.getLogger(__name__)

# Where neither the model nor the caller says more, as in the harness's own models.
DEFAULT_LENGTH, DEFAULT_NEW_TOKENS = 2048, 256
# Texts that are read at a time where the batch size is "auto", at the most; and answers of a group, at the least.
LARGEST_BATCH, SMALLEST_GROUP = 64, 4
# Prompts that are tokenized at once: each keeps more than its ids meanwhile.
ENCODED_AT_ONCE = 256
# Names by which tasks limit the tokens of an answer, the first that is there counts; and what chooses tokens.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Options of Hugging Face's `generate` that change nothing here.
IGNORED = ("use_cache", "num_return_sequences", "pad_token_id")


class _Writing(NamedTuple):
    """Options of answers, the same for all that are written together."""

    stops: tuple[str, ...]
    new_tokens: int
    sampling: Sampling


@register_model("lin_jax")
class LinJaxLM(TemplateLM):
    """A causal model of this package, as the harness asks for it.

    Args:
        pretrained: run folder, Hugging Face folder, `hub:OWNER/NAME`, or file of llama2.c.
        tokenizer: folder or file of the tokenizer, for a file of llama2.c.
        step: checkpoint of a run: a number, or best; None takes the newest.
        heads: folder of draft heads; None takes those in the model's own folder.
        drafter: none writes answers token by token; ngram guesses from the text so far; auto from what there is, by
            what pays; or a drafter of `decode`. The answers are the same.
        dtype: type that is computed in: float32, bfloat16 or float64; None is the stored one, but float32 for bfloat16
            on a CPU.
        weights: stored keeps their type; int8 rounds those of all linear layers, of the head and of the table of
            tokens.
        same_bits: add up in one order, so that batches and drafts change no bit.
        batch_size: texts at a time, or auto: as many as fit, `max_batch_size` at the most.
        max_batch_size: of auto.
        max_length: longest text in tokens; longer ones lose their beginning. None is what the model was trained for.
        max_gen_toks: tokens of an answer where the task does not say.
        shared_prefixes: read what requests share once; False reads every request from its beginning.
        add_bos_token: whether texts begin with the tokenizer's own special tokens; None is as the tokenizer has it.
        prefix_token_id: token before a text without a context; None is the one that begins a text, or else ends one.
        seed: of sampled answers.
        device: what the harness passes on; JAX computes where JAX_PLATFORMS says.
        trust_remote_code: no code is ever read from a folder.

    Raises:
        UserError: there is no such model, or an option has a wrong value.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        step: int | str | None = None,
        heads: str | None = None,
        drafter: str = "auto",
        dtype: str | None = None,
        weights: str = "stored",
        same_bits: bool = False,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_NEW_TOKENS,
        shared_prefixes: bool = True,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained = str(pretrained)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.session = Session.load(
            pretrained,
            () if heads is None else heads,
            step=parse_selector(step) if isinstance(step, str) else step,
            tokenizer=tokenizer,
            dtype=None if dtype == "auto" else dtype,
            weights=weights,
            same_bits=same_bits,
        )
        self.drafter = drafter
        self.max_length = _max_length(max_length, self.session.model.config)
        self.max_gen_toks = int(max_gen_toks)
        self.shared_prefixes = shared_prefixes
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self.seed = seed
        # A tokenizer looks through its whole vocabulary for its size: once is enough.
        self._limited = self.session.tokenizer.within(self.session.model.config.vocab_size)
        self._generators: dict[tuple[tuple[str, ...], int], Generator] = {}
        self._scorer = ContinuationScorer(
            self.session.model,
            batch_size=self.batch_size,
            chunk_size=SAME_BITS_CHUNK if same_bits else PREFILL_CHUNK,
            share=shared_prefixes,
        )
        if device is not None and {"cuda": "gpu"}.get(device.partition(":")[0], device) != jax.default_backend():
            log.warning("device %s is not heeded: JAX computes on %s", device, jax.default_backend())

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.session.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's cache of requests."""
        return self.pretrained.replace("/", "__")

    @property
    def eot_token_id(self) -> int | None:
        """Token that ends a text; None if there is none."""
        known: int | None = self.tokenizer.eos_id
        return known

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without a context.

        Raises:
            UserError: there is none.
        """
        for token in (self._prefix_token_id, self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token is not None:
                return int(token)
        raise UserError("the tokenizer has no token to begin a text with; give one with prefix_token_id=N")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether it begins with what the tokenizer puts there; None is as in the tokenizer, but
                not if the text spells it out.
            options: of other models, which are not needed here.
        """
        if add_special_tokens is None:
            add_special_tokens = self._begins(string)
        return self._ids(
            [self.tokenizer.backend.encode(whole_characters(string), add_special_tokens=add_special_tokens)]
        )[0]

    def _encoded(self, strings: Sequence[str]) -> list[list[int]]:
        """Token ids of some texts, as `tok_encode` has them, on all processor cores."""
        found: list[list[int]] = [[]] * len(strings)
        for begins in (True, False):
            numbers = [number for number, each in enumerate(strings) if self._begins(each) is begins]
            for first in range(0, len(numbers), ENCODED_AT_ONCE):
                some = numbers[first : first + ENCODED_AT_ONCE]
                texts = [whole_characters(strings[number]) for number in some]
                encoded = self._ids(self.tokenizer.backend.encode_batch(texts, add_special_tokens=begins))
                for number, ids in zip(some, encoded, strict=True):
                    found[number] = ids
        return found

    def _begins(self, string: str) -> bool:
        """True if a text gets the tokens that the tokenizer puts before it, which it does not spell out itself."""
        spelled = self._begin_text is not None and string.startswith(self._begin_text)
        return not spelled and self.add_bos_token is not False

    @cached_property
    def _begin_text(self) -> str | None:
        begins = (self._prefix_token_id, self.tokenizer.bos_id, self.tokenizer.eos_id)
        begin = next((token for token in begins if token is not None), None)
        return None if begin is None else self.tok_decode([begin], skip_special_tokens=False)

    def _ids(self, encoded: Sequence[Any]) -> list[list[int]]:
        """Ids of encoded texts; refuses those beyond what the model knows."""
        found = [list(each.ids) for each in encoded]
        for ids in found:
            self._limited.check(np.asarray(ids, np.int32))
        return found

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of `max_length` tokens that do not overlap."""
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            tokens = self.tok_encode(text)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows += map(make_disjoint_window, rolling)
            counts.append(len(windows))
        scores = self._scored(windows, disable_tqdm)
        sums = np.concatenate([[0.0], np.cumsum([score for score, _ in scores])])[[0, *counts]]
        found = [float(each) for each in np.diff(sums)]
        for request, each in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, each)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding writes them; requests come tokenized."""
        longest = max((len(each) for _, _, each in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"an answer has {longest} tokens, max_length is {self.max_length}; give a larger one")
        found = self._scored([(context, each) for _, context, each in requests], disable_tqdm)
        for (texts, _, _), each in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, each)
        return found

    def _scored(self, requests: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        # The last token is not read: one more than the model's length fits.
        cut = [(context[-(self.max_length + 1 - len(each)) :], each) for context, each in requests]
        _say_cut(sum(len(one[0]) < len(other[0]) for one, other in zip(cut, requests, strict=True)), self.max_length)
        with progress_bar(shown=not quiet, total=len(cut), desc="scoring", unit="request") as bar:
            scores = self._scorer.score(cut, bar.update)
        return [(float(np.sum(each.log_probs, dtype=np.float64)), bool(each.greedy.all())) for each in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, each up to its first stop string, without it."""
        found = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        with progress_bar(shown=not disable_tqdm, total=len(requests), desc="writing", unit="answer") as bar:
            for numbers in kinds.values():
                writing = self._writing(requests[numbers[0]].args[1])
                for place, text in self._written([requests[each].args[0] for each in numbers], writing):
                    request = requests[numbers[place]]
                    found[numbers[place]] = text
                    self.cache_hook.add_partial("generate_until", request.args, text)
                    bar.update()
        return found

    def _writing(self, given: dict[str, Any]) -> _Writing:
        """Options of answers from a task's `generation_kwargs`."""
        options = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
        until = options.pop("until", [])
        stops = [until] if isinstance(until, str) else list(until)
        limits = [options.pop(name) for name in LIMITS if name in options]
        new_tokens = int(limits[0]) if limits else self.max_gen_toks
        sampled = options.pop("do_sample", float(options.get("temperature", 0)) > 0)
        chosen = {name: options.pop(name) for name in SAMPLING if name in options}
        if options:
            known = ", ".join(["until", *LIMITS, "do_sample", *SAMPLING])
            raise UserError(f"generation option '{next(iter(options))}' is unknown; choose among {known}")
        penalty = {name: chosen[name] for name in ("repetition_penalty",) if name in chosen}
        sampling = Sampling(**({"temperature": 1.0} | chosen)) if sampled else Sampling(**penalty)
        if not 0 < new_tokens < self.max_length:
            raise UserError(
                f"an answer of {new_tokens} tokens leaves no room for a prompt in max_length {self.max_length}; "
                "give another max_gen_toks, or a larger max_length"
            )
        return _Writing(tuple(each for each in stops if each), new_tokens, sampling)

    def _written(self, prompts: Sequence[str], writing: _Writing) -> Iterator[tuple[int, str]]:
        """Yields number and answer of each prompt; those that begin alike are written together."""
        room = self.max_length - writing.new_tokens
        whole = [ids or [self.prefix_token_id] for ids in self._encoded(prompts)]
        _say_cut(sum(len(each) > room for each in whole), room)
        encoded = [each[-room:] for each in whole]
        smallest = min(self.batch_size, SMALLEST_GROUP)
        for group in shared_prefix_groups(encoded, smallest=smallest, share=self.shared_prefixes):
            yield from self._group_written(encoded, group, writing)

    def _group_written(
        self, encoded: Sequence[list[int]], group: PrefixGroup, writing: _Writing
    ) -> Iterator[tuple[int, str]]:
        # The longest first, so that no batch waits for one at the end.
        members = sorted(group.members, key=lambda number: -len(encoded[number]))
        rests = [encoded[number][group.length :] for number in members]
        slots = min(1 << (len(members) - 1).bit_length(), self.batch_size)
        generator, prefix = self._generator(writing.stops, slots), None
        if group.length:
            common = encoded[members[0]][: group.length]
            room = len(rests[0]) + writing.new_tokens
            prefix = generator.prefix(common, sampling=writing.sampling, slots=slots, room=room)
        stream = generator.stream(
            rests, writing.new_tokens, sampling=writing.sampling, seed=self.seed, slots=slots, prefix=prefix
        )
        tokens: list[list[int]] = [[] for _ in members]
        for update in stream:
            tokens[update.row] += update.tokens
            if update.finished:
                yield members[update.row], self._text(tokens[update.row], writing.stops)

    def _text(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        text = self.tok_decode(tokens)
        ends = [] if self.eot_token_id is None else [self.tok_decode([self.eot_token_id], skip_special_tokens=False)]
        for stop in (*stops, *ends):
            text = text.partition(stop)[0]
        return text

    def _generator(self, stops: tuple[str, ...], slots: int) -> Generator:
        if (stops, slots) not in self._generators:
            if self.drafter in ("none", "ngram"):
                plan = self.session.plain_plan() if self.drafter == "none" else self.session.ngram_plan(slots)
                generator = self.session.generator(plan.drafter, plan.shape, stops=stops)
            else:
                kind = None if self.drafter == "auto" else self.drafter
                generator = self.session.adaptive_generator(kind, slots, stops=stops)
            self._generators[stops, slots] = generator
        return self._generators[stops, slots]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template of conversations, by which the harness tells its caches of requests apart."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without an end of its last message, if no answer is asked for."""
        return self.tokenizer.chat_text(chat_history, asks=add_generation_prompt, continues=not add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model, for the harness's report."""
        model = self.session.model
        return {"model_num_parameters": parameter_count(model), "model_dtype": str(model.config.dtype)}


def _batch_size(given: int | str, largest: int | None) -> int:
    name = str(given)
    if name.partition(":")[0] == "auto":
        return largest or LARGEST_BATCH
    if not name.isdecimal() or int(name) < 1:
        raise UserError(f"batch_size is {given}; give a number from 1 on, or auto")
    return int(name)


def _max_length(given: int | None, config: Any) -> int:
    known = context_length(config)
    if given is None:
        return known or DEFAULT_LENGTH
    positions = getattr(config, "max_positions", None)
    if int(given) < 2 or (positions is not None and int(given) > positions):
        raise UserError(
            f"max_length is {given}; give 2 tokens or more, up to the model's {positions or 'own'} positions"
        )
    return int(given)


def _say_cut(count: int, length: int) -> None:
    if count:
        log.warning("%d texts are longer than %d tokens and lose their beginning", count, length)
