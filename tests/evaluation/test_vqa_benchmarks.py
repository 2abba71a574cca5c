"""PMC-VQA, OmniMedVQA, SLAKE and VQA-RAD: files in their published forms, odd rows, and metrics by hand."""

from __future__ import annotations

import csv
import json

import pytest
from support.benchmark_files import closed, omni, pmc, questions_of
from support.benchmark_runs import metrics_of, picture

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.questions import chosen_questions

pytestmark = pytest.mark.one_stack


# --- PMC-VQA


@pytest.mark.parametrize("column", ["Answer", "Anwser"])
def test_pmc_vqa_by_hand(tmp_path, column):
    questions = questions_of("pmc_vqa", pmc(tmp_path / "pmc", column))
    assert [question.id for question in questions] == ["0/choice", "0/blank", "1/choice", "1/blank"]
    assert [question.truth for question in questions] == ["MRI", "MRI", "heart", "heart"]
    assert questions[0].text == "Question: What is shown? Choices: A: CT B: MRI C: X-ray D: Ultrasound The Answer is:"
    assert questions[1].text == "Question: What is shown? The Answer is:"
    found = metrics_of("pmc_vqa", questions, ["B", "An MRI scan", "A: liver", "the heart"])
    assert found["choice_accuracy"] == 0.5 and found["blank_accuracy"] == 1
    # 2 of 5 words are right; no brevity penalty, as the answers are longer.
    assert found["blank_bleu_1"] == pytest.approx(2 / 5)


def test_a_pmc_answer_that_is_no_choice_is_left_out_and_named(tmp_path, capsys):
    folder = pmc(tmp_path / "pmc")
    (folder / "test.csv").write_text((folder / "test.csv").read_text().replace(",B,B", ",x-ray of a hand,"))
    assert [question.id for question in questions_of("pmc_vqa", folder)] == ["1/choice", "1/blank"]
    told = capsys.readouterr().err
    assert "pmc_vqa: 1 of 2 rows are left out" in told
    assert "test.csv, row 2: the answer 'x-ray of a hand' is not one of the choices" in told


def test_a_pmc_label_is_not_trusted_over_the_text(tmp_path):
    folder = pmc(tmp_path / "pmc")
    (folder / "test.csv").write_text((folder / "test.csv").read_text().replace(",B,B", ",X-ray,B"))
    assert questions_of("pmc_vqa", folder)[0].truth == "X-ray"


