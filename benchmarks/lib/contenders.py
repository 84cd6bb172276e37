"""Ways to continue a prompt that speculation.py lets compete: our own decoder's, and those of Hugging Face."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lin_jax.decoding import DynamicTree, Generator, Sampling
from lin_jax.decoding.drafting.drafters import build_drafter
from lin_jax.decoding.drafting.tree import AnyTree, tree_text
from lin_jax.decoding.equivalence import ROUNDING, first_difference, is_rounding_tie
from lin_jax.errors import UserError
from lin_jax.session import Session

LOOKUPS = (2, 4, 8, 12)
THREADS = 2
Tokens = Sequence[int]


@dataclass(frozen=True)
class Written:
    """One continuation: its tokens, and of its decoding, the prompt's reading left out, tokens, steps and seconds."""

    tokens: list[int]
    decoded: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Contender:
    """One way to continue a prompt.

    Attributes:
        name: in the report.
        kind: plain, tree, chain or hugging face.
        write: continues a prompt.
        like: name of the contender whose tokens it must write.
        tie: checks whether two continuations of a prompt part where rounding decides.
        about: more for the report.
    """

    name: str
    kind: str
    write: Callable[[Tokens], Written]
    like: str
    tie: Callable[[Tokens, Tokens, Tokens], bool]
    about: dict[str, Any]


def our_contender(session: Session, kind: str, tree: AnyTree, tokens: int, about: dict[str, Any]) -> Contender:
    """One drafter with one tree."""
    generator = endless(session, kind, tree)

    def once(prompt: Tokens) -> Written:
        done = generator.generate([prompt], tokens)
        return Written(done.tokens[0], done.decoded, sum(done.steps), done.decode_seconds)

    def tie(prompt: Tokens, one: Tokens, other: Tokens) -> bool:
        return is_rounding_tie(session.model, prompt, one, other, Sampling(), 0)

    branches = tree.width > 1 if isinstance(tree, DynamicTree) else tree.size > tree.depth + 1
    shape = "plain" if tree.size == 1 else "tree" if branches else "chain"
    moving = "dynamic " if isinstance(tree, DynamicTree) else ""
    name = shape if tree.size == 1 else f"{kind}, {moving}{shape} of {tree.size - 1}"
    return Contender(name, shape, once, "plain", tie, {"drafter": kind, "tree": tree_text(tree), **about})


def endless(session: Session, kind: str, tree: AnyTree, break_even_tokens: float | None = None) -> Generator:
    """A generator that no end token stops."""
    return Generator(
        session.model, drafter=build_drafter(kind, session.parts), tree=tree, break_even_tokens=break_even_tokens
    )


def hugging_face(session: Session, softmax: str | None, folder: Path, tokens: int) -> list[Contender]:
    """transformers' LLaMA of the same size with a KV cache: greedy, and with prompt lookup if it was trained."""
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch is not installed; install torch, or give --without-hugging-face") from None
    torch.set_num_threads(THREADS)
    model = random_llama(session) if softmax is None else trained_llama(session, softmax, folder)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def contender(lookup: int | None) -> Contender:
        more = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}

        def once(prompt: Tokens) -> Written:
            clock = Clock()
            ids = torch.tensor([list(prompt)])
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    use_cache=True,
                    streamer=clock,
                    **more,
                )
            return Written(out[0, len(prompt) :].tolist(), *clock.figures())

        def tie(prompt: Tokens, one: Tokens, other: Tokens) -> bool:
            place = first_difference(one, other)
            if place is None or place >= min(len(one), len(other)):
                return False
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *one[:place]]])).logits[0, -1]
            gap = abs(float(logits[one[place]] - logits[other[place]]))
            return gap <= ROUNDING["float32"] * max(float(logits.abs().max()), 1.0)

        name = "Hugging Face" if lookup is None else f"Hugging Face, prompt lookup {lookup}"
        about = {"trained": softmax is not None, "prompt_lookup_num_tokens": lookup, "threads": THREADS}
        return Contender(name, "hugging face", once, "Hugging Face", tie, about)

    lookups = LOOKUPS if softmax is not None else ()
    if softmax is None:
        say("no --softmax: Hugging Face's LLaMA has random weights, for its speed only, and no prompt lookup")
    return [contender(None), *(contender(lookup) for lookup in lookups)]


class Clock:
    """Hugging Face's streamer: told the prompt, then the tokens of every step."""

    def __init__(self) -> None:
        self.told: list[tuple[int, float]] = []

    def put(self, value: Any) -> None:
        """Takes the time of some tokens."""
        self.told.append((value.numel(), time.perf_counter()))

    def end(self) -> None:
        """Does nothing; the protocol asks for it."""

    def figures(self) -> tuple[int, int, float]:
        """Tokens, steps and seconds behind the step that reads the prompt."""
        (_, began), steps = self.told[1], self.told[2:]
        return sum(count for count, _ in steps), len(steps), (steps[-1][1] if steps else began) - began


def random_llama(session: Session) -> Any:
    """A LLaMA in PyTorch with the model's sizes, and weights that say nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = session.model.config
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            tie_word_embeddings=config.tie_embeddings,
        )
    )


def trained_llama(session: Session, softmax: str, folder: Path) -> Any:
    """A run with softmax attention, exported and opened by transformers."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from lin_jax.hub import save_pretrained

    other = Session.load(softmax)
    if other.tokenizer.fingerprint != session.tokenizer.fingerprint:
        raise UserError(f"{softmax} has another tokenizer; train it on the same data with the same vocab_size")
    save_pretrained(other.model, folder / "softmax")
    model = AutoModelForCausalLM.from_pretrained(folder / "softmax", dtype="float32")
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(f"{softmax} holds no LLaMA with softmax attention; train one with model.attention.name softmax")
    return model


def say(line: str) -> None:
    """A line on stderr."""
    tqdm.write(line, file=sys.stderr)
