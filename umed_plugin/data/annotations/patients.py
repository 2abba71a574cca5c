"""Whose image it is: by a column, the DICOM header, a pattern on the name, or the name itself; and who is in which split.

A rule that silently does not apply makes every file a patient of its own, and then one patient is in train and in test. So every
rule says how many images it did not apply to, and patients by the headers of DICOM files are compared with the splits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import without_ending
from umed_plugin.data.endings import DICOM_ENDINGS
from umed_plugin.data.recipes.options import SplitRule
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.data.splits import SPLITS
from umed_plugin.faults import Faults

_PATIENT_ID = 0x00100020
_DICOM = (*DICOM_ENDINGS, "")
_WHOLE = re.compile(r"^(\d+)\.0+$")  # pandas writes the patient 7 as 7.0 where another row has none
_NAMED = 5
# A patient with more than half of at least so many images is mostly a name that was cut or matched too short.
_ENOUGH_IMAGES = 10


def set_patients(items: Sequence[Annotated], rule: SplitRule, root: Path, faults: Faults) -> None:
    """Set the patient of every image, and the picture of which it is an augmented copy; say which rules did not apply."""
    by_header = rule.patient == "header"
    unnamed: dict[str, list[Annotated]] = {"header": [], "column": [], "pattern": []}
    for item in items:
        path = os.path.relpath(item.image, root).replace(os.sep, "/")
        item.copy_of = _first_group(rule.copy_pattern, path)
        item.patient = _WHOLE.sub(r"\1", item.patient.strip())
        in_header = hashed_patient(item.image) if by_header else None
        if by_header and in_header is None:
            unnamed["header"].append(item)
        if not item.patient:
            unnamed["column"].append(item)
        matched = _first_group(rule.patient_pattern, path)
        if not matched and not item.patient and not in_header:
            unnamed["pattern"].append(item)
        item.patient = in_header or item.patient or matched or item.copy_of
        item.patient_is_file = not item.patient
        item.patient = item.patient or without_ending(item.image.name)
    _tell_unnamed(items, unnamed, rule, faults)
    _tell_largest(items, faults)
    _tell_alike({item.patient for item in items}, faults)


def _first_group(pattern: Optional[str], path: str) -> str:
    """The first group of a pattern on the name, or on the whole path if the pattern has a slash; empty if it does not match."""
    if pattern is None:
        return ""
    named = re.search(pattern, path if "/" in pattern else path.rsplit("/", 1)[-1])
    return (named.group(1) or "") if named else ""


def _tell_unnamed(
    items: Sequence[Annotated], unnamed: Mapping[str, list[Annotated]], rule: SplitRule, faults: Faults
) -> None:
    if unnamed["header"]:
        first = unnamed["header"][0].image
        faults.remark(
            "split.patient",
            f"{len(unnamed['header'])} of {len(items)} images have no PatientID in a header; not {first.name}",
        )
    needed = len(unnamed["column"])
    if 0 < needed < len(items) and rule.patient is None:
        faults.remark(
            unnamed["column"][0].where,
            f"the annotations name no patient for {needed} of {len(items)} images, and for the others they do",
        )
    if rule.patient_pattern is not None and rule.patient is None and items:
        unmatched = unnamed["pattern"]
        message = f"matches {needed - len(unmatched)} of {needed} names that need it"
        if not needed:
            faults.no_effect("split.patient_pattern", "has no effect, since the annotations name every patient")
        elif len(unmatched) == needed:
            faults.add("split.patient_pattern", f"{message}; not {unmatched[0].image.name!r}, for example")
        elif unmatched:
            faults.remark(
                "split.patient_pattern",
                f"{message}; not {unmatched[0].image.name!r}, for example. Each of the others is a patient of its own",
            )
    if rule.copy_pattern is not None and items and not any(item.copy_of for item in items):
        faults.no_effect("split.copy_pattern", f"matches 0 of {len(items)} names, so no image counts as a copy")


def _tell_largest(items: Sequence[Annotated], faults: Faults) -> None:
    counts = Counter(item.patient for item in items)
    if len(items) < _ENOUGH_IMAGES:
        return
    ((patient, count),) = counts.most_common(1)
    if 2 * count > len(items):
        faults.remark("split", f"patient {patient!r} has {count} of {len(items)} images, which all go to one split")


def _tell_alike(patients: Collection[str], faults: Faults) -> None:
    """Remark on names that differ by leading zeros or case alone: one person under two names may be in train and in test."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(patients):
        spellings[re.sub(r"(?<!\d)0+(?=\d)", "", patient.casefold())].append(patient)
    alike = [names for names in spellings.values() if len(names) > 1]
    if alike:
        faults.remark(
            "split",
            f"patients have names that differ only by leading zeros or case, such as {alike[0][0]!r} and {alike[0][1]!r} "
            f"({len(alike)} in all). They count as different patients. If they are the same, write the names in one way",
        )


