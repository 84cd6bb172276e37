"""Part 1: softmax LLaMAs linearized with every attention, on the same budget."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import mean

from lib.study.attentions import AUGMENTED, PAPER, both, grid, main_rows
from lib.study.cells import BROAD, DEEP, FIRST, LAST, Cell, Claim, Part, Results, Setup
from lib.study.drawing import MOST, draw_bars, grouped, markdown_table, spread
from lib.study.models import OWN, linearized, teachers, train_teacher

NAME = "linearize"
TEACHER = f"{NAME}/teacher"
# The teacher on which all variants are tried, and the minutes that a student of each takes.
WHOLE = "stories260K"
MINUTES = {"stories260K": 0.6, "babyllama105": 0.8, "babyllama361": 0.8, OWN: 5.0}
# Teachers of the short study, and the attentions that are tried first, bare and augmented.
IN_SHORT = ("stories260K", "babyllama105")
EARLY = ("flash_global", "relu")
SEEDS = (0, 1, 2)
QUICK = (AUGMENTED,)


def cell_name(model: str, attention: str, seed: int) -> str:
    """Name of the cell that linearizes a teacher."""
    return f"{model}/{attention}/{seed}"


def cells(setup: Setup) -> list[Cell]:
    """The teacher that is trained here, then all students, those of the main rows with three seeds."""
    found = [Cell("teacher", partial(train_teacher), 10.0)]
    for model in teachers(setup):
        main = QUICK if setup.quick else main_rows()
        names = grid() if model == WHOLE else main
        for attention in names:
            seeds = SEEDS if attention in main and not setup.quick and model == WHOLE else SEEDS[:1]
            found += [_cell(model, attention, seed) for seed in seeds]
    return found


def _cell(model: str, attention: str, seed: int) -> Cell:
    name = cell_name(model, attention, seed)
    run = partial(linearized, part=NAME, name=name, model=model, attention=attention, seed=seed)
    return Cell(name, run, MINUTES[model], (TEACHER,) if model == OWN else (), _turn(model, attention, seed))


def _turn(model: str, attention: str, seed: int) -> int:
    if attention not in main_rows() or model not in IN_SHORT:
        return LAST
    early = attention in {name for base in EARLY for name in (base, both(base))}
    if seed:
        return DEEP if early else LAST
    return DEEP if model != WHOLE else FIRST if early else BROAD


def table(results: Results) -> list[str]:
    """A row for each teacher and attention."""
    head = ["teacher", "attention", "seeds", "perplexity / teacher's", "equal tokens", "state, bytes", "training, s"]
    rows = []
    for (model, attention), seeds in grouped(results, "model", "attention").items():
        rows.append(
            [
                model,
                f"`{attention}`",
                str(len(seeds)),
                spread([each["ratio"]["value"] for each in seeds]),
                spread([each["agreement"]["equal"] for each in seeds]),
                f"{seeds[0]['state_bytes']:,}",
                f"{mean(each['seconds_of_training'] for each in seeds):,.0f}",
            ]
        )
    return markdown_table(head, rows)


def plot(results: Results, file: Path) -> bool:
    """A bar for each teacher and attention."""
    found = grouped(results, "model", "attention").items()
    bars = {f"{model}, {name}": mean(each["ratio"]["value"] for each in seeds) for (model, name), seeds in found}
    return draw_bars(bars, "perplexity over the teacher's", file, most=MOST)


def _pairs(results: Results) -> list[tuple[str, float, float]]:
    """Perplexities of the bare and of the augmented attention, where both are there."""
    found = {
        key: mean(each["perplexity"] for each in seeds) for key, seeds in grouped(results, "model", "attention").items()
    }
    return [
        (f"{name} on {model}", found[model, name], found[model, both(name)])
        for model, name in found
        if name in PAPER and (model, both(name)) in found
    ]


def bare_fail(results: Results) -> tuple[bool | None, str]:
    """Decides whether bare attentions lose much: at least half again of the teacher's perplexity, most of them."""
    found = [
        mean(each["ratio"]["value"] for each in seeds)
        for (_, name), seeds in grouped(results, "model", "attention").items()
        if name in PAPER
    ]
    if not found:
        return None, ""
    bad = sum(value > 1.5 for value in found)
    figures = f"{bad} of {len(found)} lose more than half of the teacher's perplexity"
    run = {name for _, name in grouped(results, "model", "attention")}
    return bad > len(found) / 2, figures + _not_run(name for name in PAPER if name not in run)


def augmentation_repairs(results: Results) -> tuple[bool | None, str]:
    """Decides whether the augmentation lowers every attention's perplexity."""
    pairs = _pairs(results)
    if not pairs:
        return None, ""
    worse = [name for name, bare, augmented in pairs if augmented >= bare]
    name, bare, augmented = max(pairs, key=lambda each: each[1] - each[2])
    figures = f"at most by {bare - augmented:.2f} ({name}: {bare:.2f} to {augmented:.2f})"
    figures += f"; not for {', '.join(worse)}" if worse else ""
    run = {name.partition(" on ")[0] for name, _, _ in pairs}
    return not worse, figures + _not_run(name for name in PAPER if name not in run)


def _not_run(names: Iterable[str]) -> str:
    """What a claim about all of the paper's attentions says nothing of yet."""
    missing = ", ".join(names)
    return f"; not yet run: {missing}" if missing else ""


PART = Part(
    NAME,
    "Pretrained LLaMAs, linearized",
    "Every attention takes the place of softmax in the same teachers and learns on the same budget: attention transfer "
    "for two thirds of the steps, then distillation. Perplexity is that of held-out stories; equal tokens are those of "
    "texts that both write freely.",
    cells,
    table,
    plot,
    (
        Claim("Linear attentions that work in encoders lose much in autoregressive decoders.", bare_fail),
        Claim("The augmentation repairs them: up to 6.67 lower perplexity on LLaMA.", augmentation_repairs),
    ),
)
