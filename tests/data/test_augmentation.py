"""Augmented studies: pixels, boxes and text move together, and only in ways that stay true."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from umed_plugin.data.augment_rule import AugmentRule, augment_rule_of
from umed_plugin.data.augmentation.study import LEAST_KEPT, UNMOVED, Study, augmented_study
from umed_plugin.data.augmentation.texts import is_templated
from umed_plugin.data.records import record_faults, record_geometry, true_boxes
from umed_plugin.data.template_writer import region_of, write_conversation
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import format_box, iou_matrix, parse_boxes
from umed_plugin.grounding.square_move import kept_fraction, move_of

MIRROR = {"flips": ["left_right"], "rotation": 0, "zoom": [1, 1], "shift": 0, "share": 1}
ALL = {"flips": ["left_right", "up_down"], "rotation": 15, "zoom": [0.8, 1.6], "share": 1}


def made(boxes: list[list[float]], rule: dict | None = None, text: str | None = None, **more: Any) -> dict[str, Any]:
    """A record of a 200 x 120 image, by the template writer unless a text is given."""
    refs = ["nodule", "cyst", "nodule"][: len(boxes)]
    record = {
        "id": "drawn/a.png",
        "image": "a.png",
        "image_size": [200, 120],
        "objects": {"ref": refs, "bbox": boxes, "bbox_type": "real"},
        "terms": {"nodule": ["nodule"], "cyst": ["cyst"]},
        "conversations": [],
        "split": "train",
        "answer_type": "grounded" if boxes else "negative",
        "provenance": {"image_aspect_ratio": "pad", "seed": 3, "box_decimals": 2},
        **({"augment": rule} if rule else {}),
        **more,
    }
    if text is None:
        rng = random.Random(f"3:{record['id']}")
        record["conversations"] = write_conversation(record, record_geometry(record), rng, 2)
    else:
        record["conversations"] = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]
    return record


def epochs(record: dict, count: int = 60) -> list[Study]:
    return [augmented_study(record, 0, epoch) for epoch in range(count)]


def answer(study: Study) -> str:
    return study.record["conversations"][1]["value"]


def test_an_answer_of_the_template_writer_is_written_again_with_the_same_words() -> None:
    record = made([[20, 10, 50, 40], [140, 70, 190, 110]], ALL)
    assert is_templated(record)
    seen = set()
    for study in epochs(record):
        boxes01 = record_geometry(record).to_square(true_boxes(study.record))
        assert record_faults(study.record) == [] and is_templated(study.record)
        # Boxes in the text are the moved true boxes, in the order of the answer: from top to bottom.
        written = [value for box in parse_boxes(answer(study)) for value in box]
        assert written == pytest.approx([value for box in boxes01 for value in box], abs=0.00501)
        assert [box[1] for box in boxes01] == sorted(box[1] for box in boxes01)
        places = [answer(study).find(name) for name in study.record["objects"]["ref"]]
        assert places == sorted(places) and -1 not in places
        assert all(region_of(box) in answer(study) for box in boxes01)
        seen |= {region_of(box) for box in boxes01}
        # The first class, the nodule, is still the box of the nodule.
        moved = dict(zip(study.record["objects"]["ref"], boxes01))
        before = record_geometry(record).to_square(true_boxes(record))
        after = dict(zip(record["objects"]["ref"], study.move.boxes(before)))
        for name, box in after.items():
            assert iou_matrix([moved[name]], [box])[0, 0] > LEAST_KEPT - 0.01
            assert kept_fraction(box) >= LEAST_KEPT
    assert {"upper left", "upper right", "lower left", "lower right"} <= seen
    assert record == made([[20, 10, 50, 40], [140, 70, 190, 110]], ALL), "the record itself is not changed"


def test_words_of_side_are_mirrored_with_the_boxes_in_any_other_text() -> None:
    text = "Left upper nodule at [0.10, 0.25, 0.25, 0.40], as in the left lung; nothing on the right."
    record = made([[20, 10, 50, 40]], MIRROR, text)
    found = {(study.move.left_right, answer(study)) for study in epochs(record, 20)}
    mirrored = "Right upper nodule at [0.75, 0.25, 0.90, 0.40], as in the right lung; nothing on the left."
    assert found == {(False, text), (True, mirrored)}
    boxes = {study.move.left_right: study.record["objects"]["bbox"] for study in epochs(record, 20)}
    assert boxes == {False: [[20, 10, 50, 40]], True: [[150, 10, 180, 40]]}


def test_boxes_in_questions_and_of_no_lesion_move_too() -> None:
    text = "Unlike [0.400, 0.400, 0.600, 0.600], the area [0.101, 0.252, 0.249, 0.401] shows a nodule."
    record = made([[20, 10, 50, 40]], MIRROR, text)
    record["conversations"][0]["value"] = "<image>\nIs [0.100, 0.250, 0.250, 0.400] a nodule?"
    study = next(study for study in epochs(record) if study.move.left_right)
    assert parse_boxes(answer(study)) == [(0.4, 0.4, 0.6, 0.6), (0.751, 0.252, 0.899, 0.401)]
    assert study.record["conversations"][0]["value"] == "<image>\nIs [0.750, 0.250, 0.900, 0.400] a nodule?"


def test_a_written_box_stays_as_wrong_as_it_was() -> None:
    """The label must not stand in for the box that a model sampled, or that a question draws too small."""
    wrong = (0.08, 0.23, 0.23, 0.38)
    record = made([[20, 10, 50, 40]], ALL, "There is a nodule at [0.08, 0.23, 0.23, 0.38].")
    record["conversations"][0]["value"] = "<image>\nIs [0.10, 0.25, 0.22, 0.37] too small for the nodule?"
    moved = [study for study in epochs(record) if study.move.resamples]
    assert len(moved) > 40
    for study in moved:
        asked, answered = (parse_boxes(turn["value"])[0] for turn in study.record["conversations"])
        for found, written in ((asked, (0.1, 0.25, 0.22, 0.37)), (answered, wrong)):
            expected = [min(max(value, 0), 1) for value in study.move.boxes([written])[0]]
            assert found == pytest.approx(expected, abs=0.00501)
        (true,) = record_geometry(record).to_square(true_boxes(study.record))
        assert iou_matrix([answered], [true])[0, 0] < 0.75


def test_a_rounded_box_of_a_lesion_is_written_again_from_the_lesion() -> None:
    """Its rounding is not zoomed along. Of two lesions it is the nearer one's; a thin one is written one step wide."""
    boxes = [[20.9, 10.9, 50.9, 40.9], [21.5, 10.9, 51.5, 40.9], [90.1, 20, 90.9, 60]]
    record = made(boxes, {"zoom": [1, 3], "rotation": 0, "shift": 0, "share": 1})
    written = [format_box(box) for box in record_geometry(record).to_square(boxes)]
    record["conversations"][1]["value"] = f"At {written[1]}, {written[0]} and {written[2]}."
    assert written[0] != written[1] and not is_templated(record)
    moved = [study for study in epochs(record) if study.move.resamples]
    assert max(study.move.zoom for study in moved) > 1.15
    found = [map(format_box, record_geometry(record).to_square(true_boxes(study.record))) for study in moved]
    expected = [f"At {second}, {first} and {thin}." for first, second, thin in found]
    # The record's own boxes are rounded to a thousandth of a pixel, which may tip a tie.
    assert sum(answer(study) != text for study, text in zip(moved, expected)) <= 1


