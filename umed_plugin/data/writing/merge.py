"""Puts the writer's texts into the records: those to train on, and those set aside for a reviewer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Union

from umed_plugin.data.records import Record, is_diagnosed
from umed_plugin.data.writing.prompts import Prompts
from umed_plugin.data.writing.steps import SetAside, WrittenDiagnosis
from umed_plugin.data.writing.writer import Outcome

WRITER = "openai"


def needs_text(record: Record) -> bool:
    """Whether the model writes the record's diagnosis: it shows a lesion, and is no phrase, report or probe."""
    return is_diagnosed(record)


def with_texts(
    records: Iterable[Record], outcome: Outcome, model: str, prompts: Prompts
) -> tuple[list[Record], list[Record]]:
    """Put the texts into copies of the records.

    Images without a lesion, phrases, reports and probes keep the offline writer's text. Images without a reply are left out.

    Returns:
        the records to train on, and those set aside: they carry the rejected text, and its faults under ``aside``.
    """
    finished: list[Record] = []
    set_aside: list[Record] = []
    for record in records:
        name = record["id"]
        if not needs_text(record):
            finished.append(record)
        elif name in outcome.written:
            finished.append(_with_text(record, outcome.written[name], model, prompts))
        elif name in outcome.set_aside:
            rejected = _with_text(record, outcome.set_aside[name], model, prompts)
            set_aside.append({**rejected, "aside": list(outcome.set_aside[name].faults)})
    return finished, set_aside


def _with_text(record: Record, result: Union[WrittenDiagnosis, SetAside], model: str, prompts: Prompts) -> Record:
    changed: dict[str, Any] = copy.deepcopy(record)
    changed["conversations"][1]["value"] = result.text
    changed["provenance"].update(
        writer=WRITER,
        model=model,
        answered_by=result.model,
        prompts=prompts.versions,
        replies=list(result.keys),
    )
    return changed
