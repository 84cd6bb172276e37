"""Parts of the study, in their order, and the cells of some of them with all that they need."""

from collections.abc import Sequence

from lib.study import ablations, encoders, linearize, long_context, scratch, speculation
from lib.study.cells import LAST, Cell, Part, Setup

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        linearize.PART,
        scratch.PART,
        encoders.PART,
        long_context.PART,
        speculation.PART,
        ablations.PART,
    )
}


def all_cells(setup: Setup) -> dict[str, Cell]:
    """The cells of all parts by `PART/NAME`; what a cell needs stands before it."""
    return {f"{part.name}/{cell.name}": cell for part in PARTS.values() for cell in part.cells(setup)}


def chosen_cells(setup: Setup, parts: Sequence[str], words: Sequence[str] = ()) -> dict[str, Cell]:
    """The cells of some parts, those alone whose name has one of some words if any are given, and what they need.

    They stand in the order in which they are run: by their turns, and what a cell needs before it. The short study has
    no cells of the last turn, unless words name them.
    """
    cells = all_cells(setup)
    turns = {
        name: cell.turn
        for name, cell in cells.items()
        if name.split("/")[0] in parts
        and (any(word in name for word in words) if words else cell.turn < LAST or not setup.short)
    }
    for name in reversed(cells):
        for each in cells[name].needs if name in turns else ():
            turns[each] = min(turns[name], turns.get(each, LAST))
    return {name: cells[name] for name in sorted(cells, key=lambda name: turns.get(name, 0)) if name in turns}
