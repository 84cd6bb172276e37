"""Part 6: what each piece of the augmentation is worth, and what a convolution without a mask does."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lib.study.attentions import AUGMENTED, sized
from lib.study.cells import Cell, Claim, Part, Results, Setup
from lib.study.drawing import MOST, draw_bars, grouped, markdown_table
from lib.study.linearize import NAME as LINEARIZE
from lib.study.linearize import TEACHER, WHOLE, cell_name
from lib.study.models import (
    OWN,
    Model,
    compared,
    held_out,
    linearized,
    load_student,
    load_teacher,
    texts,
    train_on_text,
    train_student,
)
from lib.study.variants import MASKED, UNMASKED, register

from lin_jax.evaluation.ablation import ablated, ablations
from lin_jax.evaluation.agreement import agreement
from lin_jax.evaluation.token_losses import ratio, token_losses
from lin_jax.training.model_source import with_attention

NAME = "ablations"
MINUTES = 4.0
# Trained anew, by what is changed.
TRAINED = {
    "all of it": AUGMENTED,
    "no local branch": "flash_global+convolution",
    "no grouped branch": "flash_local+convolution",
    "no convolution": "flash_global+local",
    "alpha fixed at 1": "flash+convolution",
    "alpha begins at 1": f"{AUGMENTED}/initial_alpha=1",
    "Laplace instead of relu^2": f"{AUGMENTED}/local_score=laplace",
    "softmax instead of relu^2, one normaliser": "exponential+window+convolution",
    "a normaliser for the grouped branch": "relu+local+convolution",
}
# A text of the unmasked model that is shown, in tokens.
SHOWN = 48


def cells(setup: Setup) -> list[Cell]:
    """Branches left out of a trained student, everything trained anew, and the filter without a mask."""
    model = OWN if setup.quick else WHOLE
    own = (TEACHER,) if model == OWN else ()
    student = f"{LINEARIZE}/{cell_name(model, AUGMENTED, 0)}"
    found = [Cell("left out", partial(left_out, model=model), 2.0, (*own, student), short=True)]
    if not setup.quick:
        for change, attention in TRAINED.items():
            name = f"trained/{change}"
            run = partial(trained, name=name, model=model, change=change, attention=attention)
            found.append(Cell(name, run, MINUTES, own, short=True))
    return [
        *found,
        Cell("no mask", partial(unmasked, name="no mask", model=model, learns="text"), 2 * MINUTES, own, short=True),
    ]


def left_out(setup: Setup, *, model: str) -> dict[str, Any]:
    """Perplexities of a trained student without one of its branches, which is not trained anew."""
    student = load_student(setup, LINEARIZE, cell_name(model, AUGMENTED, 0))
    teacher = load_teacher(setup, model)
    batches = held_out(setup, teacher.tokenizer)
    expected = token_losses(teacher.model, batches)
    whole = ratio(token_losses(student.model, batches), expected)
    without = {
        branch: vars(ratio(token_losses(ablated(student.model, branch), batches), expected))
        for branch in ablations(student.model)
    }
    return {"model": model, "whole": vars(whole), "without": without}


def trained(setup: Setup, *, name: str, model: str, change: str, attention: str) -> dict[str, Any]:
    """Linearizes with something changed."""
    return {"change": change, **linearized(setup, part=NAME, name=name, model=model, attention=attention, seed=0)}


def unmasked(setup: Setup, *, name: str, model: str, learns: str) -> dict[str, Any]:
    """Trains with a filter that sees the future; measured on whole rows, and as it decodes.

    The student is linearized first, and then learns the next token itself: a teacher does not tell that to look ahead
    is worth anything, the text does.
    """
    register()
    teacher = load_teacher(setup, model)
    student, folder = train_student(setup, NAME, name, teacher, sized(UNMASKED, setup), 0)
    student = train_on_text(setup, student, folder / learns)
    batches = held_out(setup, teacher.tokenizer)
    decoding = Model(with_attention(student.model, sized(MASKED, setup)), student.tokenizer, student.ends)
    own, written = (texts(setup, each, batches) for each in (teacher, decoding))
    decoded = compared(setup, teacher, decoding)
    return {
        "model": model,
        "teacher_perplexity": decoded["teacher_perplexity"],
        "perplexity_with_future": token_losses(student.model, batches).perplexity,
        "perplexity_as_it_decodes": decoded["perplexity"],
        "equal": agreement(own, written).equal,
        "repeated": _repeated(written),
        "repeated_by_teacher": _repeated(own),
        "text": teacher.tokenizer.decode(written[0][:SHOWN]),
    }


def _repeated(written: list[list[int]]) -> float:
    """Share of the tokens that have stood in the same order in their text before, three at a time."""
    shares = []
    for text in written:
        threes = [tuple(text[place : place + 3]) for place in range(len(text) - 2)]
        shares.append(1 - len(set(threes)) / len(threes) if threes else 0.0)
    return float(np.mean(shares))


def table(results: Results) -> list[str]:
    """What was trained anew, what was left out, and the filter without a mask."""
    rows = [
        [change, f"`{each['attention']}`", f"{each['ratio']['value']:.3f}", f"{each['agreement']['equal']:.3f}"]
        for (change,), (each, *_) in grouped(results, "change").items()
    ]
    lines = markdown_table(["trained with", "attention", "perplexity / teacher's", "equal tokens"], rows)
    for each in results.values():
        if "without" in each:
            left = [[branch, f"{found['value']:.3f}"] for branch, found in each["without"].items()]
            head = ["left out after training", "perplexity / teacher's"]
            lines += ["", *markdown_table(head, [["nothing", f"{each['whole']['value']:.3f}"], *left])]
        if "perplexity_with_future" in each:
            lines += ["", *_unmasked_lines(each)]
    return lines[1:] if lines and not lines[0] else lines


def _unmasked_lines(each: Any) -> list[str]:
    head = ["convolution without a mask", "figure"]
    rows = [
        ["the teacher's perplexity", f"{each['teacher_perplexity']:.2f}"],
        ["perplexity on whole rows, the future in sight", f"{each['perplexity_with_future']:.2f}"],
        ["perplexity as it decodes, without the future", f"{each['perplexity_as_it_decodes']:,.2f}"],
        ["tokens equal to the teacher's in free text", f"{each['equal']:.3f}"],
        ["repetitions in its text, in the teacher's", f"{each['repeated']:.2f}, {each['repeated_by_teacher']:.2f}"],
    ]
    text = each["text"].replace("`", "'").replace("\n", " ")
    return [*markdown_table(head, rows), "", f"It writes: `{text}`"]


def plot(results: Results, file: Path) -> bool:
    """A bar for each change."""
    bars = {change: each[0]["ratio"]["value"] for (change,), each in grouped(results, "change").items()}
    return draw_bars(bars, "perplexity over the teacher's", file, most=MOST)


def every_branch_helps(results: Results) -> tuple[bool | None, str]:
    """Decides whether a student without a branch, trained as long, has a higher perplexity."""
    found = {change: each[0]["ratio"]["value"] for (change,), each in grouped(results, "change").items()}
    without = {name: value for name, value in found.items() if name.startswith("no ")}
    if "all of it" not in found or not without:
        return None, ""
    shown = ", ".join(f"{name} {value:.3f}" for name, value in without.items())
    return min(without.values()) > found["all of it"], f"all of it {found['all of it']:.3f}, {shown}"


def mask_is_needed(results: Results) -> tuple[bool | None, str]:
    """Decides whether a filter without a mask looks better than the teacher on whole rows, and fails as it decodes."""
    for each in results.values():
        if "perplexity_with_future" in each:
            seen, real = each["perplexity_with_future"], each["perplexity_as_it_decodes"]
            low, high = seen < each["teacher_perplexity"], real > MOST * each["teacher_perplexity"]
            return low and high, f"{seen:.2f} with the future in sight, {real:,.2f} as it decodes"
    return None, ""


PART = Part(
    NAME,
    "Ablations",
    "Pieces of augmented attention are left out or changed, each trained on the budget of the first part; branches are "
    "also left out of a trained student. The filter without a mask learns the next token from the text after it was "
    "linearized: a teacher does not tell that to look ahead is worth anything.",
    cells,
    table,
    plot,
    (
        Claim("Each branch of the augmentation lowers perplexity.", every_branch_helps),
        Claim("Without a mask in the convolution, perplexity falls absurdly and generation fails.", mask_is_needed),
    ),
)
