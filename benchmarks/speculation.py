"""Speculation against plain decoding, against chains, against Hugging Face's generate, and over batches: in one run.

    python benchmarks/speculation.py --model runs/stories [--softmax runs/stories_softmax] [--json FILE] [--plot FILE]

Greedy, float32, on held-out documents' beginnings; end tokens stop nobody, so that all write as much. At batch 1 all
contenders take turns, prompt by prompt, round after round: plain decoding, every drafter with the tree that the plan
gives it, the three chains that the cost model finds best, and in PyTorch a LLaMA with softmax attention and a KV cache,
plain and with prompt lookup. At every batch the plan's choice then takes turns with plain decoding until noise is
small. With --adaptive there is only this: plain decoding and drafts that are chosen while decoding take turns, and each
prompt's ratio is listed. Whoever writes other tokens than plain decoding of the same model is wrong, and has no speed.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lib.adaptive import adaptive_report, chosen_prompts, hardest, print_adaptive
from lib.contenders import Contender, Tokens, Written, endless, hugging_face, our_contender, say
from lib.plots import plot_speculation
from lib.report import header, write
from tqdm import tqdm

from lin_jax.attention import max_draft_depth
from lin_jax.decoding import DraftTree, DynamicTree, Generator, Sampling, chain
from lin_jax.decoding.autotune.costs import Costs, measure_costs, measure_drafting
from lin_jax.decoding.autotune.plan import PLAIN, SpeculationPlan, load_plans
from lin_jax.decoding.autotune.prompts import PROMPT_TOKENS, PROMPTS, held_out_prompts
from lin_jax.decoding.autotune.replay import draft_accuracy, dynamic_tree_ranks, tokens_per_step
from lin_jax.decoding.drafting.drafters import available, build_drafter
from lin_jax.decoding.drafting.tree import AnyTree
from lin_jax.decoding.equivalence import is_rounding_tie
from lin_jax.errors import UserError, exit_cleanly
from lin_jax.models.stored_weights import WEIGHTS
from lin_jax.session import PLAN_FILE, Session
from lin_jax.training.config_file import load_run_config

TARGETS = {"plain": 2.0, "chain": 1.15, "batches": 0.98}
LONGEST_CHAIN = 8
# Turns at a batch: at least, at most, and until the ratio is known so well.
LEAST, MOST, ERROR = 6, 200, 0.005


def main() -> int:
    """Measures, prints, and writes JSON and a plot if asked to."""
    options = parse()
    session = Session.load(options.model, tokenizer=options.tokenizer, weights=options.weights)
    if options.adaptive:
        return adaptive(session, options)
    if session.model.config.dtype != "float32":
        raise UserError(f"{options.model} computes in {session.model.config.dtype}; give a model in float32")
    prompts, calibration = held_out(session, options.prompts)
    plans, chains = choose(session, calibration, options)
    contenders = our_contenders(session, plans, chains, options.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        if not options.without_hugging_face:
            contenders += hugging_face(session, options.softmax, Path(folder), options.new_tokens)
        results, rates = compete(contenders, prompts, options.rounds)
    batches: list[dict[str, Any]] = []
    for slots in options.batches:
        # Whatever happens next, what was measured stays.
        if options.json not in (None, "-"):
            write(report_of(options, len(prompts), results, rates, batches), options.json)
        # A process can map only so many compiled programs.
        jax.clear_caches()
        at_hand = (
            plans if slots == 1 else planned(session, [each.drafter for each in plans], slots, calibration, options)
        )
        batches.append(at_batch(session, prompts, at_hand, slots, options))
    report = report_of(options, len(prompts), results, rates, batches)
    print_summary(report)
    if options.json is not None:
        write(report, options.json)
    if options.plot is not None:
        plot_speculation(report, options.plot)
    return 0 if report["correct"] else 1


def adaptive(session: Session, options: argparse.Namespace) -> int:
    """Plain and adaptive decoding of each prompt, in turns."""
    prompts = chosen_prompts(session, options.data, options.prompts)
    if options.hardest is not None:
        prompts = hardest(session, prompts, options.new_tokens, options.hardest)
    report = header("speculation") | {"model": options.model, "hardest_of": options.hardest and options.prompts}
    report |= {
        "adaptive": adaptive_report(
            session, prompts, options.new_tokens, options.rounds, again=options.again, rows=options.rows
        )
    }
    print_adaptive(report["adaptive"], report["device"])
    if options.json is not None:
        write(report, options.json)
    return 0 if report["adaptive"]["correct"] else 1


def report_of(
    options: argparse.Namespace,
    prompts: int,
    results: Sequence[dict[str, Any]],
    rates: dict[str, np.ndarray],
    batches: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Report of all results so far."""
    return header("speculation") | {
        "model": options.model,
        "softmax": options.softmax,
        "prompts": prompts,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "correct": not any(each["wrong"] for each in [*results, *batches]),
        "contenders": results,
        "hugging_face": against_hugging_face(results, rates),
        "batches": batches,
        "targets": targets(results, rates, batches),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="RUN", help="run folder; its heads lie in it")
    parser.add_argument("--softmax", metavar="RUN", help="run with softmax attention, for PyTorch; default: random")
    parser.add_argument("--without-hugging-face", action="store_true", help="leave PyTorch out")
    parser.add_argument("--drafters", nargs="+", metavar="KIND", help="default: all that the run has parts for")
    parser.add_argument("--keep-plans", action="store_true", help="use plans in the run's folder, where there are some")
    parser.add_argument("--chains", type=int, default=3, help="how many of the most promising chains take part")
    parser.add_argument(
        "--adaptive", action="store_true", help="only plain against adaptive decoding, prompt by prompt"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="with --adaptive: a second pass, with the first one in the session's memory",
    )
    parser.add_argument(
        "--hardest", type=int, metavar="N", help="with --adaptive: only the N of --prompts on which drafts lose most"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="stored", help="type of our weights (default: stored)")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="with --adaptive: prompts at a time")
    parser.add_argument("--tokenizer", metavar="FILE", help="with --adaptive: tokenizer of a file of llama2.c")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with --adaptive: folder of prompts")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], metavar="B")
    parser.add_argument("--batch-seconds", type=float, default=60, help="longest that one batch size is timed")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    parser.add_argument("--plot", metavar="FILE", help="write a plot (PNG)")
    options = parser.parse_args()
    if min(options.prompts, options.rounds, options.rows, options.hardest or 1, *options.batches) < 1:
        raise UserError("--prompts, --rounds, --rows, --hardest and --batches must be 1 or more")
    if options.new_tokens < 16:
        raise UserError(f"--new-tokens is {options.new_tokens}; give at least 16, to choose trees by")
    return options


