"""What a run with ``--umed_augment`` says before training is what its epochs do."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.probing import studies

from umed_plugin.data.augmentation import survey as module
from umed_plugin.data.augmentation.study import augmented_study
from umed_plugin.data.augmentation.survey import survey
from umed_plugin.errors import UmedError

RULE = {"rotation": 10, "zoom": [0.8, 1.3], "share": 1}
ONLY_FLIPS = {"flips": ["left_right"], "rotation": 0, "zoom": [1, 1], "shift": 0, "share": 1}
ONLY_ZOOM = {"rotation": 0, "shift": 0, "share": 1}
BOX = [[20, 30, 50, 60]]
# Lesions as small as a pixel, in each corner.
CORNERS = {"ref": ["cyst"] * 4, "bbox": [[x, y, x + 1, y + 1] for x in (0, 99) for y in (0, 99)]}


def made(text: str = "A cyst at [0.20, 0.30, 0.50, 0.60].", rule: dict | None = None, **more: Any) -> dict[str, Any]:
    record = {
        **studies(1, split="train", negatives=0)[0],
        "image_size": [100, 100],
        "objects": {"ref": ["cyst"], "bbox": BOX},
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}],
        "augment": rule or RULE,
        **more,
    }
    return {name: value for name, value in record.items() if value is not None}


PLAIN = {"image": "a.png", "conversations": made()["conversations"]}
REPORT = {"answer_type": "report", "objects": {"ref": ["cyst"], "bbox": []}}
NOT_MOVED = {
    "no image": made(image=None),
    "`augment: {share: 0}`": made(rule={"share": 0}),
    "plain LLaVA items without true boxes": PLAIN,
    "no valid records": made(answer_type=None),
    "reports": made("A cyst.", **REPORT),
    "an `augment` that moves nothing": made(rule={**ONLY_FLIPS, "flips": []}),
    "boxes or coordinates in another form": made("A cyst at [0.20,0.30,0.50,0.60]."),
    "a side in text or class names that cannot be mirrored": made("A cyst in the RML.", ONLY_FLIPS),
    "no movement tried keeps each lesion": made("A cyst.", {**ONLY_ZOOM, "zoom": [1, 4]}, objects=CORNERS),
}


def shown(record: dict[str, Any], epochs: int = 40) -> tuple[bool, bool]:
    """Whether an epoch moves the record, and whether one mirrors it."""
    moves = [augmented_study(record, 0, epoch, name="0").move for epoch in range(epochs)]
    return any(move.resamples or move.mirrors for move in moves), any(move.mirrors for move in moves)


@pytest.mark.parametrize("reason", list(NOT_MOVED))
def test_what_is_not_moved_has_its_reason(reason: str) -> None:
    record = NOT_MOVED[reason]
    assert shown(record) == (False, False)
    found = survey([record], 0)
    assert (found.count, found.tried, found.moved, found.mirrored) == (1, 1, 0, 0)
    assert found.grey == (reason not in ("no image", "`augment: {share: 0}`"))
    (told,) = found.reasons
    assert told.startswith(reason)
    said = found.in_words()
    assert said.startswith("augmentation: 0 of 1 records are moved") and "moves nothing. Mend this" in said
    assert f"Not moved: {told} (1, such as {record.get('id', 'number 0')}" in said


@pytest.mark.parametrize(
    ("record", "mirrored"),
    [
        (made(), False),
        (made(rule={**RULE, "flips": ["left_right"]}), True),
        (made(rule=ONLY_FLIPS), True),
        (made("A cyst in the RML.", {**RULE, "flips": ["left_right"]}), False),
        (made(rule={**RULE, "share": 0.05}), False),
        (made("No.", objects={"ref": [], "bbox": []}, answer_type="negative"), False),
        # Only its question has a mirrored form.
        (made(answer_type="phrase", phrase="RML", rule={**RULE, "flips": ["left_right"]}), False),
    ],
)
def test_what_is_moved_is_counted(record: dict[str, Any], mirrored: bool) -> None:
    found = survey([record], 0)
    assert (found.moved, found.mirrored, found.grey, found.reasons) == (1, int(mirrored), 0, {})
    assert shown(record, 200) == (True, mirrored)
    assert ("1 of them are mirrored too" in found.in_words()) == mirrored and "Mend" not in found.in_words()


def test_reasons_are_grouped_with_an_example() -> None:
    kinds = [made(), *[made(answer_type=None)] * 3, PLAIN, made(rule={"share": 0})]
    records = [{**record, "id": f"r{number}"} for number, record in enumerate(kinds)]
    said = survey(records, 0).in_words()
    assert "augmentation: 1 of 6 records are moved" in said
    assert "Of the others, 4 change in grey levels alone, and 1 not at all." in said
    assert (
        "Not moved: no valid records (3, such as r1: has no field 'answer_type'); plain LLaVA items without true boxes "
        "(1, such as r4); `augment: {share: 0}` (1, such as r5)." in said
    )


def test_of_many_records_some_are_tried_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 20)
    records = [{**made(), "id": f"r{number}"} for number in range(50)]
    random.seed(3)
    state = random.getstate()
    found = survey(records, 0)
    assert random.getstate() == state and survey(records, 0) == found
    assert found.in_words().startswith("augmentation: 20 of 20 records, drawn from 50, are moved")


def test_an_augment_that_is_no_rule_is_named_before_training() -> None:
    with pytest.raises(UmedError, match=r"augment\.zoom"):
        survey([made(rule={"zoom": [2, 1]})], 0)
