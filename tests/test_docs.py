"""The documentation: links lead somewhere, all pages are in the navigation, the reference is as the code has it."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.processes import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    """A page without its blocks of code, which hold no links and no headings."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def broken_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(text_of(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            found.append(f"{page.relative_to(ROOT)}: {link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            found.append(f"{page.relative_to(ROOT)}: {link}: no such heading")
    return found


def navigation(entries: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(entries, str):
        return [entries]
    inner = entries.values() if isinstance(entries, dict) else entries
    return [page for each in inner for page in navigation(each)]


# Options of YAML files and the sections that they are in, as the reference lists them.
OPTIONS_PAGE = (DOCS / "reference" / "options.md").read_text(encoding="utf-8")
OPTIONS = set(re.findall(r"^\| `([\w.]+)`", OPTIONS_PAGE, flags=re.MULTILINE))
SECTIONS = {name.rpartition(".")[0] for name in OPTIONS} - {""}


def test_links_lead_somewhere() -> None:
    assert [
        each for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES) for each in broken_links(page)
    ] == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A Title, here\n[there](#a-title-here) [gone](other.md) [no](#title)\n```\n[code](x.md)\n```\n")
    assert broken_links(page) == ["page.md: other.md: no such file", "page.md: #title: no such heading"]


def test_every_page_is_in_the_navigation_once() -> None:
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(navigation(entries)) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_every_picture_is_shown() -> None:
    shown = {Path(link).name for page in PAGES for link in LINK.findall(text_of(page)) if link.endswith(".svg")}
    there = [*(DOCS / "pictures").iterdir(), *(DOCS / "study").glob("*.svg")]
    assert shown == {path.name for path in there}


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_as_the_code_has_it() -> None:
    for path, text in reference().pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old; run python docs/write_reference.py"


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# Mappings of the text that are parts of something else than a run's file, by the first of their keys.
OTHER_MAPPINGS = {"attention", "fewshot_config", "name", "prompt"}


def options_named(text: str) -> set[str]:
    """Names of options in a page: `--section.field`, `section.field`, and keys of YAML in blocks and in lines."""
    sections = {name.partition(".")[0] for name in OPTIONS}
    found = re.findall(r"(?:--|`)([a-z_]+(?:\.[a-z_]+)+)\b", text)
    named = {name for name in found if name.partition(".")[0] in sections}
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    inline = [line for line in re.findall(r"`([^`\n]+)`", text) if re.match(r"[a-z_]+: \{", line)]
    for mapping in map(yaml.safe_load, [*blocks, *inline]):
        if next(iter(mapping)) not in OTHER_MAPPINGS:
            named |= set(keys(mapping))
    return {name for name in named if not name.startswith(("stages.", "model.layers"))} - {"stages", "data.field"}


def keys(mapping: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in mapping.items():
        if isinstance(value, dict) and f"{before}{name}" in SECTIONS:
            yield from keys(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def test_options_in_the_pages_exist() -> None:
    pages = [ROOT / "README.md", *PAGES]
    missing = {f"{page.name}: {name}" for page in pages for name in options_named(page.read_text(encoding="utf-8"))}
    missing -= {f"{page.name}: {name}" for page in pages for name in {*OPTIONS, *SECTIONS}}
    assert missing == set()


def test_an_option_that_is_not_there_is_found() -> None:
    page = (
        "`--training.stepz 3` `data.source` `adapters: {rank: 8, also: [norms]}`\n```yaml\ndata: {sauce: a.txt}\n```\n"
    )
    assert options_named(page) - OPTIONS == {"training.stepz", "adapters.also", "data.sauce"}


@pytest.mark.thorough
def test_an_attention_of_ones_own_speculates_losslessly() -> None:
    code = "\n".join(code_blocks(DOCS / "how-to" / "own-attention.md", "python"))
    assert "drafted.tokens == plain.tokens" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "from_pretrained" in (tmp_path / "reference" / "python" / "index.html").read_text(encoding="utf-8")
