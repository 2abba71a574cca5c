"""The writer's texts into the records: what is trained on, and what waits for a person."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Union

from umed_plugin.data.records import Record
from umed_plugin.data.writing.prompts import Prompts
from umed_plugin.data.writing.steps import Aside, Written
from umed_plugin.data.writing.writer import Outcome

WRITER = "openai"


def with_texts(
    records: Iterable[Record], outcome: Outcome, model: str, prompts: Prompts
) -> tuple[list[Record], list[Record]]:
    """Put the texts into copies of the records.

    Images without a lesion keep the offline writer's words; images without an answer are left out.

    Returns:
        the records to train on, and those put aside: with the refused text, and ``aside``, what is wrong with it.
    """
    finished: list[Record] = []
    aside: list[Record] = []
    for record in records:
        name = record["id"]
        if not record["objects"]["ref"]:
            finished.append(record)
        elif name in outcome.written:
            finished.append(_with_text(record, outcome.written[name], model, prompts))
        elif name in outcome.aside:
            refused = _with_text(record, outcome.aside[name], model, prompts)
            aside.append({**refused, "aside": list(outcome.aside[name].faults)})
    return finished, aside


def _with_text(record: Record, answer: Union[Written, Aside], model: str, prompts: Prompts) -> Record:
    changed: dict[str, Any] = copy.deepcopy(record)
    changed["conversations"][1]["value"] = answer.text
    changed["provenance"].update(
        writer=WRITER,
        model=model,
        answered_by=answer.model,
        prompts=prompts.versions,
        replies=list(answer.keys),
    )
    return changed
