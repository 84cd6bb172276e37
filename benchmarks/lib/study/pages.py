"""The study's report: claims beside what was found, a chapter for each part, and all results as JSON."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.study.cells import Cell, Part
from lib.study.drawing import markdown_table
from lib.study.registry import PARTS, chosen_cells
from lib.study.runner import Store, duration, records

from lin_jax.errors import UserError

WARNING = (
    "**This is a quick trial with tiny models and few steps. It shows that everything runs; its figures say nothing.**"
)
SHORT = (
    "**This is the short study: a seventh of the training, short continuations, fewer seeds and tasks. Students are "
    "still far from their teacher; what is compared is how far each attention comes on the same budget.**"
)

# What the table of claims stands between in another file.
CLAIMS_MARK = "<!-- study -->"
# A process that has its processor for so much of the time has it to itself.
ALONE = 0.9
# Cells that are named, of those that have not run.
NAMED = 40
MIXED = "Cells ran on different processors, whose seconds do not compare and which round differently: "
SHARED = (
    "Seconds of training in parentheses are of cells that had a processor for less than {percent:.0f} % of their time, "
    "or of which that is not known: other work slowed them."
)


def write_study(store: Store, cells: Mapping[str, Cell], folder: Path, command: str) -> None:
    """Writes README.md, results.json and a plot for each part that has results.

    Args:
        store: of results.
        cells: of all parts, also those that have not run.
        folder: to write to.
        command: by which the study was made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = dict(records(store, cells))
    results = {name: _result(record) for name, record in found.items()}
    chapters = [_chapter(part, store, cells, found, folder) for part in PARTS.values()]
    lines = [
        "# The study: linear attention in autoregressive decoders",
        "",
        *([WARNING, ""] if store.setup.quick else [SHORT, ""] if store.setup.short else []),
        'The claims are those of You et al., "When Linear Attention Meets Autoregressive Decoding" (ICML 2024), and',
        "a few of this package's own. Each is told beside what was found here, with small models and short training.",
        "`+local` is the branch inside a group of tokens, `+convolution` the masked filter over values: with both, an",
        "attention is augmented.",
        "",
        *markdown_table(["claim", "", "found"], _claims(results)),
        "",
        *_about(store, cells, found, command),
    ]
    for chapter in chapters:
        lines += ["", *chapter]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {"command": command, "quick": store.setup.quick, "cells": found, "missing": _missing(cells, found)}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_claims(store: Store, cells: Mapping[str, Cell], file: Path) -> None:
    """Puts the table of claims between the two marks of a file, which `check_claims` has seen."""
    before, _, after = check_claims(file)
    results = {name: _result(record) for name, record in records(store, cells)}
    table = "\n".join(markdown_table(["claim", "", "found"], _claims(results)))
    file.write_text(f"{before}{CLAIMS_MARK}\n{table}\n{CLAIMS_MARK}{after}", encoding="utf-8")


def check_claims(file: Path) -> list[str]:
    """A file's text before the first mark, between the marks, and after the second.

    Raises:
        UserError: there is no such file, or it has not two marks.
    """
    if not file.is_file():
        raise UserError(f"--claims {file} is no file; name one with two lines {CLAIMS_MARK}")
    parts = file.read_text(encoding="utf-8").split(CLAIMS_MARK)
    if len(parts) != 3:
        raise UserError(f"--claims {file} has not two lines {CLAIMS_MARK}, between which the table goes; add them")
    return parts


