"""Text that is burnt into pixels, where a patient's name may stand: found before an image leaves the machine.

Two signs: what the DICOM header says (BurnedInAnnotation, kept by the build as ``provenance.burned_in_annotation``), and a simple
detector of lines of letters. The detector looks for small, crisp shapes of one brightness that stand in a row, at least
`LEAST_LETTERS` of them; it does not read. It misses handwriting, single letters and text on a busy ground, and takes some rows of
structures for text: it is a warning, not a proof in either direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umed_plugin import files
from umed_plugin.data.images.drawing import read_pixels
from umed_plugin.data.records import Record
from umed_plugin.errors import UmedError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LEAST_LETTERS = 5
_HEIGHTS = (5, 64)  # pixels of a letter
_CONTRAST = 70  # grey levels between a letter and what is around it


@dataclass
class Divided:
    """Records by whether they may be sent.

    Attributes:
        allowed: in their order, those without lesions among them.
        suspected: record id -> why it may have text burnt in.
        left_out: number of records that the user's list holds back.
        unknown: ids in that list that no record has.
    """

    unknown: set[str]
    allowed: list[Record] = field(default_factory=list)
    suspected: dict[str, str] = field(default_factory=dict)
    left_out: int = 0


def suspicion(record: Record, folder: Path) -> str | None:
    """Why an image may have text burnt in, or None.

    Args:
        folder: that the record's ``image`` is relative to.
    """
    flag = record["provenance"].get("burned_in_annotation")
    if flag == "YES":
        return "its DICOM header says BurnedInAnnotation YES"
    lines = text_lines(read_pixels(folder / record["image"]))
    if not lines:
        return None
    x1, y1, x2, y2 = lines[0]
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    return f"what looks like a line of text at x {x1}-{x2}, y {y1}-{y2} px{more}"


def text_lines(image: Image) -> list[tuple[int, int, int, int]]:
    """Places that look like lines of text, ``(x1, y1, x2, y2)`` in pixels, from top to bottom."""
    import numpy as np

    grey = np.asarray(image.convert("L"), dtype=np.int16)
    found = [line for values in (grey, 255 - grey) for line in _rows(_letters(values))]
    return sorted(set(found), key=lambda line: (line[1], line[0]))


def _letters(values: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Bounding boxes of small bright shapes with sharp edges, in 0-255 grey ``[height, width]``."""
    import numpy as np
    from scipy import ndimage

    # Brighter than what surrounds a letter of any allowed size; the opening takes small bright things away.
    ground = ndimage.grey_opening(values, size=(9, 9))
    bright = (values - ground > _CONTRAST) & (values > 150)
    labels, _ = ndimage.label(bright, structure=np.ones((3, 3)))
    letters = []
    for index, place in enumerate(ndimage.find_objects(labels), start=1):
        height, width = place[0].stop - place[0].start, place[1].stop - place[1].start
        if not _HEIGHTS[0] <= height <= _HEIGHTS[1] or not 1 <= width <= 1.6 * height:
            continue
        shape = labels[place] == index
        inside = values[place][shape]
        if shape.mean() >= 0.12 and inside.std() < 40:
            letters.append((place[1].start, place[0].start, place[1].stop, place[0].stop))
    return letters


def _rows(letters: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Lines of letters of about one height, on one base line, not far from one another."""
    rows: list[list[tuple[int, int, int, int]]] = []
    for letter in sorted(letters):
        row = next((row for row in rows if _goes_on(row[-1], letter)), None)
        if row is None:
            rows.append([letter])
        else:
            row.append(letter)
    return [
        (row[0][0], min(each[1] for each in row), row[-1][2], max(each[3] for each in row))
        for row in rows
        if len(row) >= LEAST_LETTERS
    ]


def _goes_on(last: tuple[int, int, int, int], letter: tuple[int, int, int, int]) -> bool:
    one, other = last[3] - last[1], letter[3] - letter[1]
    tall = max(one, other)
    on_line = abs(last[3] - letter[3]) <= max(1, 0.2 * tall) or abs(last[1] - letter[1]) <= max(1, 0.1 * tall)
    return on_line and min(one, other) >= 0.55 * tall and -1 <= letter[0] - last[2] <= 1.2 * tall


_LIST_HEAD = """# Images that may have text burnt in, and why; they were not sent. Look at each, take the lines of harmless ones
# out, and build again with: --burnt-in send --leave-out THIS_FILE
"""


def write_list(suspected: dict[str, str], file: Path, kept: set[str]) -> None:
    """Write record ids with the reason behind each, in the form that `read_list` reads.

    Args:
        kept: ids that were left out by the user's own list: this file may be that list, and must not lose them.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    suspected = {**dict.fromkeys(sorted(kept), "left out by --leave-out"), **suspected}
    files.write_text(file, _LIST_HEAD + "".join(f"{name}\t# {why}\n" for name, why in suspected.items()))


def read_list(file: Path) -> set[str]:
    """Record ids, one a line; what stands behind a tab is a remark, and lines that begin with # are.

    Raises:
        UmedError: the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UmedError(
            f"{file}: cannot be read ({error}). Needed: a text file with a record's id in each line."
        ) from error
    return {line.split("\t")[0].strip() for line in lines if line.strip() and not line.startswith("#")}


def divide(records: Iterable[Record], folder: Path, *, send: bool, left_out: set[str]) -> Divided:
    """Which records with lesions may leave the machine.

    Args:
        send: also those that are suspected.
        left_out: ids that never do.
    """
    result = Divided(unknown=set(left_out))
    for record in records:
        name = record["id"]
        result.unknown.discard(name)
        if not record["objects"]["ref"]:
            result.allowed.append(record)  # a negative is not sent at all
        elif name in left_out:
            result.left_out += 1
        elif (why := suspicion(record, folder)) is not None:
            result.suspected[name] = why
            if send:
                result.allowed.append(record)
        else:
            result.allowed.append(record)
    return result
