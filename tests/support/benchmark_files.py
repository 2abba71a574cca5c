"""Small files of each public benchmark in their published forms, and the questions that are read from them."""

from __future__ import annotations

import csv
import json

import numpy as np

from support.benchmark_runs import picture
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.questions import chosen_questions


def questions_of(name, root, **options):
    """What a benchmark asks about the files below ``root``."""
    return chosen_questions(BENCHMARKS[name], root, work=root / "work", **options)[0]


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


def mnist(folder, count=6):
    """Two classes, seven classes in colour, and 14 labels at a time; one file is named as of another size."""
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


def omni(folder):
    """Two sets of open access; the files name the modality in two ways."""
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


def closed(folder):
    """Open and closed questions in the forms of VQA-RAD, SLAKE and LLaVA-Med at once."""
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


def medvh(folder):
    """Two tasks of several choices and the reports, with the truth in each of its forms."""
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


def grit(folder):
    """Boxes of 0 to 1000 in questions and answers, about images of two modalities and sizes."""
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
