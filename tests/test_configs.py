"""Recipes: each is read, runs for two steps on small stand-ins, names public places, and has a line in the docs."""

import json
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes import ROOT
from support.stand_ins import StandIns, options

from lin_jax.cli.train import main
from lin_jax.data.sources.remote import RemoteName, is_remote
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.monitoring.trackers import METRICS_FILE, read_metrics
from lin_jax.training.stages.config import parse_command

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))
# One of each kind that always runs.
ALWAYS = {"tiny", "tiny_medusa"}
# What people read or run, and what shows them how.
PUBLIC = ("README.md", "CONTRIBUTING.md", "Makefile", "configs", "docs", "benchmarks", "lin_jax", "notebooks")


def strings(content: Any) -> Iterator[str]:
    """Every text in a file of YAML."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from strings(each)


def remote_names(path: Path) -> set[str]:
    return {text for text in strings(yaml.safe_load(path.read_text())) if is_remote(text)}


def comment(path: Path) -> str:
    """The lines in front of the first field."""
    return " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_read(path):
    plan, resume, _ = parse_command([str(path)])
    assert not resume
    assert str(plan.output) == f"runs/{path.stem}"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


@pytest.fixture(scope="module")
def base(places, tmp_path_factory):
    """A finished run for recipes that begin with one: a softmax LLaMA, by the smallest recipe."""
    folder = tmp_path_factory.mktemp("base") / "run"
    recipe = next(path for path in CONFIGS if path.stem == "tiny")
    softmax = ("--model.attention.name", "softmax", "--model.hidden_size", "16", "--output", str(folder))
    assert main([str(recipe), *options(recipe, places, folder), *softmax]) == 0
    return folder


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in ALWAYS else pytest.mark.thorough, id=path.stem) for path in CONFIGS],
)
def test_every_recipe_runs(path, places, base, tmp_path):
    """Two steps of each stage, with sizes and sources of the stand-ins and all else as it is committed."""
    output = tmp_path / "run"
    assert main([str(path), *options(path, places, base), "--output", str(output)]) == 0
    stages = [stage["name"] for stage in yaml.safe_load(path.read_text()).get("stages", [])]
    for folder in [output / name for name in stages] or [output]:
        assert saved_steps(folder)[-1] == 2
        losses = [line["loss"] for line in read_metrics(folder / METRICS_FILE) if "loss" in line]
        assert losses
        assert all(map(math.isfinite, losses))
    if stages:
        rows = json.loads((output / "report.json").read_text())
        assert [row["name"] for row in rows if row["name"] in stages] == stages
        assert all(math.isfinite(row["perplexity"]) for row in rows)


# Those of the demo are run in order by its command.
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if not path.stem.startswith("demo")], ids=lambda path: path.stem
)
def test_what_is_built_on_another_run_says_so(path):
    begin = yaml.safe_load(path.read_text()).get("init_from")
    if begin is not None and not is_remote(begin):
        by_output = {str(yaml.safe_load(each.read_text())["output"]): each.name for each in CONFIGS}
        recipe = next(name for output, name in by_output.items() if f"{begin}/".startswith(f"{output}/"))
        assert recipe in comment(path)


def test_every_recipe_has_a_line_in_the_docs():
    """The table has them all and no others, with everything that they fetch."""
    lines = [line for line in (ROOT / "docs" / "recipes.md").read_text().splitlines() if line.startswith("| `")]
    rows = {name: line for line in lines for name in re.findall(r"`([\w*]+)\.yaml`", line.split("|")[1])}
    for path in CONFIGS:
        found = [line for name, line in rows.items() if fnmatch(path.stem, name)]
        assert len(found) == 1, path.stem
        for name in map(RemoteName.parse, remote_names(path)):
            assert (name.repository or "github.com/EN10/BabyLlama") in found[0], name.text
    assert all(any(fnmatch(path.stem, name) for path in CONFIGS) for name in rows)


def test_nothing_that_people_run_names_a_folder_beside_the_project():
    files = [
        path for name in PUBLIC for path in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    texts = [path for path in files if path.suffix in (".md", ".py", ".yaml", ".ipynb", ".j2", "") and path.is_file()]
    assert len(texts) > 100
    assert [str(path) for path in texts if "../shared" in path.read_text(encoding="utf-8")] == []