def test_the_second_version_of_pmc_has_letters_as_answers_and_more_columns(tmp_path, capsys):
    head = [
        "index",
        "Figure_path",
        "Caption",
        "Question",
        "Choice A",
        "Choice B",
        "Choice C",
        "Choice D",
        "Answer",
        "split",
    ]
    row = [
        "7",
        "f1.jpg",
        'A "caption",\nin two lines',
        "What?",
        " A: CT",
        " B: MRI",
        " C: X-ray",
        " D: US",
        "C",
        "test",
    ]
    slipped, empty = row[:-2], [*row[:6], " ", *row[7:]]
    with (tmp_path / "test_2.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([head, row, slipped, row, empty, row, row])
    picture(tmp_path / "images_2" / "figures" / "f1.jpg")
    questions = questions_of("pmc_vqa", tmp_path)
    assert [question.id for question in questions[::2]] == ["0/choice", "2/choice", "4/choice", "5/choice"]
    assert {question.truth for question in questions} == {"X-ray"}
    told = capsys.readouterr().err
    assert "2 of 6 rows are left out" in told and "test_2.csv, row 3: is a str (8 cells, and the header has 10)" in told
    assert "row 5: its question or one of its choices is empty" in told


# --- OmniMedVQA


def test_omnimedvqa_by_hand(tmp_path):
    questions = questions_of("omnimedvqa", omni(tmp_path))
    assert [question.id for question in questions] == ["ACRIMA/a", "ACRIMA/b", "BUSI/c"]
    assert questions[0].text == (
        "What is this?Here are 2 candidate answers:['CT', 'Fundus'] Only return what you think is the correct answer from the "
        "candidate answers, do not return any other irrelevant text!"
    )
    assert questions[1].options == ["Yes", "No"] and questions[1].options_after == "Question: Glaucoma? The answer is"
    answers = [("It is a fundus photo", (3, 1)), ("zzz", (1, 2)), ("CT", (1, 2))]
    found = metrics_of("omnimedvqa", questions, answers)
    assert found["qa_score"] == pytest.approx(2 / 3), "an answer that is like no option is wrong"
    assert found["prefix_score"] == pytest.approx(2 / 3)
    assert found["prefix_score_mean_of_sets"] == pytest.approx((0.5 + 1) / 2)
    assert (found["qa_score/FP"], found["qa_score/US"], found["qa_score/Disease"]) == (0.5, 1, 0)


def test_an_omnimedvqa_folder_that_was_unpacked_into_another_is_found(tmp_path):
    omni(tmp_path / "OmniMedVQA")
    assert [question.id for question in questions_of("omnimedvqa", tmp_path)] == ["ACRIMA/a", "ACRIMA/b", "BUSI/c"]


def test_files_of_restricted_access_are_left_out_where_none_of_their_images_is_there(tmp_path, capsys):
    root = omni(tmp_path)
    (row,) = json.loads((root / "QA_information" / "Open-access" / "BUSI.json").read_text())
    restricted = root / "QA_information" / "Restricted-access"
    restricted.mkdir()
    for name in ("AIDA", "Kvasir1"):
        rows = [{**row, "dataset": name, "question_id": n, "image_path": f"Images/{name}/{n}.png"} for n in range(3)]
        (restricted / f"{name}.json").write_text(json.dumps(rows))
    assert [question.groups["part"] for question in questions_of("omnimedvqa", root)] == ["ACRIMA", "ACRIMA", "BUSI"]
    told = capsys.readouterr().out
    assert "2 files of Restricted-access with 6 questions are left out, because none of their images is here" in told
    assert "AIDA, Kvasir1" in told
    picture(root / "Images" / "AIDA" / "1.png")
    with pytest.raises(UmedError, match=r"2 images of omnimedvqa are missing[^\0]*--on-bad-image skip"):
        questions_of("omnimedvqa", root)
    asked, skipped = chosen_questions(BENCHMARKS["omnimedvqa"], root, work=root / "work", skip=True)
    assert [question.id for question in asked][-1] == "AIDA/1" and skipped == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gt_answer": "PET"}, "gt_answer 'PET' is not one of its options"),
        ({"gt_answer": float("nan")}, "its gt_answer is empty"),
        ({"gt_answer": None}, "its gt_answer is empty"),
        ({"question": " "}, "its question is empty"),
        ({"option_B": ""}, "its option_B is empty"),
        ({"option_A": None}, "has 1 options of option_A to option_D; needed: two at least"),
        ({"option_A": ["CT"]}, "its option_A is a list"),
        ({"image_path": ""}, "its image_path is empty"),
    ],
)
def test_one_odd_row_of_omnimedvqa_is_left_out_and_named(changes, words, tmp_path, capsys):
    file = omni(tmp_path) / "QA_information" / "Open-access" / "ACRIMA.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0], {**rows[0], **changes}, rows[1], rows[1]]))
    asked = questions_of("omnimedvqa", tmp_path)
    assert [question.id for question in asked] == ["ACRIMA/a", "ACRIMA/b", "ACRIMA/b#2", "BUSI/c"], "ids stay unique"
    told = capsys.readouterr().err
    assert "1 of 5 rows are left out" in told and f"ACRIMA.json[1]: {words}" in told


# --- SLAKE and VQA-RAD


@pytest.mark.parametrize("name", ["slake", "vqa_rad"])
@pytest.mark.parametrize("field", ["question", "answer"])
@pytest.mark.parametrize("empty", ["", "  ", None, float("nan")])
def test_a_row_without_question_or_answer_is_left_out_and_named(name, field, empty, tmp_path, capsys):
    """SLAKE's train.json has one with the answer ""; it would be a candidate that every answer holds."""
    rows = json.loads((closed(tmp_path) / "test.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps([{**rows[0], field: empty}, *rows[1:]]))
    assert [question.truth for question in questions_of(name, tmp_path)] == ["No", "left", "Left lung", "4"]
    told = capsys.readouterr().err
    assert f"{name}: 1 of 5 rows are left out" in told and f"[0]: its {field} is empty" in told
