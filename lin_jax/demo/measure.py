"""The demo's figures: plain and speculative decoding of held-out prompts, in turn, in one process."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lin_jax.decoding import Generation, Generator, Sampling, TokenOrigin
from lin_jax.decoding.autotune.plan import SpeculationPlan
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree
from lin_jax.decoding.equivalence import is_rounding_tie
from lin_jax.session import Session

SAMPLED = Sampling(temperature=0.8, top_p=0.95)
SEED = 1


@dataclass(frozen=True)
class DrafterFigures:
    """Speed, equality and acceptance of one drafter on all prompts, at batch 1.

    Attributes:
        plan: the drafter and its tree.
        plain_tokens_per_second: plain greedy decoding, median over rounds.
        speculative_tokens_per_second: the same prompts with drafts, median over rounds.
        speedup: median over rounds of the ratio of both; 1 for a plan without drafts.
        mean_accepted_tokens: tokens per target step, greedy.
        lossless_greedy: prompts whose greedy tokens equal plain decoding's.
        lossless_sampled: prompts whose sampled tokens do, with the same seed.
        rounding_ties: of the prompts that differ, those whose first difference is a tie within float32's rounding.
        accepted_histogram: how often a greedy step gave 1, 2, ... tokens.
        generations: the greedy generations of the last round.
    """

    plan: SpeculationPlan
    plain_tokens_per_second: float
    speculative_tokens_per_second: float
    speedup: float
    mean_accepted_tokens: float
    lossless_greedy: int
    lossless_sampled: int
    rounding_ties: int
    accepted_histogram: list[int]
    generations: list[Generation]


def compare(
    session: Session, plans: Sequence[SpeculationPlan], prompts: Sequence[Sequence[int]], tokens: int, rounds: int
) -> list[DrafterFigures]:
    """Decodes every prompt plainly and with each plan, in turn, for several rounds after a warm-up.

    A plan without drafts is plain decoding: it has its figures, and is not timed against itself.

    Args:
        session: model and heads.
        plans: one for each drafter.
        prompts: token ids.
        tokens: new tokens per prompt; end tokens do not stop a row, so that all runs write as much.
        rounds: counted rounds.
    """
    drafting = [plan for plan in plans if plan.drafts]
    generators = [
        _endless(session, "none", DraftTree()),
        *(_endless(session, each.drafter, each.shape) for each in drafting),
    ]
    sampled = [[_one(each, prompt, tokens, SAMPLED) for prompt in prompts] for each in generators]
    rates = np.zeros((rounds, len(generators)))
    for turn in range(-1, rounds):
        greedy = [[_one(each, prompt, tokens, Sampling()) for prompt in prompts] for each in generators]
        if turn >= 0:
            rates[turn] = [sum(g.decoded for g in row) / sum(g.decode_seconds for g in row) for row in greedy]
    places = [drafting.index(plan) + 1 if plan.drafts else 0 for plan in plans]
    return [
        DrafterFigures(
            plan=plan,
            plain_tokens_per_second=float(np.median(rates[:, 0])),
            speculative_tokens_per_second=float(np.median(rates[:, index])),
            speedup=float(np.median(rates[:, index] / rates[:, 0])),
            mean_accepted_tokens=sum(g.decoded for g in greedy[index]) / sum(sum(g.steps) for g in greedy[index]),
            lossless_greedy=_equal(greedy[0], greedy[index]),
            lossless_sampled=_equal(sampled[0], sampled[index]),
            rounding_ties=sum(
                is_rounding_tie(session.model, prompt, one.tokens[0], other.tokens[0], sampling, SEED)
                for runs, sampling in ((greedy, Sampling()), (sampled, SAMPLED))
                for prompt, one, other in zip(prompts, runs[0], runs[index], strict=True)
                if one.tokens != other.tokens
            ),
            accepted_histogram=np.sum([g.accepted_histogram for g in greedy[index]], axis=0).tolist(),
            generations=greedy[index],
        )
        for index, plan in zip(places, plans, strict=True)
    ]


def best_of(figures: Sequence[DrafterFigures]) -> DrafterFigures:
    """The fastest, plain decoding included where a plan drafts nothing: with nothing drafted there is no speed-up."""
    return max(figures, key=lambda each: each.speedup)


def drafted_share(generation: Generation) -> float:
    """Share of the tokens that came from accepted drafts."""
    origins = generation.origins[0]
    return origins.count(TokenOrigin.DRAFT) / len(origins)


def _endless(session: Session, kind: str, tree: AnyTree) -> Generator:
    generator = session.generator(kind, tree)
    return Generator(generator.model, drafter=generator.drafter, tree=tree)


def _one(generator: Generator, prompt: Sequence[int], tokens: int, sampling: Sampling) -> Generation:
    return generator.generate([prompt], tokens, sampling=sampling, seed=SEED)


def _equal(one: Sequence[Generation], other: Sequence[Generation]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(one, other, strict=True))
