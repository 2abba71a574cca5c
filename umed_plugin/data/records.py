"""Records: what a recipe builds, and what training and evaluation read. A record is an item of LLaVA's JSON with more fields.

Plain LLaVA trains on ``id``, ``image`` and ``conversations``. The further fields are ``objects`` (ms-swift's schema: ``ref``
class keys, ``bbox`` xyxy in pixels of the file that ``image`` names, ``bbox_type`` "real"), ``image_size`` ``[width, height]``,
``terms`` (class -> plain name, then synonyms, for all classes of the source), ``source``, ``modality``, ``patient``,
``split``, ``answer_type`` ("grounded" or "negative") and ``provenance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.data.texts import read_json
from umed_plugin.errors import UmedError
from umed_plugin.grounding.geometry import MODES, ImageGeometry

Record = dict[str, Any]

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
    """Why an item is not a valid record, field by field: what was found and what is needed. Empty for a valid record."""
    if not isinstance(record, dict):
        return [f"is {type(record).__name__}; a record is an object"]
    faults = [f"has no field {name!r}" for name in _FIELDS if name not in record]
    for name, kind in _FIELDS.items():
        if name in record and not isinstance(record[name], kind):
            faults.append(f"field {name!r} is {type(record[name]).__name__}; needed: {kind.__name__}")
    if faults:
        return faults
    refs, boxes = record["objects"].get("ref"), record["objects"].get("bbox")
    if not isinstance(refs, list) or not isinstance(boxes, list) or len(refs) != len(boxes):
        faults.append("'objects' needs lists 'ref' and 'bbox' of the same length")
    else:
        faults += [
            f"objects.ref {ref!r} is not in 'terms' ({', '.join(record['terms'])})"
            for ref in refs
            if ref not in record["terms"]
        ]
        faults += [
            f"objects.bbox[{i}] is {box!r}; needed: 4 numbers" for i, box in enumerate(boxes) if not _is_box(box)
        ]
    size, mode = record["image_size"], record["provenance"].get("image_aspect_ratio")
    if len(size) != 2 or not all(type(value) is int and value > 0 for value in size):
        faults.append(f"'image_size' is {size!r}; needed: [width, height], whole numbers above 0")
    if mode not in MODES:
        faults.append(f"provenance.image_aspect_ratio is {mode!r}; allowed: {', '.join(MODES)}")
    if not _is_asked_and_answered(record["conversations"]):
        faults.append(
            "'conversations' needs a turn from 'human' and then one from 'gpt', each with its text as 'value'"
        )
    return faults


def _is_asked_and_answered(turns: list[Any]) -> bool:
    written = all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
    return written and [turn.get("from") for turn in turns[:2]] == ["human", "gpt"]


def _is_plain_item(record: Any) -> bool:
    return (
        isinstance(record, dict) and "conversations" in record and not {"objects", "image_size", "terms"} & set(record)
    )


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)


def load_records(path: str | Path) -> list[Record]:
    """Read a JSON list of records as ``umed recipe build`` writes it.

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
    if not path.is_file():
        raise UmedError(f"{path}: no such file. Write it with: umed recipe build RECIPE --out {path}")
    try:
        records = read_json(path)
    except UmedError as error:
        raise UmedError(f"{error}. Expected: what `umed recipe build` writes.") from error
    if not isinstance(records, list):
        raise UmedError(f"{path}: holds a {type(records).__name__}. Expected: a list of records.")
    plain = [index for index, record in enumerate(records) if _is_plain_item(record)]
    if plain:
        raise UmedError(
            f"{path}: {len(plain)} of {len(records)} items (the first: [{plain[0]}]) are plain LLaVA items without true boxes: "
            "they have no 'objects', 'image_size' and 'terms'. Stage 2 and evaluation need the records that `umed recipe build` "
            "writes."
        )
    faults = [f"{path}[{i}]: {fault}" for i, record in enumerate(records) for fault in record_faults(record)]
    if faults:
        more = f"\n... and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UmedError("\n".join(faults[:_FAULTS_SHOWN]) + more + "\nBuild it again with: umed recipe build")
    return records


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
    """The boxes of a record's lesions, xyxy in pixels of the file that ``image`` names."""
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in record["objects"]["bbox"]]
