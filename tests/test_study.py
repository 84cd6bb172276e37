"""The study: its registry, what it runs again, its report from made-up results, and attentions of its own."""

import importlib
import io
import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.processes import ROOT

from lin_jax.attention import QKV, REGISTRY, AttentionConfig, Conventions, parse_name
from lin_jax.attention.layout import single_rows
from lin_jax.attention.registry import Sizes
from lin_jax.decoding.drafting.tree import chain
from lin_jax.errors import UserError


@pytest.fixture(autouse=True)
def registry_as_it_was():
    """What variants add to the attentions does not reach other tests of the process."""
    with patch.dict(REGISTRY):
        yield


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of the study, which benchmarks have beside themselves."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"lib.study.{name}")


def measured(setup: Any, *, value: float) -> dict[str, float]:
    """A cell's function: half of a value, which must not be negative."""
    if value < 0:
        raise UserError("the value is negative")
    return {"half": value / 2}


@pytest.mark.parametrize("quick", [False, True])
def test_registry(study: Any, quick: bool, tmp_path: Path) -> None:
    """What a cell needs stands before it, and a choice of parts has what it needs."""
    registry, setup = study("registry"), study("cells").Setup(tmp_path, quick)
    cells = registry.all_cells(setup)
    names = list(cells)
    assert len(names) == sum(len(part.cells(setup)) for part in registry.PARTS.values())
    for number, (name, cell) in enumerate(cells.items()):
        assert all(each in names[:number] for each in cell.needs), name
        assert cell.minutes > 0
        assert json.loads(json.dumps(cell.settings)) == cell.settings
    chosen = registry.chosen_cells(setup, ["speculation"])
    assert {name.split("/")[0] for name in chosen} == {"linearize", "speculation"}
    assert {name for name in names if name.startswith("speculation/")} <= set(chosen)
    only = registry.chosen_cells(setup, list(registry.PARTS), ["no mask"])
    assert [name for name in only if name != "linearize/teacher"] == ["ablations/no mask"]


def test_short_study(study: Any, tmp_path: Path) -> None:
    """It has the cells of the study, of which it runs the main ones, and others only if they are named."""
    registry, cells = study("registry"), study("cells")
    setup = cells.Setup(tmp_path, short=True)
    everything = registry.all_cells(setup)
    assert set(everything) == set(registry.all_cells(cells.Setup(tmp_path)))
    chosen = registry.chosen_cells(setup, list(registry.PARTS))
    seven = study("attentions").PAPER
    wanted = {f"linearize/stories260K/{name}/0" for base in seven for name in (base, study("attentions").both(base))}
    assert wanted < set(chosen)
    assert {name for name, cell in everything.items() if cell.turn < cells.LAST} <= set(chosen)
    assert {name for name in everything if name.startswith("ablations/")} < set(chosen)
    assert sum(cell.minutes for cell in chosen.values()) <= 100
    last = "linearize/stories260K/elu/0"
    assert last not in chosen
    assert list(registry.chosen_cells(setup, ["linearize"], ["stories260K/elu/0"])) == [last]
    assert setup.sizes.steps < cells.Sizes().steps


@pytest.mark.parametrize("short", [False, True])
def test_order(study: Any, short: bool, tmp_path: Path) -> None:
    """Every part begins in the first turn, what is needed comes before, and no cell waits for one of a later turn."""
    registry, cells = study("registry"), study("cells")
    chosen = registry.chosen_cells(cells.Setup(tmp_path, short=short), list(registry.PARTS))
    names = list(chosen)
    turns = [cell.turn for cell in chosen.values()]
    for number, name in enumerate(names):
        assert all(each in names[:number] for each in chosen[name].needs), name
        assert min(turns[number:]) >= turns[number] or any(name in cell.needs for cell in chosen.values()), name
    first = {name.partition("/")[0] for name, cell in chosen.items() if cell.turn == cells.FIRST}
    assert first == set(registry.PARTS)


