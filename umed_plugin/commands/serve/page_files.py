"""What the browser gets as it is: the page, its style and its scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umed_plugin.commands.page_parts import PARTS, joined

_OWN = Path(__file__).parent
# In this order: ``page.js`` uses the others as soon as it runs.
_SCRIPTS = ("requests", "pane", "answers", "saving", "choosing", "overlays", "asking", "page")
# Path -> the files that are sent one behind the other, and their type.
_FILES = {
    "/page.css": ((PARTS / "colours.css", _OWN / "page.css"), "text/css"),
    "/page.js": (
        (
            PARTS / "elements.js",
            PARTS / "heat.js",
            *(_OWN / f"{name}.js" for name in _SCRIPTS),
        ),
        "text/javascript",
    ),
}
FILES = tuple(_FILES)


def page_file(path: str) -> tuple[bytes, str]:
    """The content of a path of `FILES`, and its type."""
    files, kind = _FILES[path]
    return joined(files).encode(), f"{kind}; charset=utf-8"


def page_html(about: dict[str, Any]) -> bytes:
    """The page for a server with this checkpoint, limit of uploads and suggested questions."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_OWN), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(about).encode()
