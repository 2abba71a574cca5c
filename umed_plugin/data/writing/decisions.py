"""Reviewers' decisions, and how they are applied to the records: the paper's three-reviewer step.

The review page's button downloads a decisions file. Each decision names a record and the digest of the text that the reviewer
saw. If the text has changed since, the decision is not applied, but counted. With several reviewers, one rejection is enough to
leave an image out. An edit takes precedence over an acceptance. Two different edits of one text are an error, which the reviewers
must resolve. A decision that settles a disagreement (``umed recipe review --disagreements``) counts instead of the others.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umed_plugin.data.records import Record, record_geometry
from umed_plugin.data.writing.checks import Findings, box_faults, in_our_dialect
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import Box, round_box

ACCEPT, EDIT, REJECT = "accept", "edit", "reject"
_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Decision:
    """One reviewer's decision about one text.

    Attributes:
        record: id of the record.
        shown: digest of the text that was reviewed.
        kind: ``accept``, ``edit`` or ``reject``.
        text: the edited text; empty unless ``kind`` is ``edit``.
        boxes: the boxes of all lesions, xyxy in 0-1 of the square, if the reviewer moved one; else empty.
        settles: whether it was made in knowledge of the others' decisions, and counts instead of them.
        reviewer, note: as typed into the page; may be empty.
        file: the file that it was read from.
    """

    record: str
    shown: str
    kind: str
    text: str
    reviewer: str
    note: str
    file: str
    boxes: tuple[Box, ...] = ()
    settles: bool = False


@dataclass
class Reviewed:
    """Records after review.

    Attributes:
        records: records to train on, in their original order.
        set_aside: records that are still set aside: neither accepted, edited nor rejected.
        counts: number of records by ``accept``, ``edit`` and ``reject``; number of decisions about a text that has changed
            (``stale``) and about no record of this build (``unknown``).
    """

    records: list[Record] = field(default_factory=list)
    set_aside: list[Record] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((ACCEPT, EDIT, REJECT, "stale", "unknown"), 0))


def text_digest(text: str) -> str:
    """The digest that identifies a text shown to reviewers."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer_of(record: Record) -> str:
    """The text that is reviewed: the record's first answer."""
    return str(record["conversations"][1]["value"])


