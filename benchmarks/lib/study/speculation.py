"""Part 5: speculation by attention, drafter and tree, and what an inexact group boundary changes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from lib.study.attentions import AUGMENTED, sized
from lib.study.cells import BROAD, DEEP, FIRST, LAST, Cell, Claim, Part, Results, Setup, Verdict
from lib.study.drawing import draw_bars, grouped, markdown_table
from lib.study.linearize import NAME as LINEARIZE
from lib.study.linearize import TEACHER, WHOLE, cell_name
from lib.study.models import OWN, held_out, load_student, load_teacher, prompts
from lib.study.variants import published, register

from lin_jax.decoding import Generation, Generator, Sampling
from lin_jax.decoding.drafting.drafters import build_drafter
from lin_jax.decoding.drafting.text_memory import TextMemory
from lin_jax.decoding.drafting.tree import parse_tree
from lin_jax.decoding.equivalence import is_rounding_tie
from lin_jax.evaluation.ablation import ablated
from lin_jax.evaluation.agreement import agreement
from lin_jax.evaluation.token_losses import ratio, token_losses
from lin_jax.session import Session
from lin_jax.training.model_source import with_attention

NAME = "speculation"
ATTENTIONS = (AUGMENTED, "flash_global", "relu", "elu", "exponential+window")
DRAFTERS = ("ngram", "suffix", "self")
TREES = ("chain:2", "chain:4", "chain:7", "dynamic:16:4")
# The model's own layers draft four tokens at most; a drafter that copies guesses one token a place, and has no tree.
BY_COPIES, BY_SCORES = ("chain:7",), ("dynamic:16:4",)
# Of these trees the one that is tried first, and attentions of the short study beside the augmented one.
MIDDLE, IN_SHORT = "chain:4", ("flash_global", "relu", "exponential+window")
# The boundaries are compared with right drafts: this drafter copies what plain decoding has written before, over so
# many groups.
COPIES, CROSSED = "suffix", 4
BOUNDARY = "boundary"
# A student without the local branch, to whom the memory is much.
WITHOUT_LOCAL = "flash_global+convolution"
# A memory is worth nothing where leaving it out raises perplexity by less than this share.
NOTHING = 0.005


def cells(setup: Setup) -> list[Cell]:
    """Every attention with every drafter and tree, then both boundaries."""
    model = OWN if setup.quick else WHOLE
    drafters, trees = (("ngram",), ("chain:4",)) if setup.quick else (DRAFTERS, TREES)
    found = []
    for attention in (AUGMENTED,) if setup.quick else ATTENTIONS:
        needs = _needs(model, attention)
        for drafter in drafters:
            for tree in trees:
                if (tree in BY_COPIES and drafter == "self") or (tree in BY_SCORES and drafter != "self"):
                    continue
                run = partial(decoded, model=model, attention=attention, drafter=drafter, tree=tree)
                turn = _turn(attention, drafter, tree)
                found.append(Cell(f"{attention}/{drafter}/{tree}", run, 0.2, needs, turn))
    for tree in trees:
        run = partial(boundary, model=model, drafter=COPIES, tree=tree)
        if not tree.startswith("dynamic"):
            turn = FIRST if tree == MIDDLE else BROAD
            found.append(Cell(f"{BOUNDARY}/{tree}", run, 0.2, _needs(model, AUGMENTED), turn))
    if not setup.quick:
        run = partial(boundary, model=model, drafter=COPIES, tree=MIDDLE, attention=WITHOUT_LOCAL)
        found.append(Cell(f"{BOUNDARY}/no local branch/{MIDDLE}", run, 0.2, _needs(model, WITHOUT_LOCAL), BROAD))
    return found


def _turn(attention: str, drafter: str, tree: str) -> int:
    if attention == AUGMENTED:
        return FIRST if drafter == DRAFTERS[-1] and tree == MIDDLE else BROAD
    return DEEP if attention in IN_SHORT and drafter == DRAFTERS[-1] and tree == MIDDLE else LAST


def _needs(model: str, attention: str) -> tuple[str, ...]:
    own = (TEACHER,) if model == OWN else ()
    return (*own, f"{LINEARIZE}/{cell_name(model, attention, 0)}")


@lru_cache(maxsize=1)
def _subject(setup: Setup, model: str, attention: str) -> tuple[Session, Generator]:
    """A student and its plain decoding, which cells of the same attention compile once."""
    name = cell_name(model, attention, 0)
    student = load_student(setup, LINEARIZE, name, load_teacher(setup, model), attention)
    session = Session.of(student.model, student.tokenizer, ())
    return session, Generator(session.model)


def decoded(setup: Setup, *, model: str, attention: str, drafter: str, tree: str) -> dict[str, Any]:
    """Tokens a second of plain decoding and of speculation, in turns, and tokens a step."""
    session, plain = _subject(setup, model, attention)
    texts, drafted = prompts(setup, model), _drafting(session, drafter, tree)
    ratios, rates = [], []
    for turn in range(setup.sizes.rounds + 1):
        pair = [_each(way, texts, setup.sizes.new_tokens) for way in (plain, drafted)]
        seconds = [sum(each.decode_seconds for each in way) for way in pair]
        if turn:
            ratios.append(seconds[0] / seconds[1])
            rates.append([sum(each.decoded for each in way) / spent for way, spent in zip(pair, seconds, strict=True)])
    wrong = _wrong(session, texts, *pair)
    return {
        "model": model,
        "attention": attention,
        "drafter": drafter,
        "tree": tree,
        "speedup": median(ratios),
        "plain_tokens_per_second": median(each[0] for each in rates),
        "tokens_per_second": median(each[1] for each in rates),
        "tokens_a_step": _tokens_a_step(pair[1]),
        "wrong": wrong,
    }


def boundary(setup: Setup, *, model: str, drafter: str, tree: str, attention: str = AUGMENTED) -> dict[str, Any]:
    """Tokens that change, and tokens a step, with the published boundary and with ours, if all drafts are right.

    A draft that is refused where it goes on in the next group would be accepted by plain decoding.
    """
    register()
    teacher, name = load_teacher(setup, model), cell_name(model, attention, 0)
    student = load_student(setup, LINEARIZE, name, teacher, attention)
    theirs = Session.of(with_attention(student.model, sized(published(attention), setup)), student.tokenizer, ())
    subjects = {"ours": _subject(setup, model, attention), "published": (theirs, Generator(theirs.model))}
    texts, new = prompts(setup, model), CROSSED * setup.sizes.group
    found: dict[str, Any] = {
        "model": model,
        "attention": attention,
        "drafter": drafter,
        "boundary_tree": tree,
        "tokens": len(texts) * new,
    }
    batches = held_out(setup, model)
    losses = [token_losses(each, batches) for each in (ablated(student.model, "memory"), student.model)]
    found["without_memory"] = ratio(*losses).value
    for kind, (session, decoding) in subjects.items():
        plain = _each(decoding, texts, new)
        memory = TextMemory()
        for text, done in zip(texts, plain, strict=True):
            memory.add([*text, *done.tokens[0]])
        copying = build_drafter(drafter, replace(session.parts, memory=memory))
        drafted = _each(Generator(session.model, drafter=copying, tree=parse_tree(tree)), texts, new)
        same = agreement([each.tokens[0] for each in plain], [each.tokens[0] for each in drafted])
        found[kind] = {
            "equal": same.equal,
            "identical": same.identical,
            "wrong": _wrong(session, texts, plain, drafted),
            "tokens_a_step": _tokens_a_step(drafted),
        }
    return found


def _drafting(session: Session, drafter: str, tree: str) -> Generator:
    # The first half of the layers drafts for all of them, where the model drafts for itself.
    parts = replace(session.parts, layers=tuple(range(max(session.model.layers.count // 2, 1))))
    return Generator(session.model, drafter=build_drafter(drafter, parts), tree=parse_tree(tree))


def _each(generator: Generator, texts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
    """Every text on its own, which no end token stops."""
    return [generator.generate([each], new_tokens) for each in texts]


def _tokens_a_step(done: Sequence[Generation]) -> float:
    return sum(each.decoded for each in done) / max(sum(sum(each.steps) for each in done), 1)


def _wrong(
    session: Session, texts: Sequence[Sequence[int]], plain: Sequence[Generation], drafted: Sequence[Generation]
) -> int:
    """Texts that differ from plain decoding's at a token that rounding does not decide."""
    pairs = [(text, one.tokens[0], other.tokens[0]) for text, one, other in zip(texts, plain, drafted, strict=True)]
    return sum(
        one != other and not is_rounding_tie(session.model, text, one, other, Sampling(), 0)
        for text, one, other in pairs
    )