def test_a_box_of_no_lesion_stays_in_the_part_that_words_name() -> None:
    text = "A nodule in the upper left at [0.20, 0.25, 0.40, 0.40]."
    record = made([[10, 10, 40, 40]], {"rotation": 20, "zoom": [0.7, 1.5], "shift": 0.2, "share": 1}, text)
    boxes = [box for study in epochs(record, 100) for box in parse_boxes(answer(study))]
    assert len(set(boxes)) > 30
    # Its two decimals are rounded after that.
    assert max(max(x1 + x2, y1 + y2) / 2 for x1, y1, x2, y2 in boxes) < 1 / 3 + 0.006


def test_where_words_say_a_place_a_lesion_stays_in_its_part() -> None:
    text = "A nodule in the upper left at [0.10, 0.25, 0.25, 0.40]."
    moving = {"rotation": 20, "zoom": [0.7, 1.5], "shift": 0.2, "share": 1}
    studies = epochs(made([[20, 10, 50, 40]], moving, text), 100)
    regions = {region_of(box) for study in studies for box in parse_boxes(answer(study))}
    assert regions == {"upper left"} and sum(study.move.resamples for study in studies) > 50
    assert all("in the upper left" in answer(study) for study in studies)
    # Also where mirroring does not know the words.
    for place in ("oben links", "RUL", "at 11 o'clock", "high in the image", "in the north-west"):
        far = epochs(made([[20, 10, 50, 40]], moving, f"A nodule, {place}, at [0.10, 0.25, 0.25, 0.40]."), 40)
        assert {region_of(box) for study in far for box in parse_boxes(answer(study))} == {"upper left"}
    # A lesion of the middle third is in the left or in the right half.
    halves = epochs(made([[85, 45, 105, 65]], moving, "A nodule in the left half at [0.42, 0.43, 0.53, 0.53]."), 100)
    middles = [sum(box[::2]) / 2 for study in halves for box in parse_boxes(answer(study))]
    assert max(middles) <= 0.5 and len(set(middles)) > 3
    silent = epochs(made([[20, 10, 50, 40]], moving, "A nodule at [0.10, 0.25, 0.25, 0.40]."), 100)
    assert len({region_of(box) for study in silent for box in parse_boxes(answer(study))}) > 1


