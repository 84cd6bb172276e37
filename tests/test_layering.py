"""The architecture, held by imports: floors, no circles, folders that can be overlooked, one name for one thing."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.processes import ROOT

# From the ground; a file imports from lower floors and from its own wing, lazily or for type checkers alike.
FLOORS = (
    ("pallas_kernels", "lin_jax.losses", "lin_jax.errors", "lin_jax.files", "lin_jax.progress_bar"),
    ("lin_jax.json_files", "lin_jax.extras"),
    ("lin_jax.attention", "lin_jax.data", "lin_jax.devices"),
    ("lin_jax.user_cache",),
    ("lin_jax.models",),
    ("lin_jax.hub", "lin_jax.decoding", "lin_jax.evaluation"),
    ("lin_jax.training",),
    ("lin_jax.session", "lin_jax.recipe"),
    ("lin_jax.report", "lin_jax.lm_eval"),
    ("lin_jax.api",),
    ("lin_jax.demo", "lin_jax.notebook"),
    ("lin_jax.cli",),
)
FILES_IN_A_FOLDER = 12
# One file an attention, and one a model.
WIDE = {"lin_jax/attention", "lin_jax/models"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [path for name in ("lin_jax", "pallas_kernels") for path in sorted((ROOT / name).rglob("*.py"))]
# The modelling code that exports carry runs under transformers, not here.
PATHS = {module_of(path): path for path in FILES if "torch_source" not in path.parts}


@cache
def tree_of(module: str) -> ast.Module:
    """A file's syntax, read when a test first asks for it: every worker imports this module."""
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def syntax() -> Iterator[tuple[str, ast.Module]]:
    """All modules, each with its syntax."""
    return ((module, tree_of(module)) for module in PATHS)


@cache
def imports_of(module: str) -> set[str]:
    """Our modules that a module imports anywhere in its file."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in PATHS else node.module for name in names}
    return {name for name in found if name in PATHS and name != module}


def wing_of(module: str) -> str | None:
    """The wing that a module belongs to; None for the front doors, which hand on to the top."""
    if module == "lin_jax" or module.endswith("__main__"):
        return None
    return next(wing for floor in FLOORS for wing in floor if f"{module}.".startswith(f"{wing}."))


FLOOR_OF = {wing: number for number, floor in enumerate(FLOORS) for wing in floor}


def test_every_module_is_on_a_floor():
    assert {wing_of(module) for module in PATHS} == {None, *FLOOR_OF}


def test_imports_go_down():
    up = []
    for module in PATHS:
        names = imports_of(module)
        wing = wing_of(module)
        for name in names if wing else ():
            other = wing_of(name)
            # The package's own file hands over the verbs lazily, and holds the version.
            if name != "lin_jax" and (other is None or (other != wing and FLOOR_OF[other] >= FLOOR_OF[wing])):
                up.append(f"{module} imports {name}")
    assert up == []


def test_no_files_import_each_other_in_a_circle():
    # A package's file hands on what its modules define, which import each other, not the package.
    graph = {module: imports_of(module) for module in PATHS}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' imports '.join(reversed(error.args[1]))}")


def test_folders_can_be_overlooked():
    folders = defaultdict(list)
    for path in PATHS.values():
        if path.name != "__init__.py":
            folders[path.parent.relative_to(ROOT).as_posix()].append(path.name)
    assert {
        name: len(files) for name, files in folders.items() if len(files) > FILES_IN_A_FOLDER and name not in WIDE
    } == {}


def test_a_public_class_has_a_name_of_its_own():
    places = defaultdict(list)
    for module, tree in syntax():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_only_command_lines_parse_arguments():
    parsers = {
        module
        for module, tree in syntax()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and any(alias.name == "argparse" for alias in node.names)
    }
    # The class of parsers that complain in one line, and the options of a run, which its folder keeps, and a tool.
    others = {"lin_jax.errors", "lin_jax.training.config_file", "pallas_kernels.tune"}
    assert {each for each in parsers if wing_of(each) != "lin_jax.cli"} <= others


def test_docstrings_name_a_thing_or_say_what_is_done():
    opening = []
    for module, tree in syntax():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if text.split(" ", 1)[0] in ("What", "Whether", "How", "Who", "Where", "Which"):
                    opening.append(f"{module}: {text.splitlines()[0]}")
    assert opening == []
