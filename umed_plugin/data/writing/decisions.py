"""What reviewers decided, and how it gets into the records: the paper's three-reviewer step.

A decisions file is what the review page's button downloads. Each decision names the record and the digest of the text that the
reviewer saw: one about a text that has changed since is not applied, and counted. Of several reviewers, one rejection is enough
to leave an image out; edits go before acceptance, and two different edits of one text are a fault for the reviewers to settle.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umed_plugin.data.records import Record
from umed_plugin.data.writing.checks import Findings, box_faults, in_our_dialect
from umed_plugin.errors import UmedError

ACCEPT, EDIT, REJECT = "accept", "edit", "reject"
_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Decision:
    """What one reviewer said about one text.

    Attributes:
        record: its id.
        shown: digest of the text that was reviewed.
        kind: ``accept``, ``edit`` or ``reject``.
        text: the edited text, else empty.
        reviewer, note: as typed into the page; may be empty.
        file: where it was read.
    """

    record: str
    shown: str
    kind: str
    text: str
    reviewer: str
    note: str
    file: str


@dataclass
class Reviewed:
    """Records after review.

    Attributes:
        records: to train on, in their order.
        aside: still put aside: neither accepted nor rejected.
        counts: records that were accepted, edited, rejected; decisions on a text that has changed; decisions on no record.
    """

    records: list[Record] = field(default_factory=list)
    aside: list[Record] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((ACCEPT, EDIT, REJECT, "stale", "unknown"), 0))


def text_digest(text: str) -> str:
    """Of a text that is shown to reviewers."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer_of(record: Record) -> str:
    """The text that is reviewed: the first answer."""
    return str(record["conversations"][1]["value"])


def read_decisions(files: Iterable[Path]) -> list[Decision]:
    """Read decisions files.

    Raises:
        UmedError: a file is missing or is not what the review page downloads; all faults at once.
    """
    found: list[Decision] = []
    faults: list[str] = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            faults.append(f"{file}: cannot be read ({error.strerror}).")
            continue
        except ValueError as error:
            faults.append(f"{file}: is not JSON ({error}).")
            continue
        if not isinstance(content, dict) or not isinstance(content.get("decisions"), list):
            faults.append(f"{file}: has no list 'decisions'. Needed: what the review page's button downloads.")
            continue
        reviewer = str(content.get("reviewer", ""))
        for index, item in enumerate(content["decisions"]):
            fault = _fault_of(item)
            if fault:
                faults.append(f"{file}: decisions[{index}] {fault}.")
            else:
                text, note = item.get("text", ""), item.get("note", "")
                found.append(Decision(item["id"], item["shown"], item["decision"], text, reviewer, note, str(file)))
    _raise_if_any(faults)
    return found


def _fault_of(item: Any) -> str:
    if not isinstance(item, dict):
        return f"is {type(item).__name__}; needed: an object"
    for name in ("id", "shown", "decision", "text", "note"):
        if not isinstance(item.get(name, "" if name in ("text", "note") else None), str):
            return f"has no text under {name!r}"
    if item["decision"] not in (ACCEPT, EDIT, REJECT):
        return f"has the decision {item['decision']!r}; allowed: {ACCEPT}, {EDIT}, {REJECT}"
    if item["decision"] == EDIT and not item.get("text", "").strip():
        return "is an edit without a text"
    return ""


def apply_decisions(records: Sequence[Record], aside: Sequence[Record], decisions: Sequence[Decision]) -> Reviewed:
    """Accept, edit and leave out.

    Args:
        records: finished.
        aside: put aside by the writer; one that is accepted or edited joins the records.

    Raises:
        UmedError: an accepted or edited text does not hold exactly the record's boxes, or reviewers edited one text differently.
    """
    result = Reviewed()
    faults: list[str] = []
    by_record: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_record.setdefault(decision.record, []).append(decision)
    for record in [*records, *aside]:
        made = by_record.pop(record["id"], [])
        fitting = [each for each in made if each.shown == text_digest(answer_of(record))]
        result.counts["stale"] += len(made) - len(fitting)
        if not fitting:
            (result.aside if "aside" in record else result.records).append(record)
            continue
        verdict = _settled(record, fitting, faults)
        if verdict is None:
            continue
        result.counts[verdict.kind] += 1
        if verdict.kind != REJECT:
            result.records.append(_reviewed(record, verdict, fitting, faults))
    result.counts["unknown"] = sum(len(each) for each in by_record.values())
    _raise_if_any(faults)
    order = {record["id"]: place for place, record in enumerate(records)}
    result.records.sort(key=lambda record: order.get(record["id"], len(order)))
    return result


def _settled(record: Record, made: list[Decision], faults: list[str]) -> Decision | None:
    """The decision that counts; None, and a fault, when reviewers contradict one another."""
    for kind in (REJECT, EDIT, ACCEPT):
        of_kind = [each for each in made if each.kind == kind]
        if len({each.text.strip() for each in of_kind}) > 1:
            files = ", ".join(dict.fromkeys(each.file for each in of_kind))
            faults.append(f"record {record['id']!r} was edited in different ways in {files}. Keep one of the edits.")
            return None
        if of_kind:
            return of_kind[0]
    return None


def _reviewed(record: Record, verdict: Decision, made: list[Decision], faults: list[str]) -> Record:
    changed: dict[str, Any] = copy.deepcopy(record)
    changed.pop("aside", None)
    text = verdict.text.strip() if verdict.kind == EDIT else answer_of(record)
    findings = Findings.of(record)
    wrong = box_faults(text, findings)
    if wrong:
        faults.append(f"{verdict.file}: the text for record {record['id']!r} cannot be used: {' '.join(wrong)}")
        return changed
    changed["conversations"][1]["value"] = in_our_dialect(text, findings)
    reviewers = [each.reviewer for each in made]
    changed["provenance"]["review"] = {"decision": verdict.kind, "reviewers": reviewers}
    return changed


def _raise_if_any(faults: list[str]) -> None:
    if faults:
        more = f"\n... and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UmedError("\n".join(faults[:_FAULTS_SHOWN]) + more)
