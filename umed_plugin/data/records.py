"""Records: what a recipe builds, and what training and evaluation read. A record is an item of LLaVA's JSON with more fields.

Plain LLaVA trains on ``id``, ``image`` and ``conversations``. The further fields are ``objects`` (ms-swift's schema: ``ref``
class keys, ``bbox`` xyxy in pixels of the file that ``image`` names, ``bbox_type`` "real"), ``image_size`` ``[width, height]``,
``terms`` (class -> plain name, then synonyms, for all classes of the source), ``source``, ``modality``, ``patient``,
``split``, ``answer_type`` (`umed_plugin.grounding.answer_types`; "probe" for `umed_plugin.data.probes`), ``provenance``,
``augment`` where the recipe says how its studies may be augmented, and ``held_out`` (true) where its ``hold_out`` keeps the study
from training. A record of a phrase has the sentence as ``phrase``. A report's ``objects`` name its findings in ``ref`` and have
no ``bbox``.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.data.augment_rule import augment_faults
from umed_plugin.data.json_list import items_of
from umed_plugin.data.splits import SPLITS
from umed_plugin.data.texts import read_json
from umed_plugin.errors import UmedError
from umed_plugin.grounding.answer_types import ANSWER_TYPES, NEGATIVE, PHRASE, asks_for_boxes, asks_for_diagnosis
from umed_plugin.grounding.boxes import is_degenerate, is_inside
from umed_plugin.grounding.geometry import MODES, ImageGeometry

Record = dict[str, Any]

# Value of ``provenance.patient`` where nothing names the patient, and the name of the image's file stands there.
FILE_NAME = "file name"
# Value of ``provenance.boxes`` where an anomaly map drew the box, and no person. ``provenance.box_score`` is its peak, 0-1.
PSEUDO = "pseudo"
_PIXELS = "real"  # ms-swift's name for boxes in pixels; it has "norm1" and "norm1000" for shares of the image

_FIELDS = {
    "id": str,
    "image": str,
    "conversations": list,
    "objects": dict,
    "image_size": list,
    "terms": dict,
    "split": str,
    "answer_type": str,
    "provenance": dict,
}
_FAULTS_SHOWN = 10


def record_faults(record: Any) -> list[str]:
    """Why an item is not a valid record, field by field: what was found and what is needed. Empty for a valid record.

    Whether boxes lie within the image is asked of files alone: `load_records`.
    """
    if not isinstance(record, dict):
        return [f"is {type(record).__name__}; a record is an object"]
    faults = [f"has no field {name!r}" for name in _FIELDS if name not in record]
    for name, kind in _FIELDS.items():
        if name in record and not isinstance(record[name], kind):
            faults.append(f"field {name!r} is {type(record[name]).__name__}; needed: {kind.__name__}")
    if faults:
        return faults
    return (
        _object_faults(record)
        + _value_faults(record)
        + (augment_faults(record["augment"]) if "augment" in record else [])
    )


def _object_faults(record: Any) -> list[str]:
    """What is wrong with the lesions: names, boxes, and the unit of the boxes."""
    refs, boxes, unit = (record["objects"].get(key) for key in ("ref", "bbox", "bbox_type"))
    if not isinstance(refs, list) or not isinstance(boxes, list) or len(boxes) not in _lengths(record, refs):
        return ["'objects' needs lists 'ref' and 'bbox' of the same length"]
    faults = [
        f"objects.ref {ref!r} is not in 'terms' ({', '.join(record['terms'])})"
        for ref in refs
        if ref not in record["terms"]
    ]
    if record["answer_type"] == PHRASE and not (isinstance(record.get("phrase"), str) and boxes):
        faults.append("answer_type is 'phrase'; needed: a text 'phrase', and its boxes")
    if record["answer_type"] == NEGATIVE and boxes:
        faults.append(f"answer_type is 'negative', but objects.bbox has {len(boxes)}; needed: none, or 'grounded'")
    if unit not in (None, _PIXELS):
        faults.append(f"objects.bbox_type is {unit!r}; needed: {_PIXELS!r}, boxes in pixels of the image. Convert them")
    for index, box in enumerate(boxes):
        if not _is_box(box):
            faults.append(f"objects.bbox[{index}] is {box!r}; needed: 4 numbers, x1 < x2 and y1 < y2")
    return faults


def _value_faults(record: Any) -> list[str]:
    """What is wrong with the fields that hold one of a few values, the size of the image, and the conversation."""
    faults = []
    size, mode = record["image_size"], record["provenance"].get("image_aspect_ratio")
    if not _is_size(size):
        faults.append(f"'image_size' is {size!r}; needed: [width, height], whole numbers above 0")
    for found, name, allowed in (
        (mode, "provenance.image_aspect_ratio", MODES),
        (record["answer_type"], "answer_type", ANSWER_TYPES),
        (record["split"], "split", SPLITS),
    ):
        if found not in allowed:
            faults.append(f"{name} is {found!r}; allowed: {', '.join(allowed)}")
    if not _is_asked_and_answered(record["conversations"]):
        faults.append(
            "'conversations' needs a turn from 'human' and then one from 'gpt', each with its text as 'value'"
        )
    return faults


def _lengths(record: Any, refs: list[Any]) -> tuple[int, ...]:
    """How many boxes a record may have."""
    return (len(refs),) if asks_for_boxes(record) else (0,)


def _is_asked_and_answered(turns: list[Any]) -> bool:
    written = all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
    return written and [turn.get("from") for turn in turns[:2]] == ["human", "gpt"]


def is_plain_item(record: Any) -> bool:
    """Whether an item is one of LLaVA's own, which has no true boxes."""
    return (
        isinstance(record, dict) and "conversations" in record and not {"objects", "image_size", "terms"} & set(record)
    )