def table(results: Results) -> list[str]:
    """Speeds, and below them both boundaries."""
    head = [
        "attention",
        "drafter",
        "tree",
        "plain, tokens/s",
        "drafted, tokens/s",
        "speed-up",
        "tokens a step",
        "wrong texts",
    ]
    rows = [
        [
            f"`{attention}`",
            drafter,
            tree,
            f"{each['plain_tokens_per_second']:,.0f}",
            f"{each['tokens_per_second']:,.0f}",
            f"{each['speedup']:.2f}",
            f"{each['tokens_a_step']:.2f}",
            str(each["wrong"]),
        ]
        for (attention, drafter, tree), (each, *_) in grouped(results, "attention", "drafter", "tree").items()
    ]
    edges = [
        [
            f"`{each.get('attention', AUGMENTED)}`",
            each["boundary_tree"],
            f"{each['without_memory']:,.3f}" if "without_memory" in each else "-",
            *(
                f"{100 * (1 - each[name]['equal']):.2f} %, {each[name]['wrong']} texts"
                for name in ("published", "ours")
            ),
            *(f"{each[name]['tokens_a_step']:.3f}" for name in ("published", "ours")),
        ]
        for each in _boundaries(results)
    ]
    below = [
        "attention",
        "tree",
        "perplexity without memory / with it",
        "tokens changed by the published boundary",
        "by ours",
        "tokens a step, published",
        "ours",
    ]
    lines = markdown_table(head, rows)
    return [*lines, *([""] if lines and edges else []), *markdown_table(below, edges)]


