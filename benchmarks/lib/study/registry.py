"""Parts of the study, in their order, and the cells of some of them with all that they need."""

from collections.abc import Sequence

from lib.study import ablations, encoders, linearize, long_context, scratch, speculation
from lib.study.cells import Cell, Part, Setup

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

    The short study has few of them, unless words name others.
    """
    cells = all_cells(setup)
    wanted = [
        name
        for name, cell in cells.items()
        if name.split("/")[0] in parts
        and (any(word in name for word in words) if words else cell.short or not setup.short)
    ]
    needed = set(wanted)
    for name in reversed(cells):
        if name in needed:
            needed |= set(cells[name].needs)
    return {name: cell for name, cell in cells.items() if name in needed}