def _is_size(size: Any) -> bool:
    return len(size) == 2 and all(type(value) is int and value > 0 for value in size)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in box) and not is_degenerate(box)


def _outside_faults(record: Record) -> list[str]:
    """Boxes of a valid record that leave its image. Those of augmented studies may reach into the padding; no file holds them."""
    width, height = record["image_size"]
    return [
        f"objects.bbox[{index}] is {box!r}; needed: within the image of {width} x {height} pixels"
        for index, box in enumerate(record["objects"]["bbox"])
        if not is_inside(box, width, height)
    ]


def is_diagnosed(record: Record) -> bool:
    """Whether the record is a diagnosis of lesions: no negative, phrase, report or probe."""
    return bool(record["objects"]["ref"]) and asks_for_diagnosis(record)


def load_records(path: str | Path, *, split: str | None = None) -> list[Record]:
    """Read a JSON list of records as ``umed recipe build`` writes it.

    Args:
        path: of the file.
        split: keep only the records of this split; all are checked.

    Raises:
        UmedError: the file is missing, not a JSON list, or holds items that are not records (index and field are named).

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from umed_plugin import load_records, save_records
        >>> record = {
        ...     "id": "drawn/a.png",
        ...     "image": "/data/a.png",
        ...     "image_size": [200, 100],
        ...     "objects": {"ref": ["cyst"], "bbox": [[50, 25, 100, 75]], "bbox_type": "real"},
        ...     "terms": {"cyst": ["cyst", "fluid-filled cavity"]},
        ...     "conversations": [
        ...         {"from": "human", "value": "What is abnormal in this image?"},
        ...         {"from": "gpt", "value": "At [0.25, 0.38, 0.50, 0.62] lies a cyst."},
        ...     ],
        ...     "split": "train",
        ...     "answer_type": "grounded",
        ...     "provenance": {"image_aspect_ratio": "pad"},
        ... }
        >>> path = Path(tempfile.mkdtemp()) / "train.json"
        >>> save_records([record], path)
        >>> load_records(path) == [record]
        True
    """
    path = Path(path)
    check_exists(path)
    try:
        return _checked((placed.item for placed in items_of(path, strict=True)), path, split)
    except (ValueError, RecursionError):
        return _checked(_whole_list(path), path, split)


def _checked(items: Iterable[Any], path: Path, split: str | None) -> list[Record]:
    check, terms, records = RecordsCheck(path), SharedTerms(), []
    for item in items:
        check.add(item)
        if isinstance(item, dict) and split in (None, item.get("split")):
            records.append(terms.in_record(item))
    check.finish()
    return records


def check_exists(path: Path) -> None:
    """Raise a `UmedError` if the file does not exist."""
    if not path.is_file():
        raise UmedError(f"{path}: no such file. Write it with: umed recipe build RECIPE --out {shlex.quote(str(path))}")


