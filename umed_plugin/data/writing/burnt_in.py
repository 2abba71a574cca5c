"""Detects text burnt into pixels, which may be a patient's name, before an image leaves the machine.

There are two signs: the DICOM header (BurnedInAnnotation, kept by the build as ``provenance.burned_in_annotation``), and a simple
detector of lines of text. The detector looks for a row of at least `MIN_LETTERS` small, sharp shapes of one brightness; it does
not read them. It misses handwriting, single letters and text on a busy background, and takes some rows of structures for text. It
is a warning, not a proof in either direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umed_plugin import files
from umed_plugin.data.images.drawing import read_pixels
from umed_plugin.data.records import Record, is_diagnosed
from umed_plugin.errors import UmedError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MIN_LETTERS = 5
_HEIGHTS = (5, 64)  # of a letter, in pixels
_CONTRAST = 70  # grey levels between a letter and its surroundings


@dataclass
class Screening:
    """Which records may be sent.

    Attributes:
        unknown: ids in the user's list that no record has.
        allowed: records that may be sent, and those without lesions, in their original order.
        suspected: record id -> why its image may have text burnt in.
        left_out: number of records that are left out because of the user's list.
    """

    unknown: set[str]
    allowed: list[Record] = field(default_factory=list)
    suspected: dict[str, str] = field(default_factory=dict)
    left_out: int = 0


def suspicion(record: Record, folder: Path) -> str | None:
    """Why a record's image may have text burnt in, or None.

    Args:
        record: as built.
        folder: the folder that the record's ``image`` is relative to.
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
    """Regions that look like lines of text, ``(x1, y1, x2, y2)`` in pixels, from top to bottom."""
    import numpy as np

    grey = np.asarray(image.convert("L"), dtype=np.int16)
    lines = {line for values in (grey, 255 - grey) for line in _rows(_letters(values))}
    return sorted(lines, key=lambda line: (line[1], line[0], line))


def _letters(values: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Bounding boxes of small bright shapes with sharp edges, in 0-255 grey ``[height, width]``."""
    import numpy as np
    from scipy import ndimage

    # The opening removes small bright shapes, so the difference shows what is brighter than its surroundings.
    ground = ndimage.grey_opening(values, size=(9, 9))
    bright = (values - ground > _CONTRAST) & (values > 150)
    labels, _ = ndimage.label(bright, structure=np.ones((3, 3)))
    letters = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not _HEIGHTS[0] <= height <= _HEIGHTS[1] or not 1 <= width <= 1.6 * height:
            continue
        shape = labels[rows, columns] == index
        inside = values[rows, columns][shape]
        if shape.mean() >= 0.12 and inside.std() < 40:
            letters.append((columns.start, rows.start, columns.stop, rows.stop))
    return letters


def _rows(letters: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Bounding boxes of rows of letters that have about the same height, the same baseline and small gaps."""
    rows: list[list[tuple[int, int, int, int]]] = []
    for letter in sorted(letters):
        row = next((row for row in rows if _continues(row[-1], letter)), None)
        if row is None:
            rows.append([letter])
        else:
            row.append(letter)
    return [
        (row[0][0], min(letter[1] for letter in row), row[-1][2], max(letter[3] for letter in row))
        for row in rows
        if len(row) >= MIN_LETTERS
    ]


def _continues(last: tuple[int, int, int, int], letter: tuple[int, int, int, int]) -> bool:
    """Whether a letter continues the row that ends with ``last``."""
    heights = (last[3] - last[1], letter[3] - letter[1])
    tallest = max(heights)
    aligned = abs(last[3] - letter[3]) <= max(1, 0.2 * tallest) or abs(last[1] - letter[1]) <= max(1, 0.1 * tallest)
    return aligned and min(heights) >= 0.55 * tallest and -1 <= letter[0] - last[2] <= 1.2 * tallest


_LIST_HEAD = """# Images that may have text burnt in, and why. They were not sent. Look at each image, delete the
# lines of harmless ones, and build again with: --burnt-in send --leave-out THIS_FILE
"""


def write_list(suspected: dict[str, str], file: Path, kept: set[str]) -> None:
    """Write record ids, each with its reason, in the format that `read_list` reads.

    Args:
        suspected: record id -> reason.
        file: the file to write.
        kept: ids that the user's own list leaves out. This file may be that list, and must not lose them.
    """
    suspected = {**dict.fromkeys(sorted(kept), "left out by --leave-out"), **suspected}
    files.write_text(file, _LIST_HEAD + "".join(f"{name}\t# {why}\n" for name, why in suspected.items()))


def read_list(file: Path) -> set[str]:
    """Record ids, one per line. Text after a tab and lines that begin with # are comments.

    Raises:
        UmedError: the file cannot be read.
    """
    try:
        # utf-8-sig: behind a byte-order mark, the first id would name no record, and that image would be sent.
        # Not splitlines(): an id is a file's name, which may hold U+0085 or U+2028.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UmedError(
            f"{file}: cannot be read ({error}). Needed: a text file with one record id per line."
        ) from error
    return {line.split("\t")[0].strip() for line in lines if line.strip() and not line.startswith("#")}


def screen(records: Iterable[Record], folder: Path, *, send: bool, left_out: set[str]) -> Screening:
    """Decide which records with lesions may leave the machine.

    Args:
        records: as built.
        folder: the folder that the records' ``image`` is relative to.
        send: allow suspected images, too.
        left_out: ids of records that are never sent.
    """
    result = Screening(unknown=set(left_out))
    for record in records:
        name = record["id"]
        result.unknown.discard(name)
        if not is_diagnosed(record):
            result.allowed.append(record)  # images without a lesion are never sent
        elif name in left_out:
            result.left_out += 1
        elif (why := suspicion(record, folder)) is not None:
            result.suspected[name] = why
            if send:
                result.allowed.append(record)
        else:
            result.allowed.append(record)
    return result
