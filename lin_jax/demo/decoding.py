"""Decoding in the demo: the best student plainly and with drafts, and its teacher, in turn, in one process."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lin_jax.attention import max_draft_depth
from lin_jax.decoding import Generation, Generator, Sampling, TokenOrigin
from lin_jax.decoding.autotune.plan import PLAIN
from lin_jax.decoding.autotune.shapes import DraftShapes, draft_shapes
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.drafters import build_drafter
from lin_jax.decoding.drafting.drafters.union import UnionDrafter
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree, parse_tree
from lin_jax.decoding.engine.programs import ProgramCompiler
from lin_jax.decoding.equivalence import is_rounding_tie
from lin_jax.demo.progress import PartProgress
from lin_jax.session import Session

# Drafts copied from the text so far, and those together with the trained head's; the last has all of them.
DRAFTERS = ("ngram", "path+ngram")
SAMPLED = Sampling(temperature=0.8, top_p=0.95)
SEED = 1
# Nodes of the shapes that are tried.
NODES = range(4, 9)
# Rounds before those that count: programs are compiled, and drafts and their costs become known.
WARM_UP = 2


@dataclass(frozen=True)
class DrafterFigures:
    """Speed, equality and acceptance of one drafter over all prompts, one sequence at a time.

    Attributes:
        tokens_per_second: greedy decoding with drafts chosen while decoding, median over rounds.
        speedup: median over rounds of the ratio to plain decoding; 1 where nothing was drafted.
        tokens_per_step: mean over the steps of the last round.
        drafted_share: share of its tokens that are accepted drafts.
        prompts_equal_greedy: prompts with plain decoding's tokens, in every round.
        prompts_equal_sampled: prompts with its sampled tokens, by the same seed; drafts are those used most.
        rounding_ties: of the texts that differ, those whose first difference is a tie within rounding.
        steps_by_tree: steps of the last round by draft tree.
    """

    tokens_per_second: float
    speedup: float
    tokens_per_step: float
    drafted_share: float
    prompts_equal_greedy: int
    prompts_equal_sampled: int
    rounding_ties: int
    steps_by_tree: dict[str, int]


def measure_decoding(
    student: Session,
    teacher: Session,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    rounds: int,
    drafters: Sequence[str] = DRAFTERS,
) -> dict[str, Any]:
    """Decodes every prompt with softmax, plainly, and with each drafter, all in turn, round after round.

    Args:
        student: the linear model and its draft head.
        teacher: the softmax model.
        prompts: token ids.
        new_tokens: tokens to write after each, two or more; end tokens do not stop a text, so that all write as much.
        rounds: counted rounds.
        drafters: names of the drafters, one that has all of the others' kinds at the end.

    Returns:
        Medians of the speeds, `drafters` by name with their figures, `best_drafter` ("plain" if nothing was drafted),
        and `samples`: of each prompt its tokens, the new tokens, and who chose each.
    """
    softmax, plain = _Way(Generator(teacher.model)), _Way(Generator(student.model))
    # One drafter for all: those of a few kinds use a part of its trees, and the compiled programs are the same ones.
    kinds = drafters[-1].split("+")
    drafter = build_drafter(drafters[-1], student.parts)
    drafted = {name: _Way(_adaptive(student, drafter, kinds, name.split("+"))) for name in drafters}
    ways = [softmax, plain, *drafted.values()]
    with PartProgress((WARM_UP + rounds) * len(ways) + 1 + len(drafted), "round") as progress:
        for turn in range(WARM_UP + rounds):
            for way in ways:
                way.decode(prompts, new_tokens, counted=turn >= WARM_UP)
                progress.step()
        sampled = _sampled(plain.generator, prompts, new_tokens)
        progress.step("sampled")
        found = {}
        for name, way in drafted.items():
            tree = parse_tree(way.most_used)
            texts = _sampled(Generator(student.model, drafter=drafter, tree=tree), prompts, new_tokens)
            found[name] = _figures(student, prompts, plain, way, sampled, texts)
            progress.step("sampled")
    pays = {name: each.speedup for name, each in found.items() if each.drafted_share > 0}
    best = max(pays, key=lambda name: pays[name], default=PLAIN)
    shown = drafted.get(best, plain).last
    return {
        "softmax_tokens_per_second": softmax.tokens_per_second,
        "plain_tokens_per_second": plain.tokens_per_second,
        "best_drafter": best,
        "drafters": {name: asdict(each) for name, each in found.items()},
        "state_bytes": plain.last[0].state_bytes,
        "softmax_state_bytes": softmax.last[0].state_bytes,
        "samples": [
            {"prompt": list(prompt), "tokens": each.tokens[0], "origins": [int(origin) for origin in each.origins[0]]}
            for prompt, each in zip(prompts, shown, strict=True)
        ],
    }


class _Way:
    """A way to decode all prompts: its speeds, and the texts of all rounds.

    Args:
        generator: decodes.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.rates: list[float] = []
        self.texts: list[list[list[int]]] = []
        self.last: list[Generation] = []

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int, *, counted: bool) -> None:
        """Decodes all prompts, one at a time."""
        self.last = [self.generator.generate([prompt], tokens, seed=SEED) for prompt in prompts]
        self.texts.append([each.tokens[0] for each in self.last])
        if counted:
            self.rates.append(sum(each.decoded for each in self.last) / sum(each.decode_seconds for each in self.last))

    @property
    def tokens_per_second(self) -> float:
        """Median over the counted rounds."""
        return float(np.median(self.rates))

    @property
    def steps_by_tree(self) -> dict[str, int]:
        """Steps of the last round."""
        return dict(sum((Counter(each.steps_by_tree) for each in self.last), Counter()))

    @property
    def most_used(self) -> str:
        """The draft tree that most steps of the last round were taken with, or `none`."""
        steps = {tree: count for tree, count in self.steps_by_tree.items() if parse_tree(tree).size > 1}
        return max(steps, key=lambda tree: steps[tree], default="none")


