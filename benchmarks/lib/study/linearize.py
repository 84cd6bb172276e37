"""Part 1: softmax LLaMAs linearized with every attention, on the same budget."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import mean

from lib.study.attentions import AUGMENTED, PAPER, both, grid, main_rows
from lib.study.cells import BROAD, DEEP, FIRST, LAST, PARTLY, Cell, Claim, Part, Results, Setup, Verdict
from lib.study.drawing import MOST, draw_bars, grouped, markdown_table, spread, training_seconds
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
# A perplexity so many times the teacher's is much worse.
MUCH = 1.5
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
                training_seconds(seeds),
            ]
        )
    return markdown_table(head, rows)


def plot(results: Results, file: Path) -> bool:
    """A bar for each teacher and attention."""
    found = grouped(results, "model", "attention").items()
    bars = {f"{model}, {name}": mean(each["ratio"]["value"] for each in seeds) for (model, name), seeds in found}
    augmented = {name for name in bars if "convolution" in name}
    title = "perplexity over the teacher's, augmented in orange"
    return draw_bars(bars, title, file, most=MOST, marked=augmented)


def _ratios(results: Results) -> dict[tuple[str, str], float]:
    """Perplexity over the teacher's, by teacher and attention."""
    found = grouped(results, "model", "attention").items()
    return {key: mean(each["ratio"]["value"] for each in seeds) for key, seeds in found}


def bare_fail(results: Results) -> tuple[Verdict, str]:
    """Decides whether bare attentions lose much: at least half again of the teacher's perplexity, most of them."""
    found = {key: value for key, value in _ratios(results).items() if key[1] in PAPER}
    if not found:
        return None, ""
    bad = [value for value in found.values() if value > MUCH]
    figures = f"{len(bad)} of {len(found)} have more than {MUCH} times their teacher's perplexity"
    if bad:
        figures += f" ({min(bad):.2f} to {max(bad):.2f})"
    good = [f"{name} on {model} {value:.2f}" for (model, name), value in found.items() if value <= MUCH]
    figures += f"; not {', '.join(good)}" if good else ""
    run = {name for _, name in found}
    return len(bad) > len(found) / 2, figures + _not_run(name for name in PAPER if name not in run)


def augmentation_repairs(results: Results) -> tuple[Verdict, str]:
    """Decides whether the augmentation lowers every attention's perplexity."""
    found, ratios = _perplexities(results), _ratios(results)
    pairs = [key for key in found if key[1] in PAPER and (key[0], both(key[1])) in found]
    if not pairs:
        return None, ""

    def augmented(key: tuple[str, str]) -> tuple[str, str]:
        return key[0], both(key[1])

    def shown(key: tuple[str, str]) -> str:
        return f"{key[1]} on {key[0]}: {found[key]:.2f} to {found[augmented(key)]:.2f}"

    better = [key for key in pairs if found[augmented(key)] < found[key]]
    figures = f"lower in {len(better)} of {len(pairs)}"
    if better:
        best = max(better, key=lambda key: found[key] - found[augmented(key)])
        left = [ratios[augmented(key)] for key in better]
        figures += f", by up to {found[best] - found[augmented(best)]:.2f} ({shown(best)})"
        figures += f", and then {min(left):.2f} to {max(left):.2f} times the teacher's"
    worse = [shown(key) for key in pairs if key not in better]
    figures += f"; higher: {', '.join(worse)}" if worse else ""
    run = {name for _, name in pairs}
    figures += _not_run(name for name in PAPER if name not in run)
    return (PARTLY if worse else True) if better else False, figures


def _perplexities(results: Results) -> dict[tuple[str, str], float]:
    found = grouped(results, "model", "attention").items()
    return {key: mean(each["perplexity"] for each in seeds) for key, seeds in found}


def _not_run(names: Iterable[str]) -> str:
    """What a claim about all of the paper's attentions says nothing of yet."""
    missing = ", ".join(names)
    return f"; not yet run: {missing}" if missing else ""


PART = Part(
    NAME,
    "Pretrained LLaMAs, linearized",
    "Every attention takes the place of softmax in the same teachers and learns on the same budget: attention transfer "
    "for two thirds of the steps, then distillation. Perplexity is that of held-out stories. Equal tokens: the share "
    "of the teacher's greedy continuations that a student's own repeat, place by place.",
    cells,
    table,
    plot,
    (
        Claim("Linear attentions that work in encoders lose much in autoregressive decoders.", bare_fail),
        Claim(
            "The augmentation repairs them (in the paper: up to 6.67 lower perplexity, LLaMA).", augmentation_repairs
        ),
    ),
)
