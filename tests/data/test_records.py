"""What is no record is told field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from umed_plugin.data.records import load_records, record_faults, save_records
from umed_plugin.errors import UmedError

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cyst."}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "a",
        "image": "a.png",
        "conversations": [HUMAN, GPT],
        "objects": {"ref": ["cyst"], "bbox": [[1, 2, 3.5, 4]], "bbox_type": "real"},
        "image_size": [20, 10],
        "terms": {"cyst": ["cyst"]},
        "split": "train",
        "answer_type": "grounded",
        "provenance": {"image_aspect_ratio": "pad"},
        **changes,
    }


def test_records_that_are_right() -> None:
    assert record_faults(record()) == []
    assert (
        record_faults(record(provenance={"image_aspect_ratio": "square"}, conversations=[HUMAN, GPT, HUMAN, GPT])) == []
    )


@pytest.mark.parametrize(
    "turns",
    [[], [HUMAN], [GPT, HUMAN], [HUMAN, HUMAN], ["a", "b"], [HUMAN, {"from": "gpt"}], [HUMAN, {**GPT, "value": 3}]],
)
def test_a_question_and_its_answer_are_needed(turns: list[Any]) -> None:
    (fault,) = record_faults(record(conversations=turns))
    assert "'conversations' needs a turn from 'human' and then one from 'gpt'" in fault


@pytest.mark.parametrize("size", [["x", 0], [0, 5], [-1, 5], [5], [5, 5, 5], [5.5, 5], [True, 5], [None, 5]])
def test_the_size_is_two_whole_numbers_above_0(size: list[Any]) -> None:
    (fault,) = record_faults(record(image_size=size))
    assert fault == f"'image_size' is {size!r}; needed: [width, height], whole numbers above 0"


@pytest.mark.parametrize("mode", ["weird", None, ["pad"]])
def test_the_aspect_ratio_is_one_of_llavas(mode: Any) -> None:
    (fault,) = record_faults(record(provenance={"image_aspect_ratio": mode}))
    assert fault == f"provenance.image_aspect_ratio is {mode!r}; allowed: pad, square"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objects": {"ref": ["cyst"], "bbox": [[250, 250, 500, 750]], "bbox_type": "norm1000"}},
            "'norm1000'; needed: 'real'",
        ),
        (
            {"objects": {"ref": ["cyst"], "bbox": [[0.2, 0.2, 0.5, 0.7]], "bbox_type": "norm1"}},
            "'norm1'; needed: 'real'",
        ),
        ({"answer_type": "foo"}, "answer_type is 'foo'; allowed: grounded, negative"),
        ({"answer_type": "negative"}, "answer_type is 'negative', but objects.bbox has 1"),
        ({"split": "Train"}, "split is 'Train'; allowed: train, val, test"),
        ({"split": "validation"}, "split is 'validation'; allowed: train, val, test"),
    ],
)
def test_values_of_other_tools_are_named(changes: dict[str, Any], words: str) -> None:
    (fault,) = record_faults(record(**changes))
    assert words in fault


@pytest.mark.parametrize(
    "box",
    [
        [float("nan"), 2, 3, 4],
        [0, 0, float("inf"), 4],
        [3, 4, 1, 2],
        [1, 2, 1, 4],
        [True, False, 3, 4],
        ["1", 2, 3, 4],
        [1, 2, 3],
        [15, 2, 21, 4],
        [-1, 2, 3, 4],
    ],
)
def test_what_is_no_box_of_the_image_is_no_record(box: list[Any], tmp_path: Path) -> None:
    save_records([record(), record(objects={"ref": ["cyst"], "bbox": [box], "bbox_type": "real"})], tmp_path / "a.json")
    with pytest.raises(UmedError, match=r"a\.json\[1\]: objects\.bbox\[0\] is .*; needed: "):
        load_records(tmp_path / "a.json")