def tell_empty_splits(items: Sequence[Annotated], fractions: Mapping[Any, float], faults: Faults) -> None:
    """Remark on splits of patients that were asked for and stay empty."""
    patients = {(item.recipe.name, item.patient) for item in items}
    for split in SPLITS:
        share = fractions.get(split, 0)
        if items and share > 0 and not any(item.split == split for item in items):
            faults.remark("split", f"{split!r} is empty: {share:.0%} of {len(patients)} patients was asked for")


def tell_empty_files(items: Sequence[Annotated], recipe: Recipe, faults: Faults) -> None:
    """Remark on splits of ``by: file`` that stay empty."""
    named = {*recipe.annotations.files, *getattr(recipe.annotations, "split_lists", {})} - {""}
    for split in sorted(named - {item.split for item in items}):
        if items:
            faults.remark("split", f"{split!r} is empty, and annotations.files or split_lists name it")


def tell_shared_patients(items: Sequence[Annotated], faults: Faults) -> None:
    """Remark on patients that files or a column put into several splits: the test then has patients seen in training."""
    splits: dict[str, set[str]] = defaultdict(set)
    for item in items:
        splits[item.patient].add(item.split)
    shared = sorted(patient for patient, found in splits.items() if len(found) > 1)
    if shared:
        faults.remark(
            "split",
            f"{len(shared)} patient{'s are' if len(shared) > 1 else ' is'} in more than one split "
            f"({', '.join(shared[:_NAMED])}): results on test will look better than they are. To split by patient: "
            "split: {by: patient}",
        )


def tell_headers(items: Sequence[Annotated], rule: SplitRule, faults: Faults) -> None:
    """Remark on patients that are in several splits by the headers of their DICOM files."""
    if rule.patient == "header":
        return
    by_id: dict[str, list[Annotated]] = defaultdict(list)
    for item in items:
        patient = hashed_patient(item.image)
        if patient is not None:
            by_id[patient].append(item)
    leaks = [group for group in by_id.values() if len({item.split for item in group}) > 1]
    if leaks:
        one = leaks[0][0]
        other = next(item for item in leaks[0] if item.split != one.split)
        only = " All files have the same PatientID, so it may stand for many patients." if len(by_id) == 1 else ""
        faults.remark(
            "split",
            f"{len(leaks)} of {len(by_id)} patients are in more than one split by the PatientID of their DICOM headers, such as "
            f"that of {one.image.name} ({one.split}) and {other.image.name} ({other.split}).  "
            f"To split by it: split: {{patient: header}}.{only}",
        )


def hashed_patient(image: Path) -> Optional[str]:
    """A hash of the PatientID in a DICOM header, of a series in its first file; None if there is none.

    The hash keeps the identifier itself out of records. It is no protection against who can try all identifiers.
    """
    if image.is_dir():
        found = (hashed_patient(file) for file in sorted(image.iterdir()) if file.is_file())
        return next((patient for patient in found if patient is not None), None)
    if image.suffix.lower() not in _DICOM and not image.suffix[1:].isdigit():
        return None
    identifier = _patient_id(image)
    return hashlib.sha256(f"umed:{identifier}".encode()).hexdigest()[:16] if identifier else None


def _patient_id(image: Path) -> str:
    try:
        from pydicom.filereader import read_partial

        with image.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                return ""
            file.seek(0)
            header = read_partial(file, stop_when=lambda tag, vr, length: int(tag) > _PATIENT_ID)
            return str(header.get("PatientID", "") or "").strip()
    # Damaged files are reported when their pixels are read; here they only name no patient.
    except Exception:  # noqa: BLE001
        return ""