def held_out(session: Session, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts to measure on, and others to choose trees and chains by."""
    data = load_run_config(session.folder).data
    found = held_out_prompts(data, session.tokenizer, 2 * count)
    return found[:count], found[count : count + PROMPTS]


def choose(
    session: Session, calibration: list[list[int]], options: argparse.Namespace
) -> tuple[list[SpeculationPlan], list[tuple[str, AnyTree, float]]]:
    """A plan for every drafter at batch 1, and the chains that promise most."""
    kinds = options.drafters or list(available(session.parts))
    plans = planned(session, kinds, 1, calibration, options)
    say("looking for the best chains")
    texts = Generator(session.model).generate(calibration, options.new_tokens).tokens
    kept = load_plans(session.folder / PLAN_FILE)[1]
    costs = next((each for each in kept if each.slots == 1), None) or measure_costs(session.model)
    return plans, best_chains(session, kinds, calibration, texts, costs)[: options.chains]


def planned(
    session: Session, kinds: Sequence[str], slots: int, calibration: list[list[int]], options: argparse.Namespace
) -> list[SpeculationPlan]:
    """A plan for every drafter at a batch size, measured now unless kept ones will do."""
    prompts = None if options.keep_plans else calibration
    return session.plans(kinds, slots, prompts=prompts, tokens=options.new_tokens, note=say)


def best_chains(
    session: Session, kinds: Sequence[str], prompts: Sequence[Tokens], texts: Sequence[Tokens], costs: Costs
) -> list[tuple[str, AnyTree, float]]:
    """Chains of any drafter and length, with their expected speedup by measured costs and accuracy, the best first.

    Drafters side by side make a dynamic chain: at every depth the likeliest of what they offer.
    """
    found: list[tuple[str, AnyTree, float]] = []
    for kind in kinds:
        drafter = build_drafter(kind, session.parts)
        deepest = min(drafter.depth, max_draft_depth(session.model.config.attention) or LONGEST_CHAIN, LONGEST_CHAIN)
        drafting = measure_drafting(session.model, drafter, costs, deepest)
        joined = "+" in kind
        if joined:
            whole = DynamicTree(deepest + 1, deepest, 1, 1)
            right = dynamic_tree_ranks(session.model, drafter, prompts, texts, whole)[:, :, -1] <= deepest
        else:
            right = draft_accuracy(session.model, drafter, prompts, texts, depth=deepest)[:, :, :, 0]
        reached = np.cumprod(right, axis=2)
        for length in range(1, deepest + 1):
            tokens = tokens_per_step(reached[:, :, :length].sum(axis=2))
            cost = costs.verify(length + 1) + length * drafting
            tree: AnyTree = DynamicTree(length + 1, length, 1, 1) if joined else chain(length)
            found.append((kind, tree, tokens * costs.verify(1) / cost))
    return sorted(found, key=lambda each: -each[2])


def our_contenders(
    session: Session, plans: Sequence[SpeculationPlan], chains: Sequence[tuple[str, AnyTree, float]], tokens: int
) -> list[Contender]:
    """Plain decoding, what the plans say, and chains."""
    ways: dict[tuple[str, AnyTree], dict[str, Any]] = {("none", DraftTree()): {"planned": False}}
    for plan in plans:
        if plan.shape.size > 1:
            ways[plan.drafter, plan.shape] = {
                "planned": True,
                "expected_tokens": plan.expected_tokens,
                "expected_speedup": plan.expected_speedup,
            }
    for kind, tree, expected in chains:
        ways.setdefault((kind, tree), {"planned": False, "expected_speedup": expected})
    return [our_contender(session, kind, tree, tokens, about) for (kind, tree), about in ways.items()]


def compete(
    contenders: Sequence[Contender], prompts: Sequence[Tokens], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Results of all contenders for the report, and tokens per second of the correct ones, round by round."""
    bar = tqdm(total=(rounds + 1) * len(prompts) * len(contenders), desc="batch 1", file=sys.stderr)

    def turns(taking: Sequence[Contender]) -> dict[str, list[Written]]:
        done: dict[str, list[Written]] = {each.name: [] for each in taking}
        for prompt in prompts:
            for each in taking:
                done[each.name].append(each.write(prompt))
                bar.update()
        return done

    first = turns(contenders)
    results = [checked(each, prompts, first) for each in contenders]
    right = [each for each, result in zip(contenders, results, strict=True) if not result["wrong"]]
    timed = [turns(right) for _ in range(rounds)]
    bar.close()
    rates = {
        each.name: np.array(
            [sum(w.decoded for w in t[each.name]) / sum(w.seconds for w in t[each.name]) for t in timed]
        )
        for each in right
    }
    for result in results:
        rate = rates.get(result["name"])
        result["tokens_per_second"] = None if rate is None else float(np.median(rate))
        result["speedup"] = None if rate is None else float(np.median(rate / rates["plain"]))
    return results, rates


def checked(each: Contender, prompts: Sequence[Tokens], first: dict[str, list[Written]]) -> dict[str, Any]:
    """Compares a contender's texts with those that it should have written."""
    own, other = first[each.name], first[each.like]
    different = [
        (prompt, a.tokens, b.tokens) for prompt, a, b in zip(prompts, other, own, strict=True) if a.tokens != b.tokens
    ]
    ties = sum(each.tie(*case) for case in different)
    return {
        "name": each.name,
        "kind": each.kind,
        **each.about,
        "mean_accepted_tokens": sum(w.decoded for w in own) / max(sum(w.steps for w in own), 1),
        "equal": len(prompts) - len(different),
        "rounding_ties": ties,
        "wrong": len(different) - ties,
    }


def at_batch(
    session: Session,
    prompts: Sequence[Tokens],
    plans: Sequence[SpeculationPlan],
    slots: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The plan's choice at a batch size against plain decoding, in turns until noise is small or time is up."""
    plan = max(plans, key=lambda each: each.measured_speedup)
    if not plan.drafts:
        return plain_batch(slots)
    kind = plan.drafter
    pair = [endless(session, "none", DraftTree()), endless(session, kind, plan.shape, plan.break_even_tokens)]
    # Whole batches only, of several prompts where one after the other takes a slot.
    asked = [prompts[row % len(prompts)] for row in range(slots * max(1, 8 // slots))]
    plain, done = (each.generate(asked, options.new_tokens, slots=slots) for each in pair)
    different = [row for row in range(len(asked)) if plain.tokens[row] != done.tokens[row]]
    ties = sum(
        is_rounding_tie(session.model, asked[row], plain.tokens[row], done.tokens[row], Sampling(), 0, row)
        for row in different
    )
    result = {
        "batch": slots,
        "drafter": kind,
        "tree": plan.tree,
        "planned_speedup": plan.measured_speedup,
        "break_even_tokens": plan.break_even_tokens,
        "plain_steps": done.plain_steps,
        "mean_accepted_tokens": done.mean_accepted_tokens,
        "useful_share": done.useful_share,
        "rounding_ties": ties,
        "wrong": len(different) - ties,
    }
    rates = np.zeros((0, 2)) if result["wrong"] else alternate(pair, asked, slots, options)
    ratios = rates[:, 1] / rates[:, 0]
    return result | {
        "turns": len(rates),
        "plain_tokens_per_second": float(np.median(rates[:, 0])) if len(rates) else None,
        "tokens_per_second": float(np.median(rates[:, 1])) if len(rates) else None,
        "ratio": float(np.median(ratios)) if len(rates) else None,
        "ratio_error": error_of(ratios) if len(rates) else None,
    }


def plain_batch(slots: int) -> dict[str, Any]:
    """Result of a plan without drafts: that is plain decoding, and there is nothing to compare it with."""
    zero = {"turns": 0, "plain_steps": 0, "rounding_ties": 0, "wrong": 0}
    rates = {"plain_tokens_per_second": None, "tokens_per_second": None, "ratio": 1.0, "ratio_error": 0.0}
    shape = {"drafter": PLAIN, "tree": "none", "planned_speedup": 1.0, "break_even_tokens": None}
    return {"batch": slots, **shape, "mean_accepted_tokens": 1.0, "useful_share": 1.0, **zero, **rates}


def alternate(
    pair: Sequence[Generator], asked: Sequence[Tokens], slots: int, options: argparse.Namespace
) -> np.ndarray:
    """Tokens per second of both, `[turns, 2]`; who begins changes from turn to turn."""
    rates: list[list[float]] = []
    began = time.perf_counter()
    with tqdm(total=MOST, desc=f"batch {slots}", file=sys.stderr) as bar:
        while len(rates) < MOST:
            turn = [0.0, 0.0]
            for index in (0, 1) if len(rates) % 2 else (1, 0):
                turn[index] = pair[index].generate(asked, options.new_tokens, slots=slots).tokens_per_second
            rates.append(turn)
            bar.update()
            found = np.array(rates)
            late = time.perf_counter() - began > options.batch_seconds
            if len(rates) >= LEAST and (late or error_of(found[:, 1] / found[:, 0]) < ERROR):
                break
    return np.array(rates)


def error_of(ratios: np.ndarray) -> float:
    """Standard error of the median, by the spread between the quartiles."""
    low, high = np.quantile(ratios, (0.25, 0.75))
    return float(1.2533 * (high - low) / 1.349 / np.sqrt(len(ratios)))


def best(results: Sequence[dict[str, Any]], *kinds: str) -> str | None:
    """Name of the fastest of some kinds."""
    fit = [each for each in results if each["kind"] in kinds and each["tokens_per_second"]]
    return max(fit, key=lambda each: each["tokens_per_second"])["name"] if fit else None


def times(rates: dict[str, np.ndarray], one: str | None, other: str | None) -> float | None:
    """Speed of one contender relative to another, median over rounds."""
    return None if one is None or other is None else float(np.median(rates[one] / rates[other]))


def against_hugging_face(results: Sequence[dict[str, Any]], rates: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fastest of ours against generate, and against the best prompt lookup."""
    ours = best(results, "plain", "tree", "chain")
    lookups = [each for each in results if each.get("prompt_lookup_num_tokens")]
    lookup = best(lookups, "hugging face")
    generate = "Hugging Face" if "Hugging Face" in rates else None
    return {
        "ours": ours,
        "times_generate": times(rates, ours, generate),
        "plain_times_generate": times(rates, "plain", generate),
        "best_lookup": lookup,
        "times_lookup": times(rates, ours, lookup),
    }


def targets(
    results: Sequence[dict[str, Any]], rates: dict[str, np.ndarray], batches: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Targets, the measured values, and whether they meet them."""
    tree, line = best(results, "tree"), best(results, "chain")
    ratios = [each["ratio"] for each in batches]
    found = {
        "plain": times(rates, best(results, "tree", "chain"), "plain"),
        "chain": times(rates, tree, line),
        "batches": min(ratios) if ratios and None not in ratios else None,
    }
    return {
        name: {"target": TARGETS[name], "measured": value, "met": value is not None and value >= TARGETS[name]}
        for name, value in found.items()
    } | {"best_tree": tree, "best_chain": line}


def print_summary(report: dict[str, Any]) -> None:
    """The report in words."""
    for each in report["contenders"]:
        speed = "WRONG, no speed is told"
        if each["tokens_per_second"]:
            speed = f"{each['tokens_per_second']:7,.0f} tokens/s, {each['speedup']:.2f} times plain"
        print(f"{each['name']:36} {speed}, {each['mean_accepted_tokens']:.2f} tokens a step")
    for each in report["batches"]:
        speed = "WRONG" if each["ratio"] is None else f"{each['ratio']:.3f} +- {each['ratio_error']:.3f} times plain"
        print(
            f"batch {each['batch']:>2}: {speed} ({each['drafter']}, {each['mean_accepted_tokens']:.2f} tokens a step)"
        )
    for name in TARGETS:
        target = report["targets"][name]
        value = "not measured" if target["measured"] is None else f"{target['measured']:.2f}"
        print(f"target over {name}: {target['target']}, {value}: {'met' if target['met'] else 'NOT met'}")


if __name__ == "__main__":
    exit_cleanly(main)
