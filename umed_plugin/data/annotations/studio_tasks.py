"""The submitted annotations of Label Studio's exports: JSON, and JSON-MIN, which loses what is a choice and what a field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from umed_plugin.data.annotations.studio_images import Group, ImageTags, images_of, region_kind, unread_type
from umed_plugin.faults import Faults

# Fields of a JSON-MIN entry that are no control tags of the labelling interface.
_OF_ENTRY = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")


@dataclass
class StudioTask:
    """One annotation of a task: by whom, and the values of each of its regions, with what stands beside them.

    ``unclear`` names a field of JSON-MIN that may be a choice: no entry with a region has it.
    """

    where: str
    data: dict[str, Any]
    annotator: str
    results: list[Group]
    unclear: str = ""


class StudioTasks:
    """The annotations of one export.

    Args:
        entries: of the file, one for each task, or for each annotation of one.
        path: of the file, for messages.
        named: fields of a task's data that name image and patient; None where there is none.
        no_finding: choices that say that an image has no lesion.
        tags: tells the images of a task apart.
    """

    def __init__(
        self,
        entries: Sequence[Any],
        path: Path,
        named: Collection[Optional[str]],
        no_finding: Sequence[str],
        tags: ImageTags,
        faults: Faults,
    ) -> None:
        self._entries, self._path, self._named, self._no_finding = entries, path, named, no_finding
        self._tags, self._faults = tags, faults
        self._choice_fields = _choice_fields(entries, no_finding)
        self._data_fields = _fields_beside_regions(entries)
        self._by_data: Counter[str] = Counter()  # such fields of entries without a region

    def annotations(self) -> Iterator[StudioTask]:
        """Those that were submitted, in the order of the file; what is passed over is counted."""
        for number, entry in enumerate(self._entries):
            yield from self._submitted(entry, f"{self._path} task {_id_of(entry, number)}")

    def tell(self) -> None:
        """Say what may be read otherwise than it was meant."""
        if self._by_data:
            self._faults.remark(
                self._path,
                f"{max(self._by_data.values())} entries without a region are normal images, since their fields "
                f"{', '.join(self._by_data)} also stand beside regions. If one says what the image shows, give no_finding",
            )

    def _submitted(self, entry: Any, where: str) -> Iterator[StudioTask]:
        """Those of one entry, in either form."""
        if not isinstance(entry, dict):
            self._faults.add(
                where, f"is a {type(entry).__name__}; needed: an object, as in the exports JSON and JSON-MIN"
            )
            return
        listed = entry.get("annotations", entry.get("completions"))
        if listed is None and "data" not in entry:
            yield from self._of_min(entry, where)
            return
        data = entry.get("data")
        listed = [] if listed is None else listed
        if (
            not isinstance(data, dict)
            or not isinstance(listed, list)
            or not all(isinstance(one, dict) for one in listed)
        ):
            self._faults.add(
                where, "needs an object 'data' and a list of objects 'annotations'. Is it Label Studio's JSON?"
            )
            return
        for key, why in (("predictions", "of a model, no annotations"), ("drafts", "not submitted")):
            if isinstance(entry.get(key), list) and entry[key]:
                self._faults.left_out[key, why] += len(entry[key])
        submitted = [one for one in listed if not one.get("was_cancelled")]
        if len(submitted) < len(listed):
            self._faults.left_out["annotations", "was_cancelled"] += len(listed) - len(submitted)
        if not submitted:
            self._faults.left_out["tasks", "without a submitted annotation"] += 1
        for number, one in enumerate(submitted):
            results = one.get("result")
            here = f"{where} annotation {one.get('id', number)}"
            if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
                self._faults.add(here, "has no list of objects 'result'")
            else:
                yield StudioTask(here, data, _annotator(one.get("completed_by")), _grouped(results))

    def _of_min(self, entry: dict[str, Any], where: str) -> Iterator[StudioTask]:
        if "annotation_id" not in entry:
            self._faults.left_out["tasks", "without a submitted annotation"] += 1
            return
        results: list[Group] = []
        drawn: list[str] = []
        unclear, of_task = "", []
        images = images_of(entry)
        for key, value in entry.items():
            if key in _OF_ENTRY or key in self._named:
                continue
            regions_here = _regions_of_min(value)
            if regions_here:
                results += [[region] for region in regions_here]
                drawn.append(key)
            elif isinstance(value, dict) and "choices" in value:
                results.append([{"value": value}])
            elif isinstance(value, str) and value and key in self._choice_fields:
                results.append([{"value": {"choices": [value]}}])
            elif isinstance(value, (str, list)) and value and key not in images:
                if key in self._data_fields:
                    of_task.append(key)
                else:
                    unclear = unclear or key
        if not (drawn or unclear or self._no_finding):
            self._by_data.update(of_task)
        if self._tags.one_of_min(drawn, entry, where):
            yield StudioTask(where, entry, _annotator(entry.get("annotator")), results, unclear)


def _id_of(entry: Any, number: int) -> Any:
    found = entry.get("id") if isinstance(entry, dict) else None
    return found if isinstance(found, (int, str)) else f"[{number}]"


def _choice_fields(entries: Sequence[Any], no_finding: Sequence[str]) -> set[str]:
    """Fields of JSON-MIN that are choices: a single choice is a plain text there, as any field of the task's data may be."""
    return {
        key
        for entry in _entries_of_min(entries)
        for key, value in entry.items()
        if key not in _OF_ENTRY and isinstance(value, str) and value in no_finding
    }


def _fields_beside_regions(entries: Sequence[Any]) -> set[str]:
    """Fields of JSON-MIN that an entry with a region has too: they describe the task, and say no more where no region is."""
    drawn = [entry for entry in _entries_of_min(entries) if any(_regions_of_min(value) for value in entry.values())]
    return {key for entry in drawn for key, value in entry.items() if value}


def _entries_of_min(entries: Sequence[Any]) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict) and "annotation_id" in entry]


def _regions_of_min(value: Any) -> list[dict[str, Any]]:
    """What one field of an entry holds, in the form of the export JSON, if a region is among it; else empty."""
    found = [{"value": one, **one} for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    return found if any(region_kind(one) or unread_type(one) for one in found) else []


def _grouped(results: list[dict[str, Any]]) -> list[Group]:
    """Results of one region have the same id: its shape, its label, and texts about it."""
    groups: dict[Any, Group] = {}
    for number, result in enumerate(results):
        key = result.get("id")
        groups.setdefault(key if isinstance(key, (str, int)) else ("", number), []).append(result)
    return list(groups.values())


def _annotator(written: Any) -> str:
    """An annotator's name: the number of the account, or its e-mail."""
    if isinstance(written, dict):
        written = written.get("email") or written.get("id")
    return "" if written is None else str(written)
