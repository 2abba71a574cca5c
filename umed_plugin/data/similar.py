"""Similar cases: the diagnoses of the K nearest training studies, said before a question. ``--umed_similar K``.

After MOTOR (arXiv 2304.14204), whose queue gives an image the knowledge of the studies most like it. There, features are learned
and the queue is random at first. Here, an image is the mean of its patch features in the checkpoint's own tower, and the nearest
are those of the largest cosine. Only diagnoses are said, no boxes: a neighbour's lesion lies elsewhere.

Left out are the study itself, studies of the same patient, and images that are nearly the same (`umed_plugin.data.leaks`): they
would give the answer away in training, and there is none of them for a new patient.

The exported checkpoint has no studies to look up. Stock LLaVA asks it without them; so a share of the records is trained without
(see `umed_plugin.training.similar_records`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin import files
from umed_plugin.data.images import file_states, open_image
from umed_plugin.data.leaks import SAME, likeness, thumbprint
from umed_plugin.data.records import Record
from umed_plugin.errors import UmedError, warn
from umed_plugin.files.kept_arrays import kept_arrays
from umed_plugin.grounding.answer_types import PROBE, asks_for_names
from umed_plugin.terminal.progress import tracked

NOTHING = "no finding"
# What the report and `umed evaluate` say of it.
WITHOUT_SIMILAR = "Stock LLaVA is asked without similar cases, and then answers as it was trained without."
_BATCH = 32
_FORMAT = "similar-1"
_ENOUGH = 64  # studies compared by their thumbnails at a time


@dataclass(frozen=True)
class Case:
    """An image whose neighbours are wanted, or that is one.

    Attributes:
        id: of its record; empty if it has none.
        path: of the image file.
        reading: arguments of `umed_plugin.data.images.load_image`, for a file that LLaVA cannot read by itself.
        patient: whom it shows, with the source; empty if unknown.
        diagnosis: names of its classes, or `NOTHING`; empty if it is not known.
    """

    id: str
    path: str
    reading: Optional[dict[str, Any]] = None
    patient: str = ""
    diagnosis: str = ""


# Images -> the mean patch feature of each, [n, D].
Encode = Callable[[Sequence[Case]], np.ndarray]


def patient_of(record: Record) -> str:
    """Whom a record shows, with the source; a file's name where nothing names the patient; empty if the record has none."""
    patient = str(record.get("patient") or "")
    return f"{record.get('source', '')}/{patient}" if patient else ""


def case_of(record: Record, folder: Path | str) -> Case:
    """The case of a record, whose image is looked for in ``folder``."""
    names = list(dict.fromkeys(record["terms"][ref][0] for ref in record["objects"]["ref"]))
    return Case(
        str(record["id"]),
        str(Path(folder) / record["image"]),
        record.get("reading"),
        patient_of(record),
        " and ".join(sorted(names)) or NOTHING,
    )


def is_study(record: Record) -> bool:
    """Whether an item's classes are all that its image shows: not those of a plain LLaVA item, a phrase or a probe."""
    known = "image" in record and "objects" in record
    return known and asks_for_names(record) and record.get("answer_type") != PROBE


@dataclass(frozen=True)
class Bank:
    """The studies that neighbours are taken from.

    Attributes:
        cases: n of them.
        features: [n, D] float32, each of L2 norm 1.
        prints: [n, 32, 32] float16, their thumbnails (`umed_plugin.data.leaks.thumbprint`).
    """

    cases: Sequence[Case]
    features: np.ndarray
    prints: np.ndarray

    def nearest(self, case: Case, feature: np.ndarray, print32: np.ndarray, k: int) -> list[int]:
        """Indices of the k nearest studies, the nearest first; fewer if there are no more that may be taken.

        Args:
            case: whose neighbours; itself, its patient and its near-duplicates are left out.
            feature: [D], its mean patch feature, not all 0.
            print32: [32, 32], its thumbnail.
            k: at least 1.
        """
        cosines = self.features @ (feature / np.linalg.norm(feature)).astype(np.float32)
        order = np.argsort(-cosines, kind="stable")
        found: list[int] = []
        for start in range(0, len(order), _ENOUGH):
            some = [int(i) for i in order[start : start + _ENOUGH] if not self._own(int(i), case)]
            if some:
                alike = likeness(print32, self.prints[some].astype(np.float32))
                found += [i for i, same in zip(some, alike) if same < SAME]
            if len(found) >= k:
                break
        return found[:k]

    def _own(self, index: int, case: Case) -> bool:
        other = self.cases[index]
        same_patient = bool(case.patient) and other.patient == case.patient
        same_image = (other.path, other.reading) == (case.path, case.reading)
        return same_patient or same_image or (bool(case.id) and other.id == case.id)

    def said(self, case: Case, feature: np.ndarray, print32: np.ndarray, k: int) -> str:
        """What is said before a question about the case; empty if it has no neighbour. Arguments as for `nearest`."""
        return sentence([self.cases[i].diagnosis for i in self.nearest(case, feature, print32, k)])