def test_paper_is_covered(study: Any, tmp_path: Path) -> None:
    """The seven attentions of the paper are linearized bare, with each part of the augmentation and with both."""
    cells = study("registry").all_cells(study("cells").Setup(tmp_path))
    for base in ("flash_global", "linformer", "performer", "transnormer", "yoso", "relu"):
        for added in ("", "+local", "+convolution", "+local+convolution"):
            assert f"linearize/stories260K/{base}{added}/0" in cells
        assert f"linearize/stories260K/{base}/2" in cells
    assert "linearize/stories260K/flash_local/0" in cells
    # Without a public tokenizer, this model is measured where one is named.
    assert not any("babyllama361" in name for name in cells)
    data = {"babyllama361": "model.bin", "babyllama361-tokenizer": "pieces.vocab"}
    more = study("registry").all_cells(study("cells").Setup(tmp_path, data=data))
    assert "linearize/babyllama361/relu/0" in more


def test_unknown_place(study: Any, tmp_path: Path) -> None:
    """A place that is not the study's is refused, and the known ones listed."""
    setup = study("cells").Setup(tmp_path, data={"poems": "folder"})
    with pytest.raises(UserError, match=r"poems=\.\.\. is unknown; choose among stories"):
        assert setup.places
    named = study("cells").Setup(tmp_path, data={"wikitext": "here.txt"}).places["wikitext"]
    assert (named.source, named.subset) == ("here.txt", None)
    # A report names no folders of the machine.
    given = {"stories": "/somewhere/one.txt,two/three.txt", "glue": "hub:nyu-mll/glue"}
    shown = {"stories": "one.txt,three.txt", "glue": "hub:nyu-mll/glue"}
    assert study("runner").shown_places(given) == shown


ANSWERS = """
import os, signal, sys
for line in sys.stdin:
    name = line.strip()
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "left":
        sys.exit(0)
    last = name in ("fails", "big")
    # Before the answer: whoever has the last one may end this process at once.
    with open(sys.argv[1], "a") as log:
        print(os.getpid(), name, file=log)
    print(int(name == "fails"), *(["last"] if last else []), flush=True)
    if last:
        break
"""


def test_worker(study: Any, tmp_path: Path) -> None:
    """One process runs cell after cell; a new one takes its place after one that failed, ended or grew too large."""
    log = tmp_path / "log"
    worker = study("runner").Worker(["-c", ANSWERS, str(log)])
    names = ("one", "two", "fails", "three", "killed", "left", "big", "four")
    assert [worker(name) for name in names] == [0, 0, 1, 0, -9, 130, 0, 0]
    worker.close()
    ran = dict(reversed(line.split()) for line in log.read_text().splitlines())
    assert ran["one"] == ran["two"] == ran["fails"]
    assert len({ran["fails"], ran["three"], ran["big"], ran["four"]}) == 4


