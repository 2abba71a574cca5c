"""README and docs/: short enough, linked, complete, and every path and issue number in them is meant."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from support.pages import CODE_BLOCK, DOCS, README, pages, sentences, words
from support.umed_runs import ROOT

BY_NAME = {"argvalues": pages(), "ids": [page.name for page in pages()]}


def test_the_readme_is_one_page_and_says_early_how_to_install() -> None:
    text = README.read_text()
    assert len(text.encode()) <= 10_240
    first = next(number for number, line in enumerate(text.splitlines(), start=1) if "pip install" in line)
    assert first < 25


def test_sentences_are_counted_as_a_reader_would() -> None:
    assert words("A `b c` d, 1 e.") == 6
    page = ROOT / "CONTRIBUTING.md"
    assert all("```" not in sentence for sentence in sentences(page))


@pytest.mark.parametrize("cells", [True, False], ids=["with-tables", "without-tables"])
@pytest.mark.parametrize("page", **BY_NAME)
def test_nine_of_ten_sentences_have_at_most_28_words(page: Path, cells: bool) -> None:
    counted = sorted((words(sentence), sentence) for sentence in sentences(page, cells) if words(sentence))
    count, sentence = counted[math.ceil(0.9 * len(counted)) - 1]
    assert count <= 28, f"{page.name}: {sentence}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them for headings of plain words."""
    headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", **BY_NAME)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", CODE_BLOCK.sub("", page.read_text())):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", **BY_NAME)
def test_every_path_in_a_page_exists(page: Path) -> None:
    for name in re.findall(
        r"`((?:umed_plugin|patches|data_recipes|benchmarks|examples|tests|docs|constraints)/[\w./-]*)`",
        page.read_text(),
    ):
        assert (ROOT / name).exists() or "NAME" in name, f"{page.name}: {name}"


def test_every_room_is_in_the_tree_and_its_layers_are_the_contracts() -> None:
    tree, layers = re.findall(
        r"^```text\n(.*?)^```$", (DOCS / "project-layout.md").read_text(), re.MULTILINE | re.DOTALL
    )
    package = ROOT / "umed_plugin"
    folders = {
        entry.name
        for entry in package.iterdir()
        if entry.is_dir() and not entry.is_symlink() and entry.name != "__pycache__"
    }
    modules = {entry.name for entry in package.glob("*.py")}
    named = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)), set(re.findall(r"\b(\w+\.py)\b", tree))
    assert named == (folders, modules)
    contract = re.search(
        r"contract:order\].*?layers =\n(.*?)exhaustive", (ROOT / ".importlinter").read_text(), re.DOTALL
    )
    assert contract and layers.split("\n") == [line.strip() for line in contract[1].split("\n")]


def test_every_benchmark_is_in_the_layout() -> None:
    text = (DOCS / "project-layout.md").read_text().partition("## Benchmarks")[2]
    named = set(re.findall(r"`(\w+\.py)`", text))
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    parts_of_a_study = {name for name in scripts if name.startswith("study_")}
    assert named == scripts - parts_of_a_study


def test_every_page_is_in_the_site_and_in_the_readme() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    names = {page.name for page in pages()} - {"README.md"}
    assert {name for entry in site["nav"] for name in _files(entry)} == names
    linked = set(re.findall(r"\(docs/([\w-]+\.md)\)", README.read_text()))
    assert linked == names - {"index.md", "patches-contributing.md"}


def _files(entry: object) -> list[str]:
    if isinstance(entry, dict):
        return [name for value in entry.values() for name in _files(value)]
    return [name for value in entry for name in _files(value)] if isinstance(entry, list) else [str(entry)]