def test_a_question_of_looks_is_mirrored_with_its_image_and_keeps_its_place() -> None:
    """Its answer is written again, and the question stands as it was asked."""
    asked = "Find: nodule, that is a dark disc in the left half of the image."
    mirrored = epochs(made([[20, 10, 50, 40]], MIRROR, asked=asked), 20)
    moved = [study.record for study in mirrored if study.move.mirrors]
    assert moved and all(is_templated(record) for record in moved)
    assert {record["conversations"][0]["value"] for record in moved} == {f"<image>\n{asked.replace('left', 'right')}"}
    moving = {"rotation": 20, "zoom": [0.7, 1.5], "shift": 0.2, "share": 1}
    boxes = [
        box
        for study in epochs(made([[85, 45, 105, 65]], moving, asked=asked), 100)
        for box in parse_boxes(answer(study))
    ]
    middles = [(x1 + x2) / 2 for x1, _, x2, _ in boxes]
    assert max(middles) <= 0.5 and len(set(middles)) > 3


def test_a_phrase_is_mirrored_with_its_question() -> None:
    text = "At [0.10, 0.25, 0.25, 0.40]."
    record = made([[20, 10, 50, 40]], MIRROR, text, answer_type="phrase", phrase="Nodule on the left.")
    record["conversations"][0]["value"] = "<image>\nWhere is this seen: Nodule on the left?"
    moved = [study.record for study in epochs(record, 20) if study.move.mirrors]
    assert {record["phrase"] for record in moved} == {"Nodule on the right."}
    assert all("Nodule on the right" in record["conversations"][0]["value"] for record in moved)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("An opacity in the RML at [0.10, 0.25, 0.25, 0.40].", {}),
        ("A nodule at 3 o'clock: [0.10, 0.25, 0.25, 0.40].", {}),
        ("A nodule.", {"terms": {"nodule": ["nodule", "left nodule"], "cyst": ["cyst"]}}),
    ],
)
def test_what_cannot_be_mirrored_is_not(text: str, more: dict) -> None:
    assert not any(study.move.mirrors for study in epochs(made([[20, 10, 50, 40]], MIRROR, text, **more)))


def test_boxes_in_another_form_are_left_where_they_are() -> None:
    record = made([[20, 10, 50, 40]], ALL, "<box>(100,250),(250,400)</box> is a nodule.")
    assert all(study.record is record or study.record == record for study in epochs(record, 20))
    assert any(study.grey.gamma != 1 for study in epochs(record, 20)), "grey levels change all the same"


@pytest.mark.parametrize(
    "text",
    [
        "A nodule, bbox: 0.10 0.25 0.25 0.40.",
        "A nodule: <bin_10><bin_25>.",
        "[0.10, 0.25, 0.25, 0.40], centre (0.18, 0.33).",
    ],
)
def test_a_study_with_coordinates_in_no_box_is_not_moved(text: str) -> None:
    """They would stay while the picture moves. A size is none."""
    assert not any(study.move != UNMOVED for study in epochs(made([[20, 10, 50, 40]], ALL, text)))
    asked = made([[20, 10, 50, 40]], ALL, asked=f"Do you agree? {text}")
    assert is_templated(asked) and not any(study.move != UNMOVED for study in epochs(asked, 20))
    size = "A nodule at [0.10, 0.25, 0.25, 0.40], of 0.5 x 0.7 cm."
    assert any(study.move != UNMOVED for study in epochs(made([[20, 10, 50, 40]], ALL, size), 20))


def test_a_question_that_stays_holds_no_box() -> None:
    asked = made([[20, 10, 50, 40]], ALL, asked="What is at [0.10, 0.25, 0.25, 0.40]?")
    assert is_templated(asked) and not any(study.move != UNMOVED for study in epochs(asked, 20))
    text = "At [0.10, 0.25, 0.25, 0.40]."
    phrase = made([[20, 10, 50, 40]], ALL, text, answer_type="phrase", phrase=f"Nodule {text}")
    assert not any(study.move != UNMOVED for study in epochs(phrase, 20))


def test_no_source_is_mirrored_unless_its_recipe_says_so() -> None:
    assert not any(study.move.mirrors for study in epochs(made([[20, 10, 50, 40]])))
    assert any(study.move.resamples for study in epochs(made([[20, 10, 50, 40]])))


def test_a_crop_that_loses_a_lesion_is_not_taken() -> None:
    """Two lesions in opposite corners: no zoom of 3 keeps both."""
    rule = {"zoom": [1, 3], "rotation": 0, "shift": 0, "share": 1}
    record = made([[0, 0, 20, 20], [180, 100, 200, 120]], rule)
    record["image_size"] = [200, 200]
    zooms = [study.move.zoom for study in epochs(record, 100)]
    assert max(zooms) < 1.2 and len(set(zooms)) > 5
    assert max(study.move.zoom for study in epochs(made([], rule), 100)) > 2.5