def _figures(
    session: Session,
    prompts: Sequence[Sequence[int]],
    plain: _Way,
    way: _Way,
    plain_sampled: list[list[int]],
    sampled: list[list[int]],
) -> DrafterFigures:
    """Figures of one drafter beside plain decoding."""
    greedy = plain.texts[0]
    # Drafts differ from round to round; a text of any of them counts.
    other = [next((round[n] for round in way.texts if round[n] != text), text) for n, text in enumerate(greedy)]
    origins = [origin for each in way.last for origin in each.origins[0]]
    share = origins.count(TokenOrigin.DRAFT) / len(origins)
    ratios = np.asarray(way.rates) / np.asarray(plain.rates)
    steps = sum(sum(each.steps) for each in way.last)
    ties = sum(
        is_rounding_tie(session.model, prompt, one, two, sampling, SEED)
        for sampling, ones, twos in ((Sampling(), greedy, other), (SAMPLED, plain_sampled, sampled))
        for prompt, one, two in zip(prompts, ones, twos, strict=True)
        if one != two
    )
    return DrafterFigures(
        tokens_per_second=way.tokens_per_second,
        speedup=float(np.median(ratios)) if share else 1.0,
        tokens_per_step=sum(each.decoded for each in way.last) / max(steps, 1),
        drafted_share=share,
        prompts_equal_greedy=sum(map(list.__eq__, greedy, other)),
        prompts_equal_sampled=sum(map(list.__eq__, plain_sampled, sampled)),
        rounding_ties=ties,
        steps_by_tree=way.steps_by_tree,
    )


def _adaptive(session: Session, drafter: Drafter, kinds: Sequence[str], used: Sequence[str]) -> Generator:
    """A generator that chooses drafts of some kinds while it decodes, and that no end token stops."""
    shapes = draft_shapes(drafter, max_draft_depth(session.model.config.attention))
    few = few_shapes(shapes, lambda tree: kinds[part_of(drafter, tree)] in used)
    return Generator(session.model, drafter=drafter, shapes=few, compiler=ProgramCompiler(background=False))


def few_shapes(shapes: DraftShapes, wanted: Callable[[AnyTree], bool]) -> DraftShapes:
    """Plain decoding, and the wanted trees of middle size: each is a program that takes long to compile.

    Two nodes gain little on a CPU, and of more than eight a model of the demo's size makes up for few.

    Args:
        shapes: the shapes of a drafter.
        wanted: says of a tree whether it is.
    """
    fits = [number for number, tree in enumerate(shapes.trees) if tree.size in NODES and wanted(tree)]
    kept = [0, *fits]
    families = {shapes.arms[number].family for number in fits}
    return DraftShapes(
        tuple(shapes.trees[number] for number in kept),
        tuple(shapes.arms[number] for number in kept),
        {family: begin for family, begin in shapes.hindsight.items() if family in families},
    )


def part_of(drafter: Drafter, tree: AnyTree) -> int:
    """Index of the drafter of a union whose guesses a tree begins with; 0 where there is but one."""
    if not isinstance(drafter, UnionDrafter) or not isinstance(tree, DraftTree):
        return 0
    begins = np.cumsum([each.width for each in drafter.drafters])
    return int(np.searchsorted(begins, tree.paths[0][0], side="right"))


def _sampled(generator: Generator, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    return [generator.generate([each], tokens, sampling=SAMPLED, seed=SEED).tokens[0] for each in prompts]