def test_serve(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker keeps results of the cells it is given, answers nothing but statuses, and ends after a failure."""
    cells, runner = study("cells"), study("runner")
    store = runner.Store(cells.Setup(tmp_path))

    def speaking(setup: Any) -> dict[str, int]:
        print("a word of a cell")
        return {"found": 1}

    known = {
        "a/good": cells.Cell("good", partial(speaking), 1.0),
        "a/bad": cells.Cell("bad", partial(measured, value=-1.0), 1.0),
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("a/good\na/bad\na/good\n"))
    monkeypatch.setattr(sys, "stdout", answers := io.StringIO())
    assert runner.serve(store, known) == 0
    assert answers.getvalue() == "0\n2 last\n"
    assert "the value is negative" in capsys.readouterr().err
    record = json.loads(store.file("a/good").read_text())
    assert record["result"] == {"found": 1}
    assert 0 <= record["processor_seconds"] <= record["seconds"] + 1


def test_resume(study: Any, tmp_path: Path) -> None:
    """Finished cells are left alone; failed ones, changed ones and the interrupted one run again."""
    cells, runner = study("cells"), study("runner")
    store = runner.Store(cells.Setup(tmp_path))

    def cell(name: str, value: float, *needs: str) -> Any:
        return cells.Cell(name, partial(measured, value=value), 1.0, needs)

    known = {"a/one": cell("one", 3.0), "a/bad": cell("bad", -1.0), "b/next": cell("next", 5.0, "a/bad")}
    begun: list[str] = []

    def start(name: str) -> int:
        begun.append(name)
        try:
            runner.run_cell(store, name, known[name])
        except UserError:
            return 2
        return 0

    notes: list[str] = []
    assert runner.run_cells(store, known, start, notes.append) == ["a/bad", "b/next"]
    assert begun == ["a/one", "a/bad"]
    assert "[1/3] a/one: about 1 min; in all about 3 min left" in notes
    record = json.loads(store.file("a/one").read_text())
    assert record["result"] == {"half": 1.5}
    assert {"commit", "cpu", "seconds", "quick"} <= set(record)
    # Mended, it is tried again with what needs it; what was finished is not.
    known["a/bad"] = cell("bad", 1.0)
    begun.clear()
    assert runner.run_cells(store, known, start, notes.append) == []
    assert begun == ["a/bad", "b/next"]
    # Other settings are another cell, whose model is not that of the one before.
    model = store.setup.folder("a", "one") / "model"
    model.mkdir(parents=True)
    known["a/one"] = cell("one", 4.0)
    begun.clear()

    def stopped(name: str) -> int:
        begun.append(name)
        return 130

    with pytest.raises(KeyboardInterrupt):
        runner.run_cells(store, known, stopped, notes.append)
    assert begun == ["a/one"]
    assert model.exists()
    assert runner.run_cells(store, known, start, notes.append) == []
    assert json.loads(store.file("a/one").read_text())["result"] == {"half": 2.0}
    assert not model.exists()


def test_models_that_are_gone(study: Any, tmp_path: Path) -> None:
    """A finished cell runs again where another needs its model and it is gone, and only then."""
    cells, runner = study("cells"), study("runner")
    store = runner.Store(cells.Setup(tmp_path))

    def trained(setup: Any, *, name: str) -> dict[str, Any]:
        setup.folder("a", name).mkdir(parents=True, exist_ok=True)
        return {"found": name}

    def cell(name: str, *needs: str) -> Any:
        return cells.Cell(name, partial(trained, name=name), 1.0, needs)

    known = {"a/model": cell("model"), "a/other": cell("other"), "a/user": cell("user", "a/model")}
    begun: list[str] = []

    def start(name: str) -> int:
        begun.append(name)
        runner.run_cell(store, name, known[name])
        return 0

    for name in ("a/model", "a/other"):
        store.write(name, known[name], {"found": name}, 1.0)
    assert runner.run_cells(store, known, start, [].append) == []
    assert begun == ["a/model", "a/user"]
    # All are finished: no models are needed any more.
    store.setup.folder("a", "model").rmdir()
    assert runner.run_cells(store, known, start, [].append) == []
    assert begun == ["a/model", "a/user"]


def test_results_of_a_report(study: Any, tmp_path: Path) -> None:
    """Results of a report are taken over where they are of the same settings and not here yet."""
    cells, runner = study("cells"), study("runner")
    known = {f"a/{name}": cells.Cell(name, partial(measured, value=1.0), 1.0) for name in ("old", "here", "changed")}
    there = runner.Store(cells.Setup(tmp_path / "there"))
    for name, cell in known.items():
        there.write(name, cell, {"half": 0.5}, 9.0)
    report = tmp_path / "results.json"
    report.write_text(json.dumps({"cells": {name: there.record(name, cell) for name, cell in known.items()}}))
    known["a/changed"] = cells.Cell("changed", partial(measured, value=2.0), 1.0)
    store = runner.Store(cells.Setup(tmp_path / "here"))
    store.write("a/here", known["a/here"], {"half": 0.5}, 7.0)
    assert store.adopt(report, known) == ["a/old"]
    assert store.record("a/old", known["a/old"]) == there.record("a/old", known["a/old"])
    assert store.record("a/here", known["a/here"])["seconds"] == 7.0
    report.write_text("{}")
    with pytest.raises(UserError, match=r"--from .*results.json is no results.json of a study; give that of"):
        store.adopt(report, known)


def ratio_of(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def student(attention: str, perplexity: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A made-up result of a linearization; the teacher's perplexity is 4."""
    return {
        "model": "stories260K",
        "attention": attention,
        "seed": seed,
        "teacher_perplexity": 4.0,
        "perplexity": perplexity,
        "ratio": ratio_of(perplexity / 4),
        "agreement": {"equal": 0.5},
        "state_bytes": 1000,
        "seconds_of_training": 60.0,
        **more,
    }


def made_up(both: str) -> dict[str, dict[str, Any]]:
    """Results of some cells of every part."""
    places = [{"begin": 0, "end": 256, "perplexity": 5.0}, {"begin": 1024, "end": 4096, "perplexity": 5.5}]
    contexts = [
        {"context": size, "seconds_of_reading": 0.1, "milliseconds_per_token": cost, "state_bytes": 1000}
        for size, cost in ((256, 1.0), (4096, 1.1))
    ]
    where = {"model": "stories260K", "attention": both}
    scratch = {"family": "llama", "text": "wikitext", "parameters": 5_000_000, "seconds_of_training": 60.0}
    task = {"task": "sst2", "majority": 0.5, "texts": 800, "seconds_of_training": 60.0}
    drafted = {"speedup": 1.9, "plain_tokens_per_second": 900.0, "tokens_per_second": 1710.0, "tokens_a_step": 2.5}
    lossy, exact = ({"equal": equal, "wrong": wrong, "tokens_a_step": 2.0} for equal, wrong in ((0.9, 3), (1.0, 0)))
    return {
        "linearize/stories260K/relu/0": student("relu", 10.0),
        "linearize/stories260K/relu/1": student("relu", 12.0, 1),
        "linearize/stories260K/relu+local+convolution/0": student("relu+local+convolution", 4.4),
        "scratch/llama/wikitext/relu/0": {**scratch, "attention": "relu", "perplexity": 90.0},
        "scratch/llama/wikitext/relu+local+convolution/0": {
            **scratch,
            "attention": "relu+local+convolution",
            "perplexity": 95.0,
        },
        **{
            f"encoders/{family}/sst2/{attention}/0": {
                **task,
                "family": family,
                "attention": attention,
                "accuracy": accuracy,
            }
            for family, attention, accuracy in (
                ("bert", "softmax", 0.8),
                ("bert", "relu", 0.79),
                ("gpt2", "softmax", 0.8),
                ("gpt2", "relu", 0.6),
            )
        },
        f"long/perplexity/stories260K/{both}": {**where, "positions": places, "tokens_per_second": 9.0},
        f"long/latency/stories260K/{both}": {**where, "contexts": contexts},
        f"speculation/{both}/ngram/chain:4": {**where, **drafted, "drafter": "ngram", "tree": "chain:4", "wrong": 0},
        "speculation/boundary/chain:4": {
            "boundary_tree": "chain:4",
            "without_memory": 1.3,
            "published": lossy,
            "ours": exact,
        },
        "ablations/trained/all of it": student(both, 4.4, change="all of it"),
        "ablations/trained/no convolution": student("flash_global+local", 4.8, change="no convolution"),
        "ablations/left out": {"whole": ratio_of(1.1), "without": {"local": ratio_of(9.0)}},
        "ablations/with a mask": {
            "masked": True,
            "teacher_perplexity": 4.0,
            "perplexity_with_future": 5.5,
            "perplexity_as_it_decodes": 5.5,
            "equal": 0.4,
            "repeated": 0.1,
            "repeated_by_teacher": 0.1,
            "text": "a good text",
        },
        "ablations/no mask": {
            "teacher_perplexity": 4.0,
            "perplexity_with_future": 1.2,
            "perplexity_as_it_decodes": 400.0,
            "equal": 0.01,
            "repeated": 0.9,
            "repeated_by_teacher": 0.1,
            "text": "the the the",
        },
    }


def test_report(study: Any, tmp_path: Path) -> None:
    """Claims, tables and plots say what is there, and what is missing is named."""
    runner, pages = study("runner"), study("pages")
    store = runner.Store(study("cells").Setup(tmp_path / "scratch"))
    cells = study("registry").all_cells(store.setup)
    for name, result in made_up(study("attentions").AUGMENTED).items():
        store.write(name, cells[name], result, 60.0, 30.0)
    out = tmp_path / "study"
    pages.write_study(store, cells, out, "python benchmarks/study.py")
    claims = tmp_path / "claims.md"
    claims.write_text(f"before\n{pages.CLAIMS_MARK}\nold\n{pages.CLAIMS_MARK}\nafter\n")
    pages.write_claims(store, cells, claims)
    kept, table, rest = claims.read_text().split(pages.CLAIMS_MARK)
    assert (kept, rest) == ("before\n", "\nafter\n")
    assert table.strip() in (out / "README.md").read_text()
    with pytest.raises(UserError, match="has not two lines <!-- study -->"):
        pages.check_claims(out / "README.md")
    text = (out / "README.md").read_text()
    assert "| Linear attentions that work in encoders lose much in autoregressive decoders. | **holds here** |" in text
    assert "lower in 1 of 1, by up to 6.60 (relu on stories260K: 11.00 to 4.40), and then 1.10 to 1.10 times" in text
    assert (
        "| The augmentation lowers perplexity in every family. | **does not hold here** | lower in 0 of 1 pairs "
        "(llama, wikitext, relu: 90.0 to 95.0); not yet run: gpt2, flash |" in text
    )
    # One attention tells nothing: chance may be anything.
    assert "| **not decided here** | mean loss of accuracy, relu: 1.0 points in BERT, 20.0 in GPT-2" in text
    # Half of the cell's time had no processor.
    assert "| stories260K | `relu` | 2 | 2.750 ± 0.354 | 0.500 ± 0.000 | 1,000 | (60) |" in text
    assert "Seconds of training in parentheses" in text
    assert f"| ms a token, by tokens before | `{study('attentions').AUGMENTED}` |" in text
    assert "| 4,096 | 1.10 |" in text
    assert "**holds here** | 1.20 with the future in sight, 400.00 as it decodes; with a mask 5.50 both ways" in text
    assert "Without a mask it writes: `the the the`" in text
    assert "| perplexity as it decodes, a token after the other | 400.00 | 5.50 |" in text
    assert "for 50 % of the time that its cells took" in text
    assert "| chain:4 | 1.300 | 10.00 %, 3 texts | 0.00 %, 0 texts |" in text
    assert "cells, `teacher`, " in text
    assert "quick trial" not in text
    for part in study("registry").PARTS:
        assert f"]({part}.svg)" in text
        assert (out / f"{part}.svg").read_text().lstrip().startswith("<?xml")
    found = json.loads((out / "results.json").read_text())
    assert found["command"] == "python benchmarks/study.py"
    assert len(found["cells"]) + len(found["missing"]) == len(cells)


def test_report_of_two_machines(study: Any, tmp_path: Path) -> None:
    """Cells of another processor are named, and seconds that nothing slowed stand without parentheses."""
    runner, pages = study("runner"), study("pages")
    store = runner.Store(study("cells").Setup(tmp_path / "scratch"))
    cells = study("registry").all_cells(store.setup)
    for seed, kind in enumerate(("Slow", "Slow", "Quick")):
        name = f"linearize/stories260K/relu/{seed}"
        store.write(name, cells[name], student("relu", 10.0, seed), 60.0, 59.0)
        record = json.loads(store.file(name).read_text())
        store.file(name).write_text(json.dumps({**record, "device": f"cpu, {kind} Processor, AVX2, {seed} processors"}))
    pages.write_study(store, cells, tmp_path / "out", "python benchmarks/study.py")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| machine | Slow Processor, AVX2 (2 cells), Quick Processor, AVX2 (1 cell); cores:" in text
    assert "`stories260K/relu/2` on Quick Processor, AVX2; all others on Slow Processor, AVX2." in text
    assert "| 1,000 | 60 |" in text
    assert "in parentheses" not in text


def claims_of(study: Any, part: str, results: dict[str, Any]) -> list[tuple[str, str]]:
    """Verdicts and figures of a part's claims."""
    return [claim.verdict(results) for claim in study("registry").PARTS[part].claims]


def test_claims_in_part(study: Any) -> None:
    """A claim that holds for some attentions says for which it does not."""
    both = "+local+convolution"
    rows = [student("relu", 10.0), student(f"relu{both}", 5.0), student("linformer", 4.4)]
    rows.append(student(f"linformer{both}", 5.2))
    bare, augmented = claims_of(study, "linearize", {str(place): row for place, row in enumerate(rows)})
    assert bare[0] == "does not hold here"
    assert "1 of 2 have more than 1.5 times their teacher's perplexity (2.50 to 2.50)" in bare[1]
    assert "; not linformer on stories260K 1.10; not yet run: flash_local" in bare[1]
    assert augmented[0] == "holds in part"
    assert "higher: linformer on stories260K: 4.40 to 5.20" in augmented[1]


@pytest.mark.parametrize(("gpt2", "verdict"), [(0.51, "not decided here"), (0.6, "does not hold here")])
def test_nothing_learned(study: Any, gpt2: float, verdict: str) -> None:
    """What no classifier has learned is no loss of an attention's."""
    found = {}
    for family, accuracies in {"bert": (0.8, 0.51, 0.5), "gpt2": (0.8, gpt2, gpt2)}.items():
        for attention, accuracy in zip(("softmax", "relu", "yoso"), accuracies, strict=True):
            result = {"family": family, "task": "sst2", "attention": attention, "accuracy": accuracy}
            found[f"{family}/{attention}"] = {**result, "majority": 0.5, "texts": 800}
    ((told, figures),) = claims_of(study, "encoders", found)
    assert told == verdict
    assert ("no better than the commonest class in either: relu on sst2, yoso on sst2" in figures) == (gpt2 < 0.6)


def test_boundary_without_a_memory(study: Any) -> None:
    """A student to whom the memory is worth nothing tells nothing of the boundary; another one does."""
    exact = {"equal": 1.0, "wrong": 0, "tokens_a_step": 4.0}
    lossy = {"equal": 0.75, "wrong": 3, "tokens_a_step": 3.0}
    silent = {"boundary_tree": "chain:4", "without_memory": 1.0, "published": exact, "ours": exact}
    assert claims_of(study, "speculation", {"one": silent})[2][0] == "not decided here"
    telling = {**silent, "attention": "flash_global+convolution", "without_memory": 2.0, "published": lossy}
    verdict, figures = claims_of(study, "speculation", {"one": silent, "two": telling})[2]
    assert verdict == "holds here"
    assert figures.startswith("flash_global+convolution, chain:4: 25.00 % of the tokens differ, 25 % fewer a step; ")


def test_report_of_nothing(study: Any, tmp_path: Path) -> None:
    """Without results no claim holds or fails, and a quick trial says what it is."""
    runner = study("runner")
    store = runner.Store(study("cells").Setup(tmp_path / "scratch", quick=True))
    study("pages").write_study(store, study("registry").all_cells(store.setup), tmp_path / "out", "command")
    text = (tmp_path / "out" / "README.md").read_text()
    claims = [claim for part in study("registry").PARTS.values() for claim in part.claims]
    assert text.count("**not yet run**") == len(claims)
    assert "its figures say nothing" in text
    assert not list((tmp_path / "out").glob("*.svg"))
    store = runner.Store(study("cells").Setup(tmp_path / "scratch", short=True))
    study("pages").write_study(store, study("registry").all_cells(store.setup), tmp_path / "short", "command")
    assert "a seventh of the training" in (tmp_path / "short" / "README.md").read_text()


LENGTH, GROUP = 12, 4


def mixer(study: Any, name: str) -> Any:
    """An attention of the study, or one of the package, with a filter and a factor that are not zero."""
    study("variants").register()
    config = AttentionConfig(name, group_size=GROUP, kernel_size=5, initial_alpha=0.7)
    parsed = parse_name(name)
    sizes = Sizes("causal", 2, 2, 4, 4, Conventions(), 0, jnp.float32, nnx.Rngs(0))
    made = REGISTRY[parsed.base].build(config, parsed, sizes)
    taps = (made.around if hasattr(made, "around") else made).convolution.taps
    width = taps[...].shape[1]
    taps[...] = jnp.arange(1.0, 2 * width + 1).reshape(2, width)
    return made


def inputs(seed: int, length: int = LENGTH) -> QKV:
    rng = np.random.default_rng(seed)
    return QKV(*(jnp.asarray(rng.normal(size=(1, length, 2, 4)), jnp.float32) for _ in range(3)))


def test_filter_without_a_mask(study: Any) -> None:
    """It sees as far ahead as back on whole rows, and nothing ahead as it decodes; both are masked alike else."""
    before = inputs(0)
    later = before._replace(values=before.values.at[:, 8].add(1.0))
    layout = single_rows((1, LENGTH), None)
    seen = {}
    for name in ("unmasked", "masked", "flash_global+local+convolution"):
        made = mixer(study, name)
        read = jax.jit(lambda rows, made=made: made.parallel(rows, layout)[0])
        seen[name], changed = (np.asarray(read(each)) for each in (before, later))
        touched = np.flatnonzero(np.abs(changed - seen[name]).max(axis=(0, 2, 3)) > 1e-6)
        assert touched[0] == (6 if name == "unmasked" else 8), name
    # The taps of the past are those behind the two of the future.
    own = mixer(study, "flash_global+local+convolution")
    own.convolution.taps[...] = mixer(study, "masked").around.convolution.taps[...][:, 2:]
    read = jax.jit(lambda rows: own.parallel(rows, layout)[0])
    np.testing.assert_allclose(read(before), seen["masked"], rtol=1e-5, atol=1e-5)
    # A row that goes on from a state has no future either.
    made = mixer(study, "unmasked")
    read = jax.jit(lambda rows: made.parallel(rows, layout, made.init_state(1, LENGTH, jnp.float32))[0])
    np.testing.assert_allclose(read(before), seen["masked"], rtol=1e-5, atol=1e-5)


def test_published_boundary(study: Any) -> None:
    """Drafts are scored as ours are inside a group, and without the group that just ended behind its end."""
    augmented = "flash_global+local+convolution"
    ours, published = (mixer(study, name) for name in (augmented, study("variants").published(augmented)))
    read, drafted = inputs(1, 6), inputs(2, 4)
    layout = single_rows((1, 6), None)
    tree = chain(3).arrays()
    scores = []
    for made in (ours, published):

        @jax.jit
        def scored(read: QKV, drafted: QKV, made: Any = made) -> jax.Array:
            _, state = made.parallel(read, layout, made.init_state(1, LENGTH, jnp.float32))
            return made.verify(drafted, tree, state)[0]

        scores.append(np.asarray(scored(read, drafted))[0])
    # Six tokens are read: two nodes complete the second group of four, the others begin the third.
    np.testing.assert_allclose(scores[0][:2], scores[1][:2], rtol=1e-5, atol=1e-5)
    assert np.abs(scores[0][2:] - scores[1][2:]).max(axis=(1, 2)).min() > 1e-2


def processor_seconds() -> float:
    """Of all finished processes that this one has started."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.thorough
def test_quick_study(tmp_path: Path) -> None:
    """Every part runs on tiny models in less than three minutes of two cores, and not again."""
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    command = [sys.executable, "benchmarks/study.py", "--quick", "--scratch", str(scratch), "--output", str(out)]
    # Processor time: others may use the machine, too.
    before = processor_seconds()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    first = processor_seconds() - before
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text())
    assert found["missing"] == []
    assert first < 2 * 180
    boundary = found["cells"]["speculation/boundary/chain:4"]["result"]
    assert boundary["ours"]["wrong"] == 0
    assert found["cells"]["speculation/flash_global+local+convolution/ngram/chain:4"]["result"]["wrong"] == 0
    assert "its figures say nothing" in (out / "README.md").read_text()
    before = processor_seconds()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert processor_seconds() - before < first / 2
    assert json.loads((out / "results.json").read_text())["cells"] == found["cells"]


def test_quick_figures_are_not_published(tmp_path: Path) -> None:
    """A quick trial's claims say nothing, and go to no other file."""
    command = [sys.executable, "benchmarks/study.py", "--quick", "--claims", str(tmp_path / "page.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--claims with --quick would publish figures that say nothing" in done.stderr


def test_claims_of_the_readme(study: Any) -> None:
    """README and the study's page tell the same."""
    table = study("pages").check_claims(ROOT / "README.md")[1]
    assert table.strip() in (ROOT / "docs/study/README.md").read_text()
