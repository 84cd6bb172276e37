"""Part 6: what each piece of the augmentation is worth, and what a convolution without a mask does."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lib.study.attentions import AUGMENTED, sized
from lib.study.cells import BROAD, FIRST, PARTLY, Cell, Claim, Part, Results, Setup, Verdict
from lib.study.drawing import MOST, draw_bars, grouped, markdown_table
from lib.study.linearize import NAME as LINEARIZE
from lib.study.linearize import TEACHER, WHOLE, cell_name
from lib.study.models import (
    OWN,
    held_out,
    linearized,
    load_student,
    load_teacher,
    teacher_losses,
    teacher_texts,
    texts,
    train_on_text,
)
from lib.study.training import linearize_in_memory
from lib.study.variants import MASKED, UNMASKED, register

from lin_jax.evaluation.ablation import ablated, ablations
from lin_jax.evaluation.agreement import agreement
from lin_jax.evaluation.token_losses import ratio, token_losses
from lin_jax.training.model_source import with_attention

NAME = "ablations"
MINUTES = 0.6
WHOLE_OF_IT = "all of it"
# Trained anew, by what is changed.
TRAINED = {
    WHOLE_OF_IT: AUGMENTED,
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
    found = [Cell("left out", partial(left_out, model=model), 0.5, (*own, student), FIRST)]
    if not setup.quick:
        for change, attention in TRAINED.items():
            name = f"trained/{change}"
            run = partial(trained, name=name, model=model, change=change, attention=attention)
            turn = FIRST if change == WHOLE_OF_IT or change.startswith("no ") else BROAD
            found.append(Cell(name, run, MINUTES, own, turn))
    for name, run in (("no mask", unmasked), ("with a mask", masked)):
        found.append(Cell(name, partial(run, name=name, model=model, learns="text"), 2 * MINUTES, own, FIRST))
    return found


def left_out(setup: Setup, *, model: str) -> dict[str, Any]:
    """Perplexities of a trained student without one of its branches, which is not trained anew."""
    student = load_student(setup, LINEARIZE, cell_name(model, AUGMENTED, 0), load_teacher(setup, model), AUGMENTED)
    batches, expected = held_out(setup, model), teacher_losses(setup, model)
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
    assert learns == "text"
    return {**_filtered(setup, model, UNMASKED), "name": name}


def masked(setup: Setup, *, name: str, model: str, learns: str) -> dict[str, Any]:
    """Trains the same student in the same way, but for the mask in its filter: the control of `unmasked`."""
    assert learns == "text"
    return {**_filtered(setup, model, MASKED), "name": name, "masked": True}


def _filtered(setup: Setup, model: str, filtered: str) -> dict[str, Any]:
    register()
    teacher = load_teacher(setup, model)
    attention = sized(filtered, setup)
    linear, seconds = linearize_in_memory(setup, teacher.model, teacher.tokenizer, attention, 0)
    student = train_on_text(setup, replace(teacher, model=linear))
    decoding = replace(student, model=with_attention(student.model, sized(MASKED, setup)))
    own, written = teacher_texts(setup, model), texts(setup, decoding, model)
    return {
        "model": model,
        "teacher_perplexity": teacher_losses(setup, model).perplexity,
        "perplexity_with_future": token_losses(student.model, held_out(setup, model)).perplexity,
        "perplexity_as_it_decodes": token_losses(decoding.model, held_out(setup, model)).perplexity,
        "equal": agreement(own, written).equal,
        "repeated": _repeated(written),
        "repeated_by_teacher": _repeated(own),
        "text": teacher.tokenizer.decode(written[0][:SHOWN]),
        "seconds_of_linearization": seconds,
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
    filters = _filters(results)
    lines += ["", *_filter_lines(filters)] if filters else []
    return lines[1:] if lines and not lines[0] else lines


def _filters(results: Results) -> dict[bool, Any]:
    """The students of a filter without a mask (False) and with one (True), those that are there."""
    return {each.get("masked", False): each for each in results.values() if "perplexity_with_future" in each}


def _filter_lines(filters: Mapping[bool, Any]) -> list[str]:
    """The student whose filter sees the future, and beside it the one whose filter does not."""

    def row(name: str, shown: Callable[[Any], str]) -> list[str]:
        return [name, *(shown(filters[masked]) if masked in filters else "not yet run" for masked in (False, True))]

    rows = [
        row("the teacher's perplexity", lambda each: f"{each['teacher_perplexity']:.2f}"),
        row("perplexity on whole rows, as in training", lambda each: f"{each['perplexity_with_future']:.2f}"),
        row(
            "perplexity as it decodes, a token after the other", lambda each: f"{each['perplexity_as_it_decodes']:,.2f}"
        ),
        row("tokens equal to the teacher's in free text", lambda each: f"{each['equal']:.3f}"),
        row(
            "repetitions in its text, in the teacher's",
            lambda each: f"{each['repeated']:.2f}, {each['repeated_by_teacher']:.2f}",
        ),
    ]
    lines = markdown_table(["convolution", "without a mask", "with a mask"], rows)
    for masked, name in ((False, "Without a mask"), (True, "With a mask")):
        if masked in filters:
            text = filters[masked]["text"].replace("`", "'").replace("\n", " ")
            lines += ["", f"{name} it writes: `{text}`"]
    return lines


def plot(results: Results, file: Path) -> bool:
    """A bar for each change."""
    bars = {change: each[0]["ratio"]["value"] for (change,), each in grouped(results, "change").items()}
    return draw_bars(bars, "perplexity over the teacher's", file, most=MOST)


def every_branch_helps(results: Results) -> tuple[Verdict, str]:
    """Decides whether a student without a branch, trained as long, has a higher perplexity."""
    found = {change: each[0]["ratio"]["value"] for (change,), each in grouped(results, "change").items()}
    without = {name: value for name, value in found.items() if name.startswith("no ")}
    if WHOLE_OF_IT not in found or not without:
        return None, ""
    shown = ", ".join(f"{name} {value:.3f}" for name, value in without.items())
    figures = f"times the teacher's perplexity: {WHOLE_OF_IT} {found[WHOLE_OF_IT]:.3f}, {shown}"
    helps = [value > found[WHOLE_OF_IT] for value in without.values()]
    if missing := [name for name in TRAINED if name.startswith("no ") and name not in without]:
        figures += f"; not yet run: {', '.join(missing)}"
    if all(helps):
        return None if missing else True, figures
    return PARTLY if any(helps) else False, figures


def mask_is_needed(results: Results) -> tuple[Verdict, str]:
    """Decides whether a filter without a mask looks better than the teacher on whole rows, and fails as it decodes.

    The same student with a mask, trained the same way, must not fail.
    """
    found = _filters(results)
    if False not in found:
        return None, ""
    teacher = found[False]["teacher_perplexity"]
    seen, real = found[False]["perplexity_with_future"], found[False]["perplexity_as_it_decodes"]
    figures = f"{seen:.2f} with the future in sight, {real:,.2f} as it decodes"
    holds = seen < teacher and real > MOST * teacher
    if True in found:
        control = found[True]["perplexity_as_it_decodes"]
        figures += f"; with a mask {control:,.2f} both ways (the teacher's: {teacher:.2f})"
        holds = holds and control < real / 2
    return holds, figures


PART = Part(
    NAME,
    "Ablations",
    "Pieces of augmented attention are left out or changed, each trained on the budget of the first part; branches are "
    "also left out of a trained student. The filter without a mask learns the next token from the text after it was "
    "linearized: a teacher does not tell that to look ahead is worth anything. Beside it stands the same student with "
    "a mask, trained the same way.",
    cells,
    table,
    plot,
    (
        Claim("Each branch of the augmentation lowers perplexity.", every_branch_helps),
        Claim("Without a mask in the convolution, perplexity falls absurdly and generation fails.", mask_is_needed),
    ),
)