def _whole_list(path: Path) -> list[Any]:
    """The content of a file that cannot be read item by item: it is in UTF-16, or not a list in JSON."""
    try:
        content = read_json(path)
    except UmedError as error:
        raise UmedError(f"{error}. Expected: what `umed recipe build` writes.") from error
    if not isinstance(content, list):
        raise UmedError(f"{path}: holds a {type(content).__name__}. Expected: a list of records.")
    return content


def not_records(path: Path, error: Exception) -> UmedError:
    """The error for a file that cannot be read item by item."""
    try:
        _whole_list(path)
    except UmedError as found:
        return found
    return UmedError(f"{path}: cannot be read item by item ({error}). Save it as UTF-8.")


class RecordsCheck:
    """Checks records one after the other, and keeps none of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = self._plain = self._fault_count = 0
        self._first_plain: int | None = None
        self._faults: list[str] = []

    def add(self, record: Any) -> None:
        """Check the next record."""
        index = self._count
        self._count += 1
        if is_plain_item(record):
            self._plain += 1
            self._first_plain = index if self._first_plain is None else self._first_plain
        elif found := record_faults(record) or _outside_faults(record):
            self._fault_count += len(found)
            if len(self._faults) < _FAULTS_SHOWN:
                self._faults += [f"{self._path}[{index}]: {fault}" for fault in found]

    def finish(self) -> None:
        """Raise a `UmedError` if one of them is not a record."""
        if self._plain:
            raise UmedError(
                f"{self._path}: {self._plain} of {self._count} items (the first: [{self._first_plain}]) are plain LLaVA items "
                "without true boxes: they have no 'objects', 'image_size' and 'terms'. Stage 2 and evaluation need the records "
                "that `umed recipe build` writes."
            )
        if self._faults:
            hidden = self._fault_count - _FAULTS_SHOWN
            more = f"\n... and {hidden} more" if hidden > 0 else ""
            raise UmedError("\n".join(self._faults[:_FAULTS_SHOWN]) + more + "\nBuild it again with: umed recipe build")


class SharedTerms:
    """Lets records hold one object for equal ``terms``, which each repeats."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    def in_record(self, record: Any) -> Any:
        """The record with the shared object."""
        if isinstance(record, dict) and isinstance(record.get("terms"), dict):
            record["terms"] = self._known.setdefault(json.dumps(record["terms"]), record["terms"])
        return record


def are_pseudo(record: Record) -> bool:
    """Whether no person drew the record's boxes."""
    provenance = record.get("provenance")
    return isinstance(provenance, dict) and provenance.get("boxes") == PSEUDO


def with_pseudo_boxes(records: Iterable[Record]) -> list[Record]:
    """Those of the records whose boxes no person drew."""
    return list(filter(are_pseudo, records))


def save_records(records: Sequence[Record], path: str | Path) -> None:
    """Write records as LLaVA's JSON list. The file is written whole or not at all.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from umed_plugin import load_records, save_records
        >>> path = Path(tempfile.mkdtemp()) / "train.json"
        >>> save_records([], path)
        >>> load_records(path)
        []
    """
    files.write_json(path, list(records))


def record_geometry(record: Record, image_size: int = 336, patch_size: int = 14) -> ImageGeometry:
    """The geometry of a record's image, in the aspect-ratio mode that the record was built for.

    Args:
        image_size, patch_size: of the vision tower, in pixels.

    Example:
        >>> from umed_plugin import record_geometry
        >>> record = {"image_size": [200, 100], "provenance": {"image_aspect_ratio": "pad"}}
        >>> record_geometry(record).to_square([(50, 25, 100, 75)])
        [(0.25, 0.375, 0.5, 0.625)]
    """
    width, height = record["image_size"]
    return ImageGeometry(int(width), int(height), record["provenance"]["image_aspect_ratio"], image_size, patch_size)


def true_boxes(record: Record) -> list[tuple[float, float, float, float]]:
    """The boxes of a record's lesions, xyxy in pixels of the file that ``image`` names; none for a report."""
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in record["objects"]["bbox"]]


def box_decimals(record: Record) -> int:
    """How many decimals a record's text writes coordinates with; 2, as LLaVA does, where its provenance does not say.

    Raises:
        UmedError: its provenance says something else than a whole number above 0.
    """
    decimals = record["provenance"].get("box_decimals", 2)
    if type(decimals) is not int or decimals < 1:
        raise UmedError(
            f"record {record['id']!r}: provenance.box_decimals is {decimals!r}; needed: 2 or 3, as `umed recipe build` writes "
            "it. Correct it, or build the records again."
        )
    return decimals
