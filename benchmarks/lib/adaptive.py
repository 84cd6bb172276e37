"""Plain against adaptive decoding, prompt by prompt: what the choice of draft shapes gains, and what it can lose."""

import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lib.prompts import read_prompts
from tqdm import tqdm

from lin_jax.decoding import Generation, Generator, Sampling
from lin_jax.decoding.autotune.prompts import held_out_prompts
from lin_jax.decoding.drafting.tree import parse_tree, tree_text
from lin_jax.decoding.equivalence import is_rounding_tie
from lin_jax.session import Session

# Share of plain decoding's speed that no prompt should fall below.
LEAST = 0.97


@dataclass
class Pair:
    """Prompts decoded both ways, in turns.

    Attributes:
        prompts: tokens of each; they are decoded at a time.
        seconds: `[turns, 3]` time of the loop: plain, adaptive, and plain again.
        cpu_seconds: the same in seconds of the process on any processor, which other programs disturb less.
        last: the last generation of each way.
    """

    prompts: list[Sequence[int]]
    seconds: list[tuple[float, ...]]
    cpu_seconds: list[tuple[float, ...]]
    last: list[Generation]

    def ratio(self, times: Sequence[tuple[float, ...]], way: int = 1) -> float:
        """Speed of a way over that of plain decoding, median over turns; all write as many tokens."""
        return float(np.median([turn[0] / turn[way] for turn in times]))


def adaptive_report(
    session: Session, prompts: Sequence[Sequence[int]], tokens: int, rounds: int, *, again: bool = False, rows: int = 1
) -> dict[str, Any]:
    """Decodes every prompt plainly and adaptively in turns, and lists each prompt's ratio.

    Shapes that the choice wants are compiled when it first wants them, before anything is timed. Every prompt begins
    with what training recorded of heads, and without evidence from others: what is measured is what a single call gets.

    Args:
        session: the model.
        prompts: token ids.
        tokens: new tokens per prompt; end tokens stop nobody.
        rounds: timed turns of each prompt.
        again: write all texts once before, so that the session's memory has them; nothing is added to it afterwards.
        rows: prompts that are decoded at a time; what is listed is the ratio of each batch of them.
    """
    found = session.adaptive_generator(slots=rows, background=False)
    # The first pass is to write all that the others will.
    found.end_tokens = ()
    begun = deepcopy(found.learned)
    if again:
        for prompt in tqdm(prompts, desc="first pass", file=sys.stderr):
            found.generate([prompt], tokens)
        session.parts.memory.refresh()
    plain = Generator(session.model)
    pairs = []
    batches = [list(prompts[at : at + rows]) for at in range(0, len(prompts) - len(prompts) % rows, rows)]
    for batch in tqdm(batches, desc="adaptive", file=sys.stderr):
        pair = Pair(batch, [], [], [])
        for turn in range(-1, rounds):
            adaptive = Generator(
                session.model, drafter=found.drafter, shapes=found.shapes, costs=found.costs, compiler=found.compiler
            )
            adaptive.learned = deepcopy(begun)
            ways = [plain, adaptive, plain]
            done, spent = {}, {}
            for index in (0, 1, 2) if turn % 2 else (2, 1, 0):
                began = time.process_time()
                done[index] = ways[index].generate(batch, tokens, slots=rows)
                spent[index] = time.process_time() - began
            pair.last = [done[0], done[1]]
            if turn >= 0:
                pair.seconds.append(tuple(done[index].decode_seconds for index in range(len(ways))))
                pair.cpu_seconds.append(tuple(spent[index] for index in range(len(ways))))
        pairs.append(pair)
    session.save_costs()
    results = [_result(session, pair) for pair in pairs]
    ratios = [each["ratio"] for each in results]
    total = np.array([np.median(pair.seconds, axis=0) for pair in pairs]).sum(axis=0)
    return {
        "drafter": session.adaptive_drafter()[0],
        "tokens": tokens,
        "rounds": rounds,
        "rows": rows,
        "again": again,
        "step_costs": session.step_costs,
        "prompts": results,
        "speedup": float(total[0] / total[1]),
        "plain_against_itself": float(total[0] / total[2]),
        "lowest_against_itself": min(each["plain_against_itself"] for each in results),
        "lowest": min(ratios),
        "below_least": sum(ratio < LEAST for ratio in ratios),
        "correct": not any(each["wrong"] for each in results),
    }


