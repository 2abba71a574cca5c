"""What the pages share: `umed report`, `umed recipe check`, `umed recipe review` and `umed serve`.

| file | holds |
| --- | --- |
| ``colours.css`` | the colours, in light and dark |
| ``document.css`` | text, tables and controls of the written pages |
| ``gallery.css``, ``gallery.js``, ``viewer.html`` | cards with pictures, filters, and the dialog of an opened one |
| ``head.html`` | the head of the written pages that have a script: what they may load, and their style |
| ``elements.js`` | making elements, without ever reading a string as HTML |
| ``heat.js`` | the one scale of every heat map |

The written pages are one HTML file each and load nothing. Texts are escaped by the template, or set as text by the script. The
page's Content-Security-Policy allows only its own script, which it names by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = Path(__file__).parent
DOCUMENT_STYLES = (PARTS / "colours.css", PARTS / "document.css")
GALLERY_STYLES = (*DOCUMENT_STYLES, PARTS / "gallery.css")
GALLERY_SCRIPTS = (PARTS / "elements.js", PARTS / "heat.js", PARTS / "gallery.js")


def render_page(
    template: Path, *, styles: Sequence[Path], scripts: Sequence[Path] = (), data: Any = None, **values: Any
) -> str:
    """The HTML of a template that is given ``style``, ``script``, ``script_hash``, ``data`` and the ``values``.

    Args:
        template: the Jinja file; a value that it uses and is not given is an error. It may include files of this folder.
        styles, scripts: files that are put one behind the other into the page.
        data: what the script reads, as JSON without infinite numbers.
        values: what the template shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps

    environment = Environment(
        loader=FileSystemLoader([template.parent, PARTS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = joined(scripts)
    return environment.get_template(template.name).render(
        style=joined(styles),
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=htmlsafe_json_dumps(
            data, dumps=lambda value, **_: json.dumps(value, allow_nan=False, separators=(",", ":"))
        ),
        **values,
    )


def joined(texts: Sequence[Path]) -> str:
    """The contents of files, one behind the other."""
    return "".join(file.read_text(encoding="utf-8") for file in texts)
