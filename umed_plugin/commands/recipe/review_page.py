"""The review page: image, boxes and text of each record, to be accepted, edited or rejected in a browser.

It is one self-contained HTML file, which opens without a server and keeps the decisions in the browser. A button downloads them
for ``umed recipe build --decisions FILE``. Boxes can be moved; a moved box is written into the text, and becomes the record's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.commands.page_parts import DOCUMENT_STYLES, PARTS, render_page
from umed_plugin.data.images import drawing
from umed_plugin.data.records import Record, record_geometry
from umed_plugin.data.writing.agreement import reviewer_of
from umed_plugin.data.writing.checks import Findings
from umed_plugin.data.writing.decisions import Decision, answer_of, text_digest
from umed_plugin.grounding.boxes import format_box

PAGE_RECORDS = 200  # records per page: about 20 MB of images, which a browser opens without delay
IMAGE_SIDE = 640  # pixels


def write_pages(
    records: Sequence[Record], folder: Path, file: Path, others: Mapping[str, Sequence[Decision]] | None = None
) -> list[Path]:
    """Write the records as one page, or as several of `PAGE_RECORDS` each.

    Args:
        records: from `umed_plugin.data.writing.review.choose`, those set aside first.
        folder: the folder that the records' images are relative to.
        file: the first page; further pages get a number before the file extension.
        others: id -> the decisions of others, which this page settles.

    Returns:
        the files that were written.
    """
    pages = [records[start : start + PAGE_RECORDS] for start in range(0, len(records), PAGE_RECORDS)]
    written = []
    for number, page in enumerate(pages, start=1):
        target = file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        place = f"{number} of {len(pages)}" if len(pages) > 1 else ""
        files.write_text(target, render(page, folder, target.stem, place, others))
        written.append(target)
    return written


def render(
    records: Sequence[Record],
    folder: Path,
    name: str,
    page: str,
    others: Mapping[str, Sequence[Decision]] | None = None,
) -> str:
    """The HTML of one page. ``page`` is its place, such as "2 of 3"; empty where it is the only one."""
    own = Path(__file__).parent
    cards = [_card(record, folder, (others or {}).get(record["id"], ())) for record in records]
    read_by_script = ("id", "shown", "text", "decimals", "inside", "lesions", "aside")
    return render_page(
        own / "review.html",
        styles=[*DOCUMENT_STYLES, own / "review.css"],
        scripts=[PARTS / "elements.js", own / "review_boxes.js", own / "review.js"],
        data={
            "name": name,
            "settles": others is not None,
            "cards": [{key: card[key] for key in read_by_script} for card in cards],
        },
        cards=cards,
        # The file is called records.review.html, and records.review-2.html if there are more.
        name=re.sub(r"\.(review|disagreements)(-\d+)?$", "", name),
        page=page,
        settles=others is not None,
    )


def _card(record: Record, folder: Path, others: Sequence[Decision]) -> dict[str, Any]:
    findings, geometry = Findings.of(record), record_geometry(record)
    square = drawing.square_of(drawing.read_pixels(folder / record["image"]), geometry)
    square.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    (inside,) = geometry.to_square([(0.0, 0.0, *map(float, record["image_size"]))])
    return {
        "id": record["id"],
        "about": ", ".join(str(record[name]) for name in ("split", "modality") if record.get(name)),
        "writer": record["provenance"].get("model", record["provenance"].get("writer", "")),
        "image": drawing.as_data_url(square, quality=88),
        # Where the picture lies in the square: a box cannot be moved into the padding.
        "inside": [round(value, 5) for value in inside],
        "lesions": [
            {"name": name, "box": format_box(box, findings.decimals), "at": [round(value, 5) for value in box]}
            for name, box in zip(findings.names, findings.boxes01)
        ],
        "question": record["conversations"][0]["value"].replace("<image>", "").strip(),
        "text": answer_of(record),
        "shown": text_digest(answer_of(record)),
        "decimals": findings.decimals,
        "faults": record.get("aside", []),
        "aside": bool(record.get("aside")),
        "others": [
            {"reviewer": reviewer_of(one), "decision": one.kind, "text": one.text, "note": one.note} for one in others
        ],
    }
