"""The README and the pages of docs/ as tests read them: code blocks, commands, generated parts, sentences."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.umed_runs import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [README, *sorted(DOCS.glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands in a page's bash blocks; continued lines and lines of one quoted argument are joined."""
    found: list[str] = []
    open_quote = False
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        if open_quote:
            found[-1] += f"\n{line}"
        elif line and not line.startswith("#"):
            found.append(line)
        open_quote = found[-1].count('"') % 2 == 1
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def check_generated(page: Path, name: str, text: str) -> None:
    """Compare what stands between the marks ``<!-- name -->`` and ``<!-- /name -->`` with ``text``, or write it."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = page.read_text().split(first)
    inside, after = rest.split(last)
    if os.environ.get("UMED_WRITE_DOCS"):
        page.write_text(f"{before}{first}\n{text}\n{last}{after}")
        return
    assert inside == f"\n{text}\n", (
        f"{page.name} is out of date: UMED_WRITE_DOCS=1 python -m pytest tests/docs/test_generated.py"
    )


def check_page(page: Path, text: str) -> None:
    """Compare a page that is generated whole, or write it."""
    if os.environ.get("UMED_WRITE_DOCS"):
        page.write_text(text)
        return
    assert page.read_text() == text, (
        f"{page.name} is out of date: UMED_WRITE_DOCS=1 python -m pytest tests/docs/test_generated.py"
    )


def sentences(page: Path, cells: bool = True) -> Iterator[str]:
    """The prose of a page, sentence by sentence, with or without the cells of tables.

    Code blocks do not count. A heading, a list item and a table cell begin a sentence of their own. Inline code is one word,
    and of a link its text counts.
    """
    text = CODE_BLOCK.sub("\n\n", page.read_text())
    text = re.sub(r"<!--.*?-->|<[^>\n]+>", " ", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^\s*\|[\s|:-]*\|\s*$", "", text, flags=re.MULTILINE)  # the line below a table's head
    text = re.sub(r"^(\s*\|.*)$", lambda row: row[1].replace("|", "\n\n") if cells else "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(#+|[-*]|\d+\.)\s+", "\n\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        yield from filter(None, re.split(r"(?<=[.!?])\*{0,2}\s+(?=[\"'(*]*[A-Z0-9a-z])", line))


def words(sentence: str) -> int:
    """Words with a letter or a digit in them."""
    return len([word for word in sentence.split() if re.search(r"\w", word)])