def read_decisions(files: Iterable[Path]) -> list[Decision]:
    """Read decisions files.

    Raises:
        UmedError: a file is missing or is not a download of the review page; all faults at once.
    """
    decisions: list[Decision] = []
    faults: list[str] = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            faults.append(f"{file}: cannot be read ({error.strerror}).")
            continue
        except (ValueError, RecursionError) as error:
            faults.append(f"{file}: is not JSON ({error}).")
            continue
        if not isinstance(content, dict) or not isinstance(content.get("decisions"), list):
            faults.append(f"{file}: has no list 'decisions'. Needed: a file that the review page's button downloaded.")
            continue
        reviewer = str(content.get("reviewer", ""))
        for index, item in enumerate(content["decisions"]):
            fault = _fault_of(item)
            if fault:
                faults.append(f"{file}: decisions[{index}] {fault}.")
            else:
                text, note = item.get("text", ""), item.get("note", "")
                decisions.append(
                    Decision(
                        record=item["id"],
                        shown=item["shown"],
                        kind=item["decision"],
                        text=text,
                        reviewer=reviewer,
                        note=note,
                        file=str(file),
                        boxes=tuple(
                            (float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in item.get("boxes") or ()
                        ),
                        settles=content.get("settles") is True,
                    )
                )
    _raise_if_any(faults)
    return decisions


def _fault_of(item: Any) -> str:
    if not isinstance(item, dict):
        return f"is of type {type(item).__name__}; needed: an object"
    for name in ("id", "shown", "decision", "text", "note"):
        if not isinstance(item.get(name, "" if name in ("text", "note") else None), str):
            return f"has no text under {name!r}"
    if item["decision"] not in (ACCEPT, EDIT, REJECT):
        return f"has the decision {item['decision']!r}; allowed: {ACCEPT}, {EDIT}, {REJECT}"
    if item["decision"] == EDIT and not item.get("text", "").strip():
        return "is an edit without text"
    return _fault_of_boxes(item.get("boxes") or [])


def _fault_of_boxes(boxes: Any) -> str:
    if not isinstance(boxes, list):
        return f"has boxes of type {type(boxes).__name__}; needed: a list"
    for box in boxes:
        numbers = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            return f"has the box {box!r}; needed: x1, y1, x2, y2 in 0-1, with x1 < x2 and y1 < y2"
    return ""


def apply_decisions(records: Sequence[Record], set_aside: Sequence[Record], decisions: Sequence[Decision]) -> Reviewed:
    """Accept, edit and leave out records.

    Args:
        records: finished records.
        set_aside: records that the writer set aside; those that are accepted or edited join the finished ones.
        decisions: of all reviewers.

    Raises:
        UmedError: an accepted or edited text does not have exactly the record's boxes, or reviewers edited one text differently.
    """
    result = Reviewed()
    faults: list[str] = []
    by_record: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_record.setdefault(decision.record, []).append(decision)
    for record in [*records, *set_aside]:
        of_record = by_record.pop(record["id"], [])
        current = [decision for decision in of_record if decision.shown == text_digest(answer_of(record))]
        result.counts["stale"] += len(of_record) - len(current)
        if not current:
            (result.set_aside if "aside" in record else result.records).append(record)
            continue
        current = [decision for decision in current if decision.settles] or current
        deciding = _deciding(record, current, faults)
        if deciding is None:
            continue
        result.counts[deciding.kind] += 1
        if deciding.kind != REJECT:
            result.records.append(_reviewed(record, deciding, current, faults))
    result.counts["unknown"] = sum(len(of_record) for of_record in by_record.values())
    _raise_if_any(faults)
    order = {record["id"]: index for index, record in enumerate(records)}
    result.records.sort(key=lambda record: order.get(record["id"], len(order)))
    return result


def _deciding(record: Record, decisions: list[Decision], faults: list[str]) -> Decision | None:
    """The decision that counts; None, with a fault, if reviewers contradict each other."""
    for kind in (REJECT, EDIT, ACCEPT):
        of_kind = [decision for decision in decisions if decision.kind == kind]
        if len({decision.text.strip() for decision in of_kind}) > 1:
            files = ", ".join(dict.fromkeys(decision.file for decision in of_kind))
            faults.append(f"record {record['id']!r} was edited in different ways in {files}. Keep one of the edits.")
            return None
        if of_kind:
            return of_kind[0]
    return None


def _reviewed(record: Record, deciding: Decision, decisions: list[Decision], faults: list[str]) -> Record:
    changed: dict[str, Any] = copy.deepcopy(record)
    changed.pop("aside", None)
    text = deciding.text.strip() if deciding.kind == EDIT else answer_of(record)
    moved = _move_boxes(changed, deciding, faults)
    findings = Findings.of(changed)
    of_boxes = box_faults(text, findings)
    if of_boxes:
        faults.append(f"{deciding.file}: the text for record {record['id']!r} cannot be used: {' '.join(of_boxes)}")
        return changed
    changed["conversations"][1]["value"] = in_our_dialect(text, findings)
    reviewers = [decision.reviewer for decision in decisions]
    changed["provenance"]["review"] = {"decision": deciding.kind, "reviewers": reviewers}
    if moved:
        changed["provenance"]["review"]["boxes_moved"] = moved
    return changed


def _move_boxes(record: Record, deciding: Decision, faults: list[str]) -> int:
    """Put the boxes that a reviewer moved into the record; returns their number. The others stay as exact as they were."""
    if not deciding.boxes:
        return 0
    findings, boxes = Findings.of(record), record["objects"]["bbox"]
    if len(deciding.boxes) != len(boxes):
        faults.append(f"{deciding.file}: record {record['id']!r} has {len(boxes)} boxes, not {len(deciding.boxes)}.")
        return 0
    moved = [
        index
        for index, box in enumerate(deciding.boxes)
        if round_box(box, findings.decimals) != findings.rounded[index]
    ]
    geometry = record_geometry(record)
    width, height = record["image_size"]
    for index in moved:
        ((x1, y1, x2, y2),) = geometry.from_square([deciding.boxes[index]])
        inside = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
        boxes[index] = [round(value, 3) for value in inside]
    return len(moved)


def _raise_if_any(faults: list[str]) -> None:
    if faults:
        more = f"\n... and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UmedError("\n".join(faults[:_FAULTS_SHOWN]) + more)
