"""MedVH: files in their published forms, odd rows, tasks beside their baselines, and metrics by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from support.benchmark_files import medvh, questions_of
from support.benchmark_runs import metrics_of, picture

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.medvh import split_choices
from umed_plugin.evaluation.metrics.choices import right_option

pytestmark = pytest.mark.one_stack
CHOICES = "A: big mass, cyst. B: none. C: stone. D: cyst."


def test_medvh_by_hand(tmp_path):
    questions = questions_of("medvh", medvh(tmp_path))
    assert [question.groups["part"] for question in questions] == ["wrongful_image"] * 2 + ["fcj"] + [
        "report_generation"
    ] * 2
    assert "The suggested answer is: B: No." in questions[2].text
    answers = [
        "C",
        "This is not a suitable question",
        "B. It is not.",
        "There is pneumonia and a nodule, but no edema.",  # one right, one wrong, one missed
        "A pneumothorax is present.",
    ]
    found = metrics_of("medvh", questions, answers)
    assert found["accuracy/wrongful_image"] == 1
    assert found["accuracy_first_character/wrongful_image"] == 0.5
    assert found["accuracy/fcj"] == 0 and found["takes_suggestion"] == 1
    assert found["says_last/wrongful_image"] == 1 and found["says_last/fcj"] == 1
    assert found["report_chair"] == pytest.approx(2 / 3) and found["report_recall"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("truth", "right"),
    [
        *(
            ("D", 3),
            ("d", 3),
            ("D: cyst", 3),
            ("D: cyst.", 3),
            ("a: cyst", 3),
            ("n: stone", 2),
            ("cyst", 3),
            ("(C)", 2),
            ("C.", 2),
        ),
        *(
            ("A: big mass", 0),
            ("A. big mass, cyst", 0),
            ("C) Stone", 2),
            ("n: Nodule", None),
            ("E", None),
            ("", None),
            ("h: rib", None),
        ),
        *(("B: stones", None), ("C: stones", 2)),
    ],
)
def test_the_text_of_a_truth_goes_before_its_letter(truth, right):
    assert right_option(truth, split_choices(CHOICES)) == right


def test_one_odd_row_of_medvh_is_left_out_and_reports_of_both_forms_are_read(tmp_path, capsys):
    root = medvh(tmp_path)
    rows = [{"question_id": n, "img_name": "m1.jpg", "question": "q", "choices": CHOICES, "gt": "D"} for n in range(8)]
    rows[1]["gt"], rows[2]["gt"] = "n: Nodule", "a: cyst"
    rows[3] = {"question_id": 3}
    rows[4] = "not a row"
    rows[5]["choices"] = "none at all"
    (root / "multi_choices" / "test_wrongful_image.json").write_text(json.dumps(rows))
    reports = [
        {"report_id": 0, "image_name": "m1.jpg", "gt_labels": ["pleural effusion", "Edema"]},
        {"report_id": 1, "image_name": "m1.jpg", "gt_labels": []},
        {"report_id": 2, "image_name": "m1.jpg", "gt_labels": "No Finding"},
        {"report_id": 3, "image_name": "m1.jpg", "gt_labels": ["Lump"]},
    ]
    (root / "text_generation" / "test_report_generation.json").write_text(json.dumps(reports))
    questions = questions_of("medvh", root)
    wrongful = [question for question in questions if question.groups["part"] == "wrongful_image"]
    assert [question.id for question in wrongful] == [f"wrongful_image/{n}" for n in (0, 2, 6, 7)]
    assert {question.truth for question in wrongful} == {"cyst"}
    found = [question.about["findings"] for question in questions if "findings" in question.about]
    assert found == [["Pleural Effusion", "Edema"], [], ["No Finding"]]
    told = capsys.readouterr().err
    assert "medvh/wrongful_image: 4 of 8 rows are left out" in told
    for words in (
        "[1]: gt 'n: Nodule' is none of its choices",
        "[3]: has none of the fields img_name",
        "[4]: is a str",
    ):
        assert words in told
    assert "medvh/report_generation: 1 of 4 rows are left out" in told and "unknown labels 'Lump'" in told


def test_pictures_of_the_published_folders_are_found(tmp_path):
    rows = [{"question_id": 0, "img_name": "m1.jpg", "question": "q", "choices": CHOICES, "gt": "D"}]
    file = tmp_path / "multi_choices" / "baseline_worngful_image" / "test_wrongful_image_baseline_src.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(rows))
    picture(tmp_path / "multi_choices" / "wrongful_image" / "m1.jpg")
    assert len(questions_of("medvh", tmp_path)) == 1


def published_medvh(folder, last="E: Not a suitable question for the image."):
    """Rows of the forms that the published files have: the right choice is the last, or in a baseline the last but one."""
    choices = "A: Atelectasis, Mass. B: None. C: Cardiomegaly. D: Pleural Effusion. " + last
    row = {
        "img_id": 9,
        "img_name": "m1.jpg",
        "question": "Which?",
        "choices": choices,
        "img_source": "SLAKE",
        "ori_id": "x",
    }
    files = {
        "NOTA/test_nota_src.json": ["E"] * 4,
        "NOTA/test_nota_baseline.json": ["D"] * 4,
        "wrongful_image/test_wrongful_image.json": ["E"] * 4,
        # The folder is misspelt there, and the truth is a letter with a text, or a letter of the answer with a text.
        "baseline_worngful_image/test_worngful_image.json": [
            "D: Pleural Effusion",
            "c: Cardiomegaly",
            "n: Nodule",
            "B: None",
        ],
        "pre/test_pre_src.json": ["B"] * 4,
        "baseline_pre/test_pre_baseline_src.json": ["B"] * 4,
    }
    for name, truths in files.items():
        file = folder / "multi_choices" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{**row, "question_id": n, "gt": gt} for n, gt in enumerate(truths)]))
        picture(file.parent / "m1.jpg")
    return folder


def test_a_task_of_medvh_is_balanced_with_its_baseline(tmp_path, capsys):
    questions = questions_of("medvh", published_medvh(tmp_path))
    count = Counter(question.groups["part"] for question in questions)
    assert count == {"nota": 4, "nota_baseline": 4, "wrongful_image": 4, "wrongful_image_baseline": 3} | dict.fromkeys(
        ("pre", "pre_baseline"), 4
    )
    found = metrics_of("medvh", questions, ["E"] * len(questions))
    assert (found["accuracy/nota"], found["accuracy/nota_baseline"], found["balanced_accuracy/nota"]) == (1, 0, 0.5)
    assert found["says_last/nota"] == found["says_last/wrongful_image"] == 1
    answers = [question.truth for question in questions]
    assert metrics_of("medvh", questions, answers)["balanced_accuracy/wrongful_image"] == 1
    assert "balanced_accuracy/pre" not in found
    told = capsys.readouterr().err
    assert "medvh/pre: its file and its baseline's hold the same questions and answers" in told
    assert "medvh/wrongful_image_baseline: 1 of 4 rows are left out" in told and "'n: Nodule'" in told


def test_choices_in_one_text():
    assert split_choices("A: left side. B: right side. C: None of the above.") == [
        "left side",
        "right side",
        "None of the above",
    ]
    assert split_choices("A: Chest injury, bullae, B: trauma, etc.") == ["Chest injury, bullae", "trauma, etc"]
    assert split_choices("A: type C: rare. B: other. C: none.") == ["type C: rare", "other", "none"]
    with pytest.raises(UmedError, match="not of the form"):
        split_choices("yes or no")