def sentence(diagnoses: Sequence[str]) -> str:
    r"""``Similar studies, nearest first: nodule; no finding.`` and a line break; empty for none.

    Example:
        >>> from umed_plugin.data.similar import sentence
        >>> sentence(["nodule", "no finding"])
        'Similar studies, nearest first: nodule; no finding.\n'
    """
    return f"Similar studies, nearest first: {'; '.join(diagnoses)}.\n" if diagnoses else ""


def with_similar(record: Record, said: str) -> Record:
    """The record with ``said`` before its question, also where augmentation writes the question anew."""
    if not said:
        return record
    first, *others = record["conversations"]
    tag, line, question = first["value"].partition("<image>\n")
    asked = {**first, "value": f"{tag}{line}{said}{question}" if line else said + first["value"]}
    return {**record, "similar": said, "conversations": [asked, *others]}


def make_bank(
    records: Sequence[Record],
    folder: Path | str,
    encode: Encode,
    *,
    kept: Optional[Path] = None,
    tower: str = "",
    title: str = "similar cases",
) -> Bank:
    """The bank of the training studies among the records. Probes, phrases and plain LLaVA items are no studies.

    Args:
        folder: of their images.
        encode: the checkpoint's tower.
        kept: file that keeps features and thumbnails for the next time; None: nowhere.
        tower: tells the tower from others.
        title: of the progress bar.

    Raises:
        UmedError: there is no training study, or an image cannot be read.
    """
    cases = [
        case_of(record, folder) for record in records if record.get("split", "train") == "train" and is_study(record)
    ]
    if not cases:
        raise UmedError("no study of the split train that similar cases could be taken from.")
    key = _key(cases, tower)
    arrays = None if kept is None else _kept(kept, key)
    if arrays is None:
        arrays = encoded(cases, encode, title)
        if kept is not None:
            _keep(kept, key, arrays)
    features, prints = arrays
    return Bank(cases, features / np.linalg.norm(features, axis=1, keepdims=True), prints.astype(np.float16))


def encoded(cases: Sequence[Case], encode: Encode, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean patch features [n, D] and thumbnails [n, 32, 32] of images, float32."""
    batches = [cases[start : start + _BATCH] for start in range(0, len(cases), _BATCH)]
    features, prints = [], []
    for batch in tracked(batches, title, "batch", len(batches)):
        features.append(np.asarray(encode(batch), np.float32))
        prints += [thumbprint(np.asarray(open_image(case.path, case.reading))) for case in batch]
    found = np.concatenate(features)
    flat = ~np.isfinite(found).all(axis=1) | (np.linalg.norm(found, axis=1) == 0)
    if flat.any():
        raise UmedError(f"{cases[int(np.flatnonzero(flat)[0])].path}: the tower's features are not finite, or all 0.")
    return found, np.stack(prints)


def said_of(cases: Sequence[Case], bank: Bank, encode: Encode, k: int, title: str = "their neighbours") -> list[str]:
    """What is said before the question about each case. Cases of one image, as a file and its reading, are encoded once."""
    keys = [(case.path, json.dumps(case.reading, sort_keys=True)) for case in cases]
    first = dict(zip(reversed(keys), reversed(cases)))
    places = {key: place for place, key in enumerate(first)}
    features, prints = encoded(list(first.values()), encode, title)
    said = [bank.said(case, features[places[key]], prints[places[key]], k) for case, key in zip(cases, keys)]
    without = sum(not text for text in said)
    if without:
        warn(
            f"{without} of {len(said)} questions have no similar case: all studies are of their patients, or nearly the same."
        )
    return said


def _key(cases: Sequence[Case], tower: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {tower}".encode())
    for case in cases:
        digest.update(repr((case, file_states(Path(case.path)))).encode())
    return digest.hexdigest()


def _kept(file: Path, key: str) -> Optional[tuple[np.ndarray, np.ndarray]]:
    try:
        with kept_arrays(file) as arrays:
            if str(arrays["key"]) == key:
                return arrays["features"], arrays["prints"]
    except Exception:  # noqa: BLE001  a damaged archive raises whatever zip, zlib and NumPy do; it is made anew
        return None
    return None


def _keep(file: Path, key: str, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file, durable=False) as partial, partial.open("wb") as stream:
            np.savez(stream, key=np.array(key), features=arrays[0], prints=arrays[1])
    except OSError:
        return  # a folder that cannot be written: the next start encodes the images again