def plot(results: Results, file: Path) -> bool:
    """A bar for each attention, drafter and tree."""
    found = grouped(results, "attention", "drafter", "tree").items()
    return draw_bars({", ".join(key): each[0]["speedup"] for key, each in found}, "speed over plain decoding", file)


def twice_as_fast(results: Results) -> tuple[Verdict, str]:
    """Decides whether the best of all is about twice as fast as plain linear attention."""
    found = [each for each in results.values() if "speedup" in each]
    if not found:
        return None, ""
    best = max(found, key=lambda each: each["speedup"])
    figures = f"{best['speedup']:.2f} times at best ({best['attention']}, {best['drafter']}, {best['tree']})"
    token = 1000 / best["plain_tokens_per_second"]
    return best["speedup"] >= 1.8, f"{figures}, without trained heads, where a token takes {token:.2f} ms plainly"


def lossless(results: Results) -> tuple[Verdict, str]:
    """Decides whether speculation changes no text."""
    drafted = [each for each in results.values() if "speedup" in each]
    counts = [each["wrong"] for each in drafted] + [each["ours"]["wrong"] for each in _boundaries(results)]
    if not counts:
        return None, ""
    return not any(counts), f"{sum(counts)} texts differ beyond rounding, in {len(counts)} cells of several texts"


def published_changes(results: Results) -> tuple[Verdict, str]:
    """Decides whether the published boundary changes texts; a student to whom its memory is nothing cannot tell."""
    found = _boundaries(results)
    if not found:
        return None, ""
    telling = [each for each in found if each.get("without_memory", math.inf) >= 1 + NOTHING]
    silent = {each.get("attention", AUGMENTED): each["without_memory"] for each in found if each not in telling}
    changes = any(each["published"]["wrong"] for each in found)
    changed = max(1 - each["published"]["equal"] for each in found)
    figures = [_boundary_words(each) for each in telling] or [f"at most {100 * changed:.2f} % of the tokens differ"]
    figures += [
        f"{name} has no use for its memory: without it, its perplexity is {worth:.3f} times as high"
        for name, worth in silent.items()
    ]
    return (changes if telling or changes else None), "; ".join(figures)


def _boundary_words(each: Mapping[str, Any]) -> str:
    fewer = 1 - each["published"]["tokens_a_step"] / each["ours"]["tokens_a_step"]
    name, changed = each.get("attention", AUGMENTED), 100 * (1 - each["published"]["equal"])
    return f"{name}, {each['boundary_tree']}: {changed:.2f} % of the tokens differ, {100 * fewer:.0f} % fewer a step"


def _boundaries(results: Results) -> list[Mapping[str, Any]]:
    return [each for each in results.values() if "boundary_tree" in each]


PART = Part(
    NAME,
    "Speculation",
    "Students of the first part continue held-out stories one at a time, plainly and with drafts in turns. No heads "
    "are trained for drafting, students write badly after so little training, and a model this small writes a token in "
    "a fraction of a millisecond: what drafts cost is not won back (the README has figures of trained heads and larger "
    "models). The boundary: the published code forgets the group that just ended for drafts that go on in the next "
    "one. Its texts and acceptance are beside ours, with drafts that are all right: copies of what plain decoding "
    "wrote.",
    cells,
    table,
    plot,
    (
        Claim("With speculation, up to twice as fast as linear attention before.", twice_as_fast),
        Claim("Speculation changes no text (this package's claim).", lossless),
        Claim("The published group boundary changes texts (this package's claim).", published_changes),
    ),
    timed="speedup",
)