def _result(session: Session, pair: Pair) -> dict[str, Any]:
    plain, adaptive = pair.last
    different = [row for row in range(len(pair.prompts)) if plain.tokens[row] != adaptive.tokens[row]]
    ties = sum(
        is_rounding_tie(session.model, pair.prompts[row], plain.tokens[row], adaptive.tokens[row], Sampling(), 0, row)
        for row in different
    )
    sizes = {str(parse_tree(tree).size): count for tree, count in adaptive.steps_by_tree.items()}
    return {
        "prompt": session.decode(pair.prompts[0])[:60],
        "plain_tokens_per_second": plain.decoded / float(np.median([each[0] for each in pair.seconds])),
        "adaptive_tokens_per_second": adaptive.decoded / float(np.median([each[1] for each in pair.seconds])),
        "ratio": pair.ratio(pair.seconds),
        "cpu_ratio": pair.ratio(pair.cpu_seconds),
        "plain_against_itself": pair.ratio(pair.seconds, 2),
        "mean_accepted_tokens": adaptive.mean_accepted_tokens,
        "steps_by_nodes": sizes,
        "rounding_ties": ties,
        "wrong": len(different) - ties,
    }


def chosen_prompts(session: Session, data: Path | None, count: int) -> list[list[int]]:
    """Held-out beginnings of the text that a run was trained on, and real prompts of all kinds from the data folder."""
    held_out: list[list[int]] = []
    if session.data is not None:
        held_out = held_out_prompts(session.data, session.tokenizer, count // 2)[: count // 2]
    others = read_prompts(data, session.encode_prompt, count - len(held_out))
    return [*held_out, *(each.tokens for each in others)]


def hardest(session: Session, prompts: Sequence[Sequence[int]], tokens: int, count: int) -> list[list[int]]:
    """Prompts on which drafts should lose most, by the steps that they took in a pass over all and what steps cost.

    Of those that lose as much, the ones with fewer tokens a step.
    """
    found = session.adaptive_generator(background=False)
    assert found.shapes is not None
    begun = deepcopy(found.learned)
    costs = found.costs(1)
    names = {tree_text(tree): number for number, tree in enumerate(found.shapes.trees)}
    told = []
    for prompt in tqdm(prompts, desc="looking for the hardest", file=sys.stderr):
        # Nobody learns from another prompt, and nothing is remembered.
        alone = Generator(
            session.model, drafter=found.drafter, shapes=found.shapes, costs=found.costs, compiler=found.compiler
        )
        alone.learned = deepcopy(begun)
        done = alone.generate([prompt], tokens)
        spent = sum(steps * costs.cost(names[tree]) for tree, steps in done.steps_by_tree.items())
        told.append((done.decoded / max(spent, 1), done.mean_accepted_tokens))
    order = sorted(range(len(prompts)), key=lambda number: told[number])
    return [list(prompts[number]) for number in order[:count]]


def print_adaptive(report: dict[str, Any], device: str) -> None:
    """The report in words, a line for each prompt."""
    for each in report["prompts"]:
        told = (
            "WRONG, no speed is told"
            if each["wrong"]
            else (
                f"{each['ratio']:.3f}x plain ({each['cpu_ratio']:.3f}x by processor time), "
                f"{each['adaptive_tokens_per_second']:,.0f} tokens/s, {each['mean_accepted_tokens']:.2f} tokens a "
                f"step, plain against itself {each['plain_against_itself']:.3f}"
            )
        )
        print(f"{told}  {each['prompt']!r}")
    together = "" if report["rows"] == 1 else f" times {report['rows']}"
    print(
        f"on {device}: {report['drafter']}{', all written before' if report['again'] else ''}, "
        f"{len(report['prompts'])}{together} prompts of "
        f"{report['tokens']} new tokens: "
        f"{report['speedup']:.2f}x plain together, lowest {report['lowest']:.3f}, "
        f"{report['below_least']} below {LEAST}; plain against itself {report['plain_against_itself']:.3f} together, "
        f"lowest {report['lowest_against_itself']:.3f}"
    )
