"""PMC-VQA, MedMNIST, OmniMedVQA, MedVH and Med-GRIT: files in their published forms, metrics by hand, and the whole way once."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from support.benchmark_runs import command, lines, metrics_of, picture

from umed_plugin.cli import main
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.benchmarks.medvh import split_choices
from umed_plugin.evaluation.constants import best_constants, constant_answers
from umed_plugin.evaluation.metrics.choices import right_option
from umed_plugin.evaluation.metrics.metric import Row, statistics
from umed_plugin.evaluation.questions import chosen_questions
from umed_plugin.grounding.dialects import find_dialect
from umed_plugin.grounding.scoring import Scorer

pytestmark = pytest.mark.one_stack


def questions_of(name, root, **options):
    return chosen_questions(BENCHMARKS[name], root, work=root / "work", **options)[0]


# --- PMC-VQA


def pmc(folder, column="Answer"):
    """Both generations of files: values that begin with " A:", and a misspelt column."""
    rows = [
        ("f1.jpg", "What is shown?", " A:CT ", " B:MRI ", " C:X-ray ", " D:Ultrasound ", "B", "B"),
        ("f2.jpg", "Which organ?", " A:liver ", " B:lung ", " C:heart ", " D:brain ", " C:heart ", ""),
    ]
    head = ["Figure_path", "Question", "Choice A", "Choice B", "Choice C", "Choice D", column, "Answer_label"]
    folder.mkdir(exist_ok=True)
    with (folder / "test.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([head, *rows])
    for name in ("f1.jpg", "f2.jpg"):
        picture(folder / "images" / name)
    return folder


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


@pytest.mark.parametrize(
    ("name", "file"), [("medvh", "multi_choices/test_a.json"), ("pmc_vqa", "test.csv"), ("llava_med", "test.jsonl")]
)
def test_a_pointer_in_place_of_a_file_is_told(tmp_path, name, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UmedError, match=r"is a Git LFS pointer and not the file itself\. Get it: git lfs pull"):
        questions_of(name, tmp_path)


# --- MedMNIST


def mnist(folder, count=6):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for name, shape, labels in (
        ("pneumoniamnist", (28, 28), np.arange(count)[:, None] % 2),
        ("dermamnist_224", (28, 28, 3), np.arange(count)[:, None] % 7),
        ("chestmnist", (28, 28), generator.integers(0, 2, (count, 14))),
    ):
        images = generator.integers(0, 255, (count, *shape), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", test_images=images, test_labels=labels.astype(np.uint8))
    return folder


def test_medmnist_by_hand(tmp_path):
    root = mnist(tmp_path / "mnist")
    questions = questions_of("medmnist", root)
    per_set = {
        name: sum(q.groups["part"] == name for q in questions)
        for name in ("pneumoniamnist", "dermamnist", "chestmnist")
    }
    assert per_set == {"pneumoniamnist": 6, "dermamnist": 6, "chestmnist": 6 * 14}
    mine = [question for question in questions if question.groups["part"] == "pneumoniamnist"]
    assert [question.truth for question in mine] == ["normal", "pneumonia"] * 3
    with np.load(root / "pneumoniamnist.npz") as arrays:
        assert np.array_equal(np.asarray(Image.open(mine[3].image)), arrays["test_images"][3]), "written without loss"
    # Losses (normal, pneumonia) -> score of pneumonia rises with the first and falls with the second.
    losses = [(1, 2), (2, 1), (1, 3), (1, 1.5), (2, 1), (1, 2)]
    # Scores by loss difference: normal -1, -2, +1; pneumonia +1, -0.5, -1. Pairs won: 2.5 (tie with +1) + 2 + 1.5 (tie with -1).
    found = metrics_of("medmnist", mine, [("", pair) for pair in losses])
    assert found["auc/pneumoniamnist"] == pytest.approx(6 / 9)
    assert found["acc/pneumoniamnist"] == pytest.approx(3 / 6)


@pytest.fixture
def short_bootstrap(monkeypatch):
    """100 resamples instead of 2,000: 14 AUCs for each of them take a while, and these tests look at no interval."""
    monkeypatch.setattr("umed_plugin.evaluation.metrics.metric.RESAMPLES", 100)


def test_several_labels_are_asked_one_by_one_about_one_image(tmp_path, short_bootstrap):
    questions = [q for q in questions_of("medmnist", mnist(tmp_path / "mnist")) if q.groups["part"] == "chestmnist"]
    assert len({question.image for question in questions}) == 6 and not any(question.write for question in questions)
    right = [("", (2, 1) if question.truth == "yes" else (1, 2)) for question in questions]
    found = metrics_of("medmnist", questions, right)
    assert found == {"auc/chestmnist": 1, "acc/chestmnist": 1}
    assert metrics_of("medmnist", questions, [("", (1, 1))] * len(questions))["auc/chestmnist"] == 0.5


def test_an_npz_that_does_not_fit_is_named(tmp_path):
    np.savez(
        tmp_path / "breastmnist.npz", test_images=np.zeros((2, 28, 28), np.uint8), test_labels=np.array([[7], [5]])
    )
    with pytest.raises(UmedError, match=r"2 of 2 rows cannot be read") as caught:
        questions_of("medmnist", tmp_path)
    assert "breastmnist.npz:test_labels[1]: the label 5 is none of the 2 classes" in str(caught.value)
    np.savez(tmp_path / "breastmnist.npz", test_images=np.zeros((2, 28, 28), np.uint8), test_labels=np.zeros((2, 3)))
    with pytest.raises(UmedError, match=r"breastmnist.npz: labels \(2, 3\) of 2 images do not fit"):
        questions_of("medmnist", tmp_path)
    np.savez(tmp_path / "breastmnist.npz", train_images=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(UmedError, match="has no test_images, test_labels; it has train_images"):
        questions_of("medmnist", tmp_path)


@pytest.mark.parametrize("odd", [5, -1, 0.5, float("nan")])
def test_an_odd_label_of_medmnist_costs_its_image_alone(tmp_path, capsys, odd):
    """A label of -1 would be read as the last class."""
    labels = np.array([[0], [1], [odd], [1]], dtype=np.float32 if isinstance(odd, float) else np.int64)
    np.savez(tmp_path / "breastmnist.npz", test_images=np.zeros((4, 28, 28), np.uint8), test_labels=labels)
    asked = questions_of("medmnist", tmp_path)
    assert [question.truth for question in asked] == ["malignant", "normal or benign", "normal or benign"]
    assert [question.id for question in asked] == ["breastmnist/0", "breastmnist/1", "breastmnist/3"]
    assert "medmnist: 1 of 4 rows are left out" in capsys.readouterr().err
    several = np.zeros((4, 14), np.int64)
    several[3, 13] = odd if odd == -1 else 2
    np.savez(tmp_path / "chestmnist.npz", test_images=np.zeros((4, 28, 28), np.uint8), test_labels=several)
    assert sum(question.groups["part"] == "chestmnist" for question in questions_of("medmnist", tmp_path)) == 3 * 14


def breast(folder, name="breastmnist", labels=(0, 1, 1, 1), **changes):
    """``changes`` take the place of arrays."""
    folder.mkdir(exist_ok=True)
    arrays = {"test_images": np.zeros((len(labels), 28, 28), np.uint8), "test_labels": np.array(labels)[:, None]}
    np.savez(folder / f"{name}.npz", **{**arrays, **changes})
    return folder


def test_of_several_sizes_of_a_set_the_largest_is_asked(tmp_path, capsys):
    """By name, _64 comes behind _224. Files of others that begin like a set's are none of MedMNIST's."""
    for name in ("breastmnist", "breastmnist_64", "breastmnist_128", "breastmnist_224", "breastmnist_corrupted"):
        breast(tmp_path, name)
    assert {question.about["file"] for question in questions_of("medmnist", tmp_path)} == {
        str(tmp_path / "breastmnist_224.npz")
    }
    told = capsys.readouterr().err
    assert "breastmnist is there in 4 sizes; breastmnist_224.npz is asked" in told
    assert "breastmnist_224.npz has 4 test images, and the published file has 156" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"test_images": np.zeros((4, 28, 28), np.float32)},
            "test_images are float32 .4, 28, 28.; MedMNIST's are uint8",
        ),
        ({"test_images": np.zeros((4, 28, 28, 28), np.uint8)}, "test_images are uint8 .4, 28, 28, 28."),
        ({"test_images": np.zeros((3, 28, 28), np.uint8)}, "labels .4, 1. of 3 images do not fit"),
        ({"test_labels": np.array([["a"]] * 4, dtype=object)}, "cannot be read .*allow_pickle"),
    ],
)
def test_arrays_that_are_not_medmnists_are_refused(changes, words, tmp_path):
    with pytest.raises(UmedError, match=words):
        questions_of("medmnist", breast(tmp_path, **changes))


def test_a_cut_off_npz_and_volumes_are_told(tmp_path):
    whole = (breast(tmp_path) / "breastmnist.npz").read_bytes()
    for length in (len(whole) // 2, 20, 0):
        (tmp_path / "breastmnist.npz").write_bytes(whole[:length])
        with pytest.raises(UmedError, match="breastmnist.npz: cannot be read .*Was the download cut off"):
            questions_of("medmnist", tmp_path)
    (tmp_path / "breastmnist.npz").rename(tmp_path / "nodulemnist3d_64.npz")
    with pytest.raises(UmedError, match="nodulemnist3d_64.npz: volumes are not asked"):
        questions_of("medmnist", tmp_path)


# --- OmniMedVQA


def omni(folder):
    records = [
        {"dataset": "ACRIMA", "question_id": "a", "question_type": "Modality", "question": "What is this?"}
        | {
            "gt_answer": "Fundus",
            "image_path": "Images/a.png",
            "option_A": "CT",
            "option_B": "Fundus",
            "modality_type": "FP",
        },
        {"dataset": "ACRIMA", "question_id": "b", "question_type": "Disease", "question": "Glaucoma?"}
        | {"gt_answer": "No", "image_path": "Images/a.png", "option_A": "Yes", "option_B": "No", "option_C": None}
        | {"modality": "FP"},
    ]
    other = [{**records[0], "dataset": "BUSI", "question_id": "c", "modality_type": "US", "gt_answer": "CT"}]
    for name, content in (("ACRIMA", records), ("BUSI", other)):
        file = folder / "QA_information" / "Open-access" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    picture(folder / "Images" / "a.png")
    return folder


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


# --- VQA-RAD, SLAKE and LLaVA-Med's files


def closed(folder):
    """Open and closed questions in the forms of all three."""
    rows = [("Yes", "CLOSED"), ("No", "CLOSED "), ("left", "CLOSED"), ("Left lung", "OPEN"), (4, "OPEN")]
    records = [
        {"qid": n, "question": f"Question {n}?", "answer": answer, "answer_type": kind, "q_lang": "en"}
        | {"img_name": f"{n}.png", "image_name": f"{n}.png", "phrase_type": "test_freeform"}
        | {"id": n, "image": f"{n}.png"}
        | {"conversations": [{"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": str(answer)}]}
        for n, (answer, kind) in enumerate(rows)
    ]
    for n in range(len(rows)):
        picture(folder / "imgs" / f"{n}.png", seed=n)
        picture(folder / "images" / f"{n}.png", seed=n)
    (folder / "test.json").write_text(json.dumps(records))
    return folder


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


# --- MedVH


def medvh(folder):
    choices = "A: Yes. B: No. C: This is not a suitable question for this image."
    content = {
        "multi_choices/test_wrongful_image.json": [
            {"question_id": 0, "img_name": "m1.jpg", "question": "Is it?", "choices": choices, "gt": "C"},
            {"question_id": 1, "img_name": "m1.jpg", "question": "Was it?", "choices": choices, "gt": "C: This is not"},
        ],
        "text_generation/test_FCJ.json": [
            {"question_id": 0, "img_name": "m1.jpg", "question": "Is it?", "choices": "A: Yes, B: No.", "gt": "A"}
            | {"suggested_answer": "B: No."},
        ],
        "text_generation/test_report_generation.json": [
            {"report_id": 0, "image_name": "m1.jpg", "pos_labels": ["Pneumonia", "Edema"]},
            {"report_id": 1, "image_name": "m1.jpg", "pos_labels": ["No Finding"]},
        ],
    }
    for name, records in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(records))
    for place in ("multi_choices/wrongful_image", "text_generation/FCJ", "text_generation/report_generation"):
        picture(folder / place / "m1.jpg")
    return folder


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


CHOICES = "A: big mass, cyst. B: none. C: stone. D: cyst."


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


@pytest.mark.parametrize(
    ("name", "make", "file", "key"),
    [
        ("omnimedvqa", omni, "QA_information/Open-access/ACRIMA.json", "gt_answer"),
        ("slake", None, "test.json", "answer_type"),
    ],
)
def test_one_odd_row_of_a_json_is_left_out_and_more_than_half_end_it(name, make, file, key, tmp_path, capsys):
    if make is None:
        row = {"qid": 0, "img_name": "a.png", "question": "q", "answer": "Yes", "answer_type": "CLOSED", "q_lang": "en"}
        (tmp_path / file).write_text(json.dumps([{**row, "qid": n} for n in range(3)]))
        picture(tmp_path / "imgs" / "a.png")
    else:
        make(tmp_path)
    rows = json.loads((tmp_path / file).read_text())
    whole = len(questions_of(name, tmp_path))
    (tmp_path / file).write_text(json.dumps([{**rows[0], key: "\x1b[31mneither"}, *rows[1:]]))
    assert len(questions_of(name, tmp_path)) == whole - 1
    told = capsys.readouterr().err
    assert f"{name}: 1 of {whole} rows are left out" in told and "[0]: " in told and "\x1b" not in told
    (tmp_path / file).write_text(json.dumps([{"id": 1}] * 6 + rows))
    with pytest.raises(UmedError, match=r"rows cannot be read. Is it the right file\?"):
        questions_of(name, tmp_path)


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


# --- Med-GRIT


def grit(folder):
    ask = "Picture 1:<img>/data/ct_1.png</img>\n"
    content = {
        "test_VG_img_coord.json": [
            {
                "id": "ct_1",
                "conversations": [[ask + "Where is <ref>liver</ref>?", "<ref>liver</ref><box>(0,0),(500,500)</box>"]],
            },
            {
                "id": "mr_1",
                "conversations": [[ask + "Where?", "<box>(0,0),(100,100)</box> <box>(500,500),(1000,1000)</box>"]],
            },
        ],
        "test_RO_img_coord.json": [
            {"id": "ct_1", "conversations": [[ask + "What is at <box>(0,0),(500,500)</box>?", "Left kidney"]]},
        ],
        "test_MII_img_coord.json": [
            {"id": "ct_1", "conversations": [[ask + "Describe.", "The liver is large and bright."]]},
        ],
    }
    folder.mkdir(exist_ok=True)
    for name, records in content.items():
        (folder / name).write_text(json.dumps(records))
    picture(folder / "images/ct_1.png", size=(200, 100))
    picture(folder / "images/mr_1.png", size=(100, 100))
    return folder


def test_a_grounding_row_without_a_box_is_left_out_and_named(tmp_path, capsys):
    root = grit(tmp_path / "grit")
    file = root / "test_VG_img_coord.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([*rows, {"id": "ct_1", "conversations": [["Where is it?", "It is not there."]]}]))
    assert sum(question.groups["part"] == "VG" for question in questions_of("med_grit", root)) == len(rows)
    told = capsys.readouterr().err
    assert "med_grit/VG: 1 of 3 rows are left out" in told and "'It is not there.' has no box" in told


def test_med_grit_by_hand(tmp_path):
    benchmark, scorer = BENCHMARKS["med_grit"], Scorer()
    questions = {q.id: q for q in benchmark.adapt(questions_of("med_grit", grit(tmp_path / "grit")), scorer)}
    assert questions["VG/ct_1"].text == "Where is liver?"
    # 200 x 100 in a square of 200: the upper left quarter of the image is x 0-0.5, y 0.25-0.5 of the square.
    assert questions["RO/ct_1"].text == "What is at [0.00, 0.25, 0.50, 0.50]?"
    answers = {
        "VG/ct_1": "At [0.00, 0.25, 0.50, 0.50].",
        "VG/mr_1": "[0.00, 0.00, 0.10, 0.05] and [0.50, 0.50, 1.00, 1.00]",  # the first at an IoU of 0.5: not above it
        "RO/ct_1": "the left kidney",
        "MII/ct_1": "The liver is large and bright",
    }
    found = metrics_of("med_grit", list(questions.values()), [answers[one] for one in questions], scorer)
    assert (found["recall_at_50/ct"], found["recall_at_50/mr"], found["recall_at_50"]) == (1, 0.5, 0.75)
    assert found["referring_accuracy"] == 1
    # BLEU 1 each, ROUGE-L 1, METEOR 1 - 0.5 (1/6)^3.
    assert found["mbmr_mii"] == pytest.approx((5 + 1 - 0.5 / 216) / 6)
    # The same boxes in Qwen-VL's way.
    qwen = Scorer(dialect=find_dialect("qwen_vl"))
    answers["VG/ct_1"] = "<ref>liver</ref><box>(0,0),(500,500)</box>"
    found = metrics_of("med_grit", list(questions.values()), [answers[one] for one in questions], qwen)
    assert found["recall_at_50/ct"] == 1


# --- the whole way


@pytest.mark.parametrize(
    ("name", "make", "metric"),
    [
        ("pmc_vqa", pmc, "choice_accuracy"),
        ("medmnist", mnist, "auc/pneumoniamnist"),
        ("omnimedvqa", omni, "prefix_score"),
        ("medvh", medvh, "report_chair"),
        ("med_grit", grit, "recall_at_50"),
    ],
)
def test_every_benchmark_runs_and_says_the_same_again(name, make, metric, tiny_mistral, tmp_path, short_bootstrap):
    root, out = make(tmp_path / "data"), tmp_path / "out"
    assert main(command(tiny_mistral, name, root, out, "--limit", 2, "--batch-size", 5)) == 0
    summary = json.loads((out / "evaluation.json").read_text())
    assert metric in summary["metrics"] and summary["n"] == len(lines(out / "predictions.jsonl"))
    found = [line for line in lines(out / "predictions.jsonl") if line["options"]]
    assert all(len(line["losses"]) == len(line["options"]) and min(line["losses"]) > 0 for line in found)
    before = (out / "evaluation.json").read_bytes()
    assert main(command(tiny_mistral, name, root, out, "--limit", 2, "--batch-size", 5)) == 0
    assert (out / "evaluation.json").read_bytes() == before


# Rating metrics that need more than an answer, or that less is better of, have no best constant.
@pytest.mark.parametrize(
    ("name", "make", "bare"),
    [
        ("pmc_vqa", pmc, set()),
        ("medmnist", mnist, set()),
        ("omnimedvqa", omni, set()),
        ("medvh", medvh, {"takes_suggestion", "report_chair"}),
        ("med_grit", grit, set()),
        ("slake", closed, set()),
        ("vqa_rad", closed, set()),
        ("llava_med", closed, set()),
    ],
)
def test_the_best_answer_that_never_looks_stands_beside_every_figure(name, make, bare, tmp_path, short_bootstrap):
    questions, scorer = questions_of(name, make(tmp_path / "data")), Scorer()
    adapt = BENCHMARKS[name].adapt
    questions = adapt(questions, scorer) if adapt else questions
    found = best_constants(BENCHMARKS[name], questions, scorer)
    losses = [[1.0] * len(question.options) for question in questions]
    figures = metrics_of(name, questions, [(q.truth, x) for q, x in zip(questions, losses)])
    defined = {key for key, value in figures.items() if value is not None and not key.startswith("says_last")}
    assert set(found) == defined - bare
    benchmark = BENCHMARKS[name]
    for constant in constant_answers(questions, benchmark, scorer).values():
        rows = [Row(q.id, q.cluster, benchmark.score(q, constant(q), scorer), q.groups) for q in questions]
        for key, value in statistics(benchmark.metrics(rows), rows).items():
            assert value is None or key not in found or value <= found[key]["value"] + 1e-12


def test_a_benchmark_that_is_not_listed_above_would_have_no_constants():
    assert set(BENCHMARKS) == {
        "pmc_vqa",
        "medmnist",
        "omnimedvqa",
        "medvh",
        "med_grit",
        "slake",
        "vqa_rad",
        "llava_med",
    }


def test_a_folder_without_the_files_is_named(tmp_path):
    for name in BENCHMARKS:
        with pytest.raises(UmedError, match="data-root|needs one"):
            questions_of(name, tmp_path)