def test_the_same_seed_epoch_and_record_give_the_same_study() -> None:
    record = made([[20, 10, 50, 40]], ALL)
    random.seed(1)
    assert epochs(record) == epochs(copy.deepcopy(record))
    assert len({study.move for study in epochs(record)}) == 60
    assert augmented_study(record, 1, 0).move != augmented_study(record, 0, 0).move
    assert augmented_study({**record, "id": "drawn/b.png"}, 0, 0).move != augmented_study(record, 0, 0).move
    study = augmented_study(record, 0, 0)
    assert move_of(study.as_json()) == study.move


def test_the_share_that_is_shown_as_it_is() -> None:
    record = made([[20, 10, 50, 40]], {**ALL, "share": 0.25})
    assert 60 < sum(study.changed for study in epochs(record, 400)) < 140
    assert not any(study.changed for study in epochs(made([[20, 10, 50, 40]], {"share": 0})))


def test_items_without_true_boxes_change_their_grey_levels_only() -> None:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "At [0.1, 0.2, 0.3, 0.4]."}]
    for item in ({"id": 7, "image": "a.png", "conversations": turns}, {"image": "a.png", "conversations": turns}):
        studies = [augmented_study(item, 0, epoch, name="3") for epoch in range(20)]
        assert all(study.record is item and not study.move.resamples for study in studies)
        assert len({study.grey for study in studies}) > 10


def test_a_rule_in_a_record_that_is_no_rule_is_named() -> None:
    record = made([[20, 10, 50, 40]], {"flips": ["sideways"], "zoom": [2, 1]})
    faults = record_faults(record)
    assert len(faults) == 2 and "sideways" in faults[0] and "augment.zoom" in faults[1]
    with pytest.raises(UmedError, match=r"record drawn/a.png: augment\.flips"):
        augment_rule_of(record)
    assert record_faults({**record, "augment": "yes"}) == ["augment: is str; needed: an object"]
    assert augment_rule_of(made([])) == AugmentRule()


@pytest.mark.llava
def test_pixels_move_as_boxes_do_and_the_padding_keeps_its_colour() -> None:
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from umed_plugin.data.augmentation.pixels import augment_pixels
    from umed_plugin.data.augmentation.study import GreyLevels
    from umed_plugin.grounding.square_move import SquareMove

    size = 112
    processor = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    content, box = (0.0, 0.25, 1.0, 0.75), (20 / 112, 36 / 112, 36 / 112, 48 / 112)
    square = mean.expand(3, size, size).clone()
    square[:, 28:84] = 0.2
    square[:, 36:48, 20:36] = 1.0
    image = (square - mean) / std
    grey = GreyLevels(gamma=1.1, brightness=-0.05, noise=0.02, seed=5)
    for move in (
        SquareMove(),
        SquareMove(left_right=True),
        SquareMove(up_down=True, angle=8, zoom=1.2, shift=(0.05, -0.04)),
        SquareMove(angle=-10, zoom=0.85, shift=(-0.02, 0.1)),
    ):
        found = augment_pixels(image, content, move, grey, processor) * std + mean
        (x1, y1, x2, y2) = move.boxes([box])[0]
        rows, columns = (found[0] > 0.7).nonzero(as_tuple=True)
        extent = (columns.min() / size, rows.min() / size, (columns.max() + 1) / size, (rows.max() + 1) / size)
        # The turned rectangle's corners leave the ellipse's box by a little.
        assert iou_matrix([[float(value) for value in extent]], [(x1, y1, x2, y2)])[0, 0] > (
            0.7 if move.angle else 0.999
        )
        inside = (columns / size >= x1 - 0.01) & (columns / size < x2) & (rows / size >= y1 - 0.01) & (rows / size < y2)
        assert inside.float().mean() > 0.92
        # A corner of the square is padding before and after, exactly of the mean colour.
        assert torch.allclose(found[:, 0, 0], mean[:, 0, 0], atol=1e-6)
        assert (found - found[:1]).abs()[:, 50:60, 50:60].max() < 1e-5, "a grey image stays grey"
    plain = augment_pixels(image, content, SquareMove(), GreyLevels(), processor)
    assert torch.equal(plain, image)
    assert torch.equal(
        augment_pixels(image, content, SquareMove(left_right=True), GreyLevels(), processor), image.flip(2)
    )
    threads = torch.get_num_threads()
    move, found = SquareMove(angle=9, zoom=1.1), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(augment_pixels(image, content, move, grey, processor))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert torch.equal(*found)
