"""The study's report: claims beside what was found, a chapter for each part, and all results as JSON."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.study.cells import LAST, Cell, Part
from lib.study.drawing import markdown_table
from lib.study.registry import PARTS
from lib.study.runner import Store, duration, records

WARNING = (
    "**This is a quick trial with tiny models and few steps. It shows that everything runs; its figures say nothing.**"
)
SHORT = (
    "**This is the short study: a seventh of the training, short continuations, fewer seeds and tasks. Students are "
    "still far from their teacher; what is compared is how far each attention comes on the same budget.**"
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
    results = {name: record["result"] for name, record in found.items()}
    chapters = [_chapter(part, store, cells, found, folder) for part in PARTS.values()]
    lines = [
        "# The study: linear attention in autoregressive decoders",
        "",
        *([WARNING, ""] if store.setup.quick else [SHORT, ""] if store.setup.short else []),
        'The claims are those of You et al., "When Linear Attention Meets Autoregressive Decoding" (ICML 2024), and',
        "a few of this package's own. Each is told beside what was found here, with small models and short training.",
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
        ["commit", every("commit")],
        ["machine", f"{every('cpu')}; cores: {every('cores')}; device: {every('device')}"],
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
    own = [name for name, cell in cells.items() if cell.turn < LAST]
    more = len(found.keys() - set(own))
    beside = f" and {more} others" if more else ""
    return f"{len(found) - more} of {len(own)} cells of the short study{beside} ({len(cells)} in the full one)"


def _processor(found: Mapping[str, Any]) -> str:
    spent = [record.get("processor_seconds") for record in found.values()]
    if not spent or None in spent:
        return ""
    return f", of which processors have worked {duration(sum(spent))}"


def share_of_time(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Share of the passed time in which the process had its processor; 1 where nothing else ran."""
    timed = [record for record in records if record.get("processor_seconds") is not None]
    passed = sum(record["seconds"] for record in timed)
    return min(sum(record["processor_seconds"] for record in timed) / passed, 1.0) if passed else None


def _chapter(part: Part, store: Store, cells: Mapping[str, Cell], found: Mapping[str, Any], folder: Path) -> list[str]:
    own = of_part({name: record["result"] for name, record in found.items()}, part.name)
    lines = [f"## {part.title}", "", part.about]
    if table := part.table(own):
        lines += ["", *table]
    timed = [each for each in of_part(found, part.name).values() if part.timed and part.timed in each["result"]]
    if (share := share_of_time(timed)) is not None:
        quiet = f"its process had a processor for {100 * share:.0f} % of the time that its cells took"
        lines += [
            "",
            f"Other work slows what is measured here; while speeds were, {quiet} (nearly all if nothing else runs).",
        ]
    if own and part.plot(own, folder / f"{part.name}.svg"):
        lines += ["", f"![{part.title}]({part.name}.svg)"]
    missing = of_part({name: cells[name] for name in _missing(cells, found)}, part.name)
    asked = [name for name, cell in missing.items() if cell.turn < LAST or not store.setup.short]
    if asked:
        shown = ", ".join(f"`{name}`" for name in asked[:8])
        more = f" and {len(asked) - 8} more (`missing` in results.json)" if len(asked) > 8 else ""
        lines += ["", f"Not yet run: {shown}{more}."]
    if others := len(missing) - len(asked):
        lines += ["", f"The full study has {others} more cells of this part."]
    return lines