def _result(record: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a cell, and whether it had its processors to itself, as far as is known."""
    share = share_of_time([record])
    return {**record["result"], "alone": share is not None and share >= ALONE}


def of_part(results: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The results of one part, by the names of its cells."""
    return {name.partition("/")[2]: each for name, each in results.items() if name.partition("/")[0] == part}


def _claims(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for part in PARTS.values():
        for claim in part.claims:
            verdict, figures = claim.verdict(of_part(results, part.name))
            rows.append([claim.text, f"**{verdict}**", figures])
    return rows


def _missing(cells: Mapping[str, Cell], found: Mapping[str, Any]) -> list[str]:
    return [name for name in cells if name not in found]


def _about(store: Store, cells: Mapping[str, Cell], found: Mapping[str, Any], command: str) -> list[str]:
    """Where and with what the results were measured."""

    def every(key: str) -> str:
        return ", ".join(sorted({str(record[key]) for record in found.values()})) or "-"

    seconds = sum(record["seconds"] for record in found.values())
    sizes = store.setup.sizes
    rows = [
        ["command", f"`{command}`"],
        ["commit", f"{every('commit')}: of each cell in results.json"],
        [
            "machine",
            f"{_counts(map(machine, found.values()))}; cores: {_counts(each['cores'] for each in found.values())}",
        ],
        ["versions", f"lin_jax {every('lin_jax')}, JAX {every('jax')}, Python {every('python')}"],
        ["seed", "0 where no other is named; of three seeds 0, 1 and 2"],
        ["finished", f"{_counted(store, cells, found)}, in {duration(seconds)}{_processor(found)}"],
        [
            "budget of a student",
            f"{sizes.steps} steps of {sizes.batch} x {sizes.length} tokens; from scratch {sizes.scratch_steps} steps; "
            f"a task {sizes.task_steps} steps of {4 * sizes.batch} examples",
        ],
    ]
    return markdown_table(["", ""], rows)


def _counted(store: Store, cells: Mapping[str, Cell], found: Mapping[str, Any]) -> str:
    """How many cells are finished, those of the short study apart where it is one."""
    if not store.setup.short:
        return f"{len(found)} of {len(cells)} cells"
    own = _asked(store, cells)
    more = len(found.keys() - own)
    beside = f" and {more} more" if more else ""
    return f"{len(found) - more} of {len(own)} cells of the short study{beside} ({len(cells)} in the full one)"


def _asked(store: Store, cells: Mapping[str, Cell]) -> set[str]:
    """Names of the cells that the study runs: all of them, or those of the short one."""
    return set(chosen_cells(store.setup, tuple(PARTS)) if store.setup.short else cells)


def _processor(found: Mapping[str, Any]) -> str:
    spent = [each for record in found.values() if (each := record.get("processor_seconds")) is not None]
    if not spent:
        return ""
    known = "" if len(spent) == len(found) else f" in the {len(spent)} of which that is known"
    return f"; processors worked {duration(sum(spent))} of it{known}"


def machine(record: Mapping[str, Any]) -> str:
    """The kind of processor or accelerator that a cell ran on, without the number of processors."""
    words = record["device"].removeprefix("cpu, ").split(", ")
    return ", ".join(each for each in words if not each.endswith(" processors"))


def _counts(values: Iterable[Any]) -> str:
    """Values with the number of cells, the commonest first."""
    counted = Counter(map(str, values)).most_common()
    if len(counted) < 2:
        return counted[0][0] if counted else "-"
    return ", ".join(f"{value} ({count} cell{'s' * (count > 1)})" for value, count in counted)


def _machines(records: Mapping[str, Any]) -> list[str]:
    """Which cells of a chapter ran on which kind of processor, where there are several."""
    kinds: dict[str, list[str]] = {}
    for name, record in records.items():
        kinds.setdefault(machine(record), []).append(f"`{name}`")
    if len(kinds) < 2:
        return []
    most = max(kinds, key=lambda each: len(kinds[each]))
    others = [f"{', '.join(names)} on {kind}" for kind, names in kinds.items() if kind != most]
    return ["", f"{MIXED}{'; '.join(others)}; all others on {most}."]


def share_of_time(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Share of the passed time in which the process had its processor; 1 where nothing else ran."""
    timed = [record for record in records if record.get("processor_seconds") is not None]
    passed = sum(record["seconds"] for record in timed)
    return min(sum(record["processor_seconds"] for record in timed) / passed, 1.0) if passed else None


def _chapter(part: Part, store: Store, cells: Mapping[str, Cell], found: Mapping[str, Any], folder: Path) -> list[str]:
    records = of_part(found, part.name)
    own = {name: _result(record) for name, record in records.items()}
    lines = [f"## {part.title}", "", part.about]
    if table := part.table(own):
        lines += ["", *table]
    lines += _machines(records)
    if any("| (" in line for line in table):
        lines += ["", SHARED.format(percent=100 * ALONE)]
    timed = [each for each in records.values() if part.timed and part.timed in each["result"]]
    if (share := share_of_time(timed)) is not None:
        quiet = f"its process had a processor for {100 * share:.0f} % of the time that its cells took"
        lines += [
            "",
            f"Other work slows what is measured here; while speeds were, {quiet} (nearly all if nothing else runs).",
        ]
    if own and part.plot(own, folder / f"{part.name}.svg"):
        lines += ["", f"![{part.title}]({part.name}.svg)"]
    missing = of_part({name: cells[name] for name in _missing(cells, found)}, part.name)
    own_names = _asked(store, cells)
    asked = [name for name in missing if f"{part.name}/{name}" in own_names]
    if asked:
        shown = ", ".join(f"`{name}`" for name in asked[:NAMED])
        more = f" and {len(asked) - NAMED} more (`missing` in results.json)" if len(asked) > NAMED else ""
        lines += ["", f"Not yet run: {len(asked)} cells, {shown}{more}."]
    if others := len(missing) - len(asked):
        lines += ["", f"The full study has {others} more cells of this part."]
    return lines
