"""The review page: image, boxes and text of each record, to be accepted, edited or rejected in a browser.

It is one self-contained HTML file: its Content-Security-Policy forbids loading anything else. It opens without a server and keeps
the decisions in the browser. A button downloads them for ``umed recipe build --decisions FILE``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.data.images import drawing
from umed_plugin.data.records import Record, record_geometry
from umed_plugin.data.writing.checks import Findings
from umed_plugin.data.writing.decisions import answer_of, text_digest
from umed_plugin.grounding.boxes import format_box

PAGE_RECORDS = 200  # records per page: about 20 MB of images, which a browser opens without delay
IMAGE_SIDE = 640  # pixels


def choose(records: Sequence[Record], sample: int | None, seed: int = 0) -> list[Record]:
    """All records set aside, then all others or a random ``sample`` of them. The same seed gives the same sample."""
    set_aside = [record for record in records if "aside" in record]
    others = [record for record in records if "aside" not in record]
    if sample is not None and sample < len(others):
        chosen = sorted(random.Random(seed).sample(range(len(others)), sample))
        others = [others[index] for index in chosen]
    return [*set_aside, *others]


def write_pages(records: Sequence[Record], folder: Path, file: Path) -> list[Path]:
    """Write the records as one page, or as several of `PAGE_RECORDS` each.

    Args:
        records: from `choose`, those set aside first.
        folder: the folder that the records' images are relative to.
        file: the first page; further pages get a number before the file extension.

    Returns:
        the files that were written.
    """
    pages = [records[start : start + PAGE_RECORDS] for start in range(0, len(records), PAGE_RECORDS)]
    written = []
    for number, page in enumerate(pages, start=1):
        target = file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(target, render(page, folder, target.stem, f"{number} of {len(pages)}"))
        written.append(target)
    return written


def render(records: Sequence[Record], folder: Path, name: str, page: str) -> str:
    """The HTML of one page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    cards = [_card(record, folder) for record in records]
    return environment.get_template("review.html").render(cards=cards, name=name, page=page)


def _card(record: Record, folder: Path) -> dict[str, Any]:
    findings = Findings.of(record)
    square = drawing.square_of(drawing.read_pixels(folder / record["image"]), record_geometry(record))
    square.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return {
        "id": record["id"],
        "about": ", ".join(str(record[name]) for name in ("split", "modality") if record.get(name)),
        "writer": record["provenance"].get("model", record["provenance"].get("writer", "")),
        "image": drawing.as_data_url(square, quality=88),
        "boxes": [[round(value, 5) for value in box] for box in findings.boxes01],
        "lesions": [
            {"name": name, "box": format_box(box, findings.decimals)}
            for name, box in zip(findings.names, findings.boxes01)
        ],
        "question": record["conversations"][0]["value"].replace("<image>", "").strip(),
        "text": answer_of(record),
        "shown": text_digest(answer_of(record)),
        "decimals": findings.decimals,
        "faults": record.get("aside", []),
    }
