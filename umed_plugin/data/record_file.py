"""Records that stay in their JSON file and are read when they are asked for.

All items are checked once, one after the other. Then only numbers are in memory: where each record's text begins, its split, its
number of words. These are kept beside the file (``.NAME.index.npz``), so the next start, and the other processes, need not read
the file again. The index may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

from umed_plugin import files
from umed_plugin.data.items import ItemsCheck, as_meant
from umed_plugin.data.json_list import Placed, items_of
from umed_plugin.data.records import FILE_NAME, Record, RecordsCheck
from umed_plugin.errors import UmedError, warn
from umed_plugin.files import text_bytes
from umed_plugin.files.kept_arrays import kept_arrays
from umed_plugin.grounding.answer_types import PROBE, REPORT

_FORMAT = "index-6"
_COLUMNS = {
    "start": np.int64,
    "length": np.int64,
    "words": np.int32,
    "has_image": np.bool_,
    "has_reading": np.bool_,
    "labelled": np.bool_,
    "has_boxes": np.bool_,
    "probe": np.bool_,
    "report": np.bool_,
    "has_patient": np.bool_,
    "patient": np.int64,
    "picture": np.int64,
    "split": np.int32,
    "aspect": np.int32,
}


@dataclass(frozen=True)
class Index:
    """What is in memory of each record.

    Attributes:
        columns: arrays [n]: ``start`` and ``length`` of its text in the file, in bytes; ``words`` of its turns; ``has_image``;
            ``has_reading`` (LLaVA does not read the image as it was annotated); ``labelled`` (it has true boxes, or is known to
            have none); ``has_boxes`` (it has true boxes); ``probe`` (stage 1's alone, see `umed_plugin.data.probes`); ``report``
            (its answer has no boxes); ``has_patient``, one that is not only the file's name; ``patient``, a hash of source and
            patient, or of the image, in 0 to 2^63 - 1; ``picture``, `picture_hash` of its image, or -1 without one; ``split`` and
            ``aspect``, as places in ``names``.
        names: splits and values of image_aspect_ratio that occur; the empty text stands for none.
        warnings: of the check of all items, without the file's name.
    """

    columns: dict[str, np.ndarray]
    names: list[str]
    warnings: list[str]


class RecordFile(Sequence[Record]):
    """The records of a file, or some of them, as a sequence that reads them when they are asked for.

    Args:
        path: of the JSON list.
        index: of all its records.
        chosen: indices of the records in this sequence; None: all.
    """

    def __init__(self, path: Path, index: Index, chosen: Optional[np.ndarray] = None) -> None:
        self.path, self._index = path, index
        self._chosen = np.arange(len(index.columns["start"])) if chosen is None else chosen
        self._file: Optional[int] = None
        self._state = _state(path)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        row = self._chosen[place]
        start, length = int(self._index.columns["start"][row]), int(self._index.columns["length"][row])
        data = os.pread(self._opened(), length, start)
        try:
            return as_meant(json.loads(data))
        except ValueError as error:
            raise UmedError(f"{self.path}: was changed while it was in use. Start again.") from error

    def __getstate__(self) -> dict[str, Any]:
        """For a process that a data loader starts: it opens the file itself."""
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def _opened(self) -> int:
        """The file's descriptor. A file that takes its place later is not read: the index would not fit."""
        if self._file is None:
            if _state(self.path) != self._state:
                raise UmedError(f"{self.path}: was changed while it was in use. Start again.")
            self._file = os.open(self.path, os.O_RDONLY)
        return self._file

    def column(self, name: str) -> np.ndarray:
        """A column of `Index.columns` that is a number or a bool, such as ``words`` or ``has_boxes``, [n]."""
        return self._index.columns[name][self._chosen]

    def texts(self, name: str) -> np.ndarray:
        """``split`` or ``aspect`` of the records as texts, [n]; empty where a record has no aspect."""
        return np.array(self._index.names, dtype=object)[self.column(name)]

    def where(self, keep: np.ndarray) -> RecordFile:
        """The records for which ``keep``, bool [n], is True."""
        return RecordFile(self.path, self._index, self._chosen[keep])


class JoinedRecords(Sequence[Record]):
    """Several files' records as one sequence."""

    def __init__(self, parts: Iterable[RecordFile]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(place)
        part = int(np.searchsorted(self._ends, place, side="right"))
        return self.parts[part][place - (int(self._ends[part - 1]) if part else 0)]

    def __iter__(self) -> Iterator[Record]:
        for part in self.parts:
            yield from part

    def column(self, name: str) -> np.ndarray:
        """As `RecordFile.column`."""
        return np.concatenate([part.column(name) for part in self.parts])

    def texts(self, name: str) -> np.ndarray:
        """As `RecordFile.texts`."""
        return np.concatenate([part.texts(name) for part in self.parts])

    def where(self, keep: np.ndarray) -> JoinedRecords:
        """As `RecordFile.where`."""
        return JoinedRecords(part.where(kept) for part, kept in zip(self.parts, np.split(keep, self._ends[:-1])))


def open_records(
    path: Path,
    where: str,
    separators: Iterable[str] = (),
    *,
    strict: bool,
    failed: Callable[[Exception], UmedError],
) -> RecordFile:
    """The records of a JSON list, after a check of all of them.

    Args:
        where, separators: as for `umed_plugin.data.items.check_items`, whose errors and warnings these are.
        strict: the items must be records, with true boxes; otherwise LLaVA's plain items are allowed too.
        failed: the error for a file that is not a list in JSON, from what was raised.

    Raises:
        UmedError: the file cannot be read, or has items that cannot be used.
    """
    index = make_index(path, where, separators, strict=strict, failed=failed)
    for line in index.warnings:
        warn(f"{where}: {line}")
    return RecordFile(path, index)


def make_index(
    path: Path,
    where: str,
    separators: Iterable[str] = (),
    *,
    strict: bool,
    failed: Callable[[Exception], UmedError],
) -> Index:
    """The index of a file, kept beside it for the next time; see `open_records`."""
    marks = tuple(separators)
    asked = {"format": _FORMAT, "strict": strict, "separators": list(marks), "state": _state(path)}
    index = _kept_index(path, asked)
    if index is None:
        try:
            index = _made_index(path, ItemsCheck(where, marks), strict)
        except (ValueError, RecursionError) as error:
            raise failed(error) from error
        _keep_index(path, asked, index)
    return index


def kept_splits(path: Path) -> Optional[set[str]]:
    """The splits of a file's records, from the index that a start has kept of it; None if there is none of the file as it is."""
    try:
        with kept_arrays(_index_path(path)) as kept:
            about = json.loads(str(kept["about"]))
            asked, places = about["asked"], np.unique(kept["split"])
        if (asked["format"], asked["state"]) != (_FORMAT, _state(path)):
            return None
        return {about["names"][place] for place in places}
    except Exception:  # noqa: BLE001  as in `_kept_index`
        return None


def _made_index(path: Path, check: ItemsCheck, strict: bool) -> Index:
    rows, names = _Rows(), {"": 0}
    records = RecordsCheck(path) if strict else None
    for placed in items_of(path, strict=True):
        if records is not None:
            records.add(placed.item)
        meant = check.add(placed.item)
        if isinstance(meant, dict) and isinstance(meant.get("conversations"), list):
            rows.add(_row(placed, meant, names))
    if records is not None:
        records.finish()
    warnings = check.finish()
    return Index(rows.columns(), list(names), warnings)


def _row(placed: Placed, item: Record, names: dict[str, int]) -> tuple[int, ...]:
    split, provenance = item.get("split") or "train", item.get("provenance")
    aspect = provenance.get("image_aspect_ratio", "") if isinstance(provenance, dict) else ""
    split, aspect = (text if isinstance(text, str) else json.dumps(text) for text in (split, aspect))
    turns = (turn.get("value") for turn in item["conversations"] if isinstance(turn, dict))
    words = sum(len(text.split()) for text in turns if isinstance(text, str))
    codes = [names.setdefault(text, len(names)) for text in (split, aspect)]
    kinds = [item.get("answer_type") == kind for kind in (PROBE, REPORT)]
    known = (_is_labelled(item), _has_boxes(item), *kinds)
    image = item.get("image")
    picture = picture_hash(image) if isinstance(image, str) and image else -1
    whose = (_names_patient(item), _patient_hash(item), picture)
    return (placed.start, placed.length, words, "image" in item, bool(item.get("reading")), *known, *whose, *codes)


def _is_labelled(item: Record) -> bool:
    return "image" in item and all(isinstance(item.get(name), dict) for name in ("objects", "terms", "provenance"))


def _has_boxes(item: Record) -> bool:
    return _is_labelled(item) and bool(item["objects"].get("bbox"))


def _names_patient(item: Record) -> bool:
    """Whether the record knows whose it is. A patient who is called as the file is, is nobody's."""
    provenance = item.get("provenance")
    return bool(item.get("patient")) and not (isinstance(provenance, dict) and provenance.get("patient") == FILE_NAME)


def _patient_hash(item: Record) -> int:
    """The same for all records of a patient; without one, for all of an image, of whatever source, as in an evaluation."""
    patient, image = item.get("patient"), item.get("image")
    if not patient and isinstance(image, str) and image:
        return picture_hash(image)
    return _hash(f"{item.get('source', '')}\n{patient or 'record ' + str(item.get('id'))}")


def picture_hash(image: str) -> int:
    """The same for all records of an image, in 0 to 2^63 - 1.

    The image's path is taken as it is written, so that the number stays where the data are moved.
    """
    return _hash(f"image\n{posixpath.normpath(image)}")


def _hash(text: str) -> int:
    digest = hashlib.sha256(text_bytes(text)).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Rows:
    """Rows of numbers, kept as arrays of 10,000."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._done: list[np.ndarray] = []

    def add(self, row: tuple[int, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) == 10_000:
            self._pack()

    def _pack(self) -> None:
        self._done.append(np.array(self._rows, dtype=np.int64).reshape(-1, len(_COLUMNS)))
        self._rows = []

    def columns(self) -> dict[str, np.ndarray]:
        self._pack()
        table = np.concatenate(self._done)
        return {name: table[:, place].astype(kind) for place, (name, kind) in enumerate(_COLUMNS.items())}


def _state(path: Path) -> list[int]:
    """What tells the file from one that is written over it or takes its place."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _index_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.index.npz")


def _kept_index(path: Path, asked: dict[str, Any]) -> Optional[Index]:
    """The index of an earlier start; None if there is none, or it is damaged or of another file or check."""
    try:
        with kept_arrays(_index_path(path)) as kept:
            about = json.loads(str(kept["about"]))
            columns = {name: kept[name] for name in _COLUMNS}
        if about.pop("asked") != asked or {len(column) for column in columns.values()} != {about.pop("count")}:
            return None
        return Index(columns, **about)
    except Exception:  # noqa: BLE001  a damaged archive raises whatever zip, zlib, NumPy and JSON do
        return None


def _keep_index(path: Path, asked: dict[str, Any], index: Index) -> None:
    about = {"asked": asked, "count": len(index.columns["start"]), "names": index.names, "warnings": index.warnings}
    try:
        with files.replacing(_index_path(path), durable=False) as partial, partial.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **index.columns)
    except OSError:
        return  # a folder that cannot be written: the next start reads the file again
