"""Kept answers are used again only for the same checkpoint, questions and pictures; a refusal says what differs."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.benchmark_runs import command, rad

from umed_plugin import evaluate
from umed_plugin.cli import main
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

pytestmark = pytest.mark.one_stack


class Says:
    """A model that gives one answer to everything, and counts the questions."""

    template = "none"

    def __init__(self, text="Yes."):
        self.text, self.asked = text, 0

    def fingerprint(self):
        return {}

    def scorer(self, dialect=None):
        return Scorer()

    def answer(self, questions, examine=None):
        self.asked += len(questions)
        return [ModelAnswer(self.text, [float(i) for i in range(len(q.options))]) for q in questions]


def slake(folder):
    (folder / "imgs").mkdir(parents=True)
    for index in range(4):
        Image.new("L", (40, 50), index).save(folder / "imgs" / f"{index}.png")
    rows = [
        {"qid": i, "img_name": f"{i % 4}.png", "question": "Is there a fracture?", "answer": "Yes"}
        | {"answer_type": "CLOSED", "q_lang": "en"}
        for i in range(8)
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def refusal(*arguments, **settings):
    with pytest.raises(UmedError) as caught:
        evaluate(*arguments, **settings)
    return str(caught.value)


def test_pictures_that_were_replaced_are_not_answered_by_the_old_answers(tmp_path):
    root, model = slake(tmp_path / "slake"), Says()
    evaluate(model, "slake", root, out=tmp_path / "out")
    evaluate(model, "slake", root, out=tmp_path / "out")
    assert model.asked == 8, "nothing has changed: nothing is asked again"
    Image.new("L", (30, 30), 9).save(root / "imgs/3.png")
    message = refusal(model, "slake", root, out=tmp_path / "out")
    assert "pictures: image files are others now (size or time of change)" in message and "texts" not in message


def test_a_slice_that_is_read_in_another_way_is_another_picture(tmp_path):
    from support.records import evaluated_records

    records = evaluated_records(tmp_path, 2)
    for window in ("full", "file", "full"):
        for record in records:
            record["reading"] = {"window": window}
        (tmp_path / "records.json").write_text(json.dumps(records))
        if window == "file":
            assert "pictures: image files" in refusal(Says(), tmp_path / "records.json", out=tmp_path / "out")
        else:
            evaluate(Says(), tmp_path / "records.json", out=tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_another_size_of_medmnist_is_another_file(tmp_path, short_bootstrap):
    root, model = tmp_path / "mnist", Says()
    root.mkdir()
    labels = np.arange(6)[:, None] % 2
    np.savez(root / "pneumoniamnist.npz", test_images=np.zeros((6, 28, 28), np.uint8), test_labels=labels)
    evaluate(model, "medmnist", root, out=tmp_path / "out")
    # The pictures that an evaluation writes itself may be removed: they are made of the same file again.
    shutil.rmtree(tmp_path / "out/data")
    evaluate(model, "medmnist", root, out=tmp_path / "out")
    assert model.asked == 6
    np.savez(root / "pneumoniamnist_224.npz", test_images=np.zeros((6, 224, 224), np.uint8), test_labels=labels)
    assert "pictures: image files are others now" in refusal(model, "medmnist", root, out=tmp_path / "out")
    assert model.asked == 6


def test_pictures_that_a_recipe_renders_count_by_content(tmp_path):
    """Several processes may render the same picture one after the other: its time says nothing."""
    from support.records import evaluated_records

    from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
    from umed_plugin.evaluation.what_was_asked import what_answers_depend_on

    (tmp_path / "data").mkdir()
    questions = record_questions(evaluated_records(tmp_path / "data", 1), tmp_path / "data")

    def pictures(out):
        return what_answers_depend_on(RECIPE, questions, {}, out)["questions"]["pictures"]

    inside, outside = pictures(tmp_path), pictures(tmp_path / "other")
    os.utime(questions[0].image, ns=(1, 1))
    assert pictures(tmp_path) == inside and pictures(tmp_path / "other") != outside
    Image.new("L", (30, 30), 9).save(questions[0].image)
    assert pictures(tmp_path) != inside


def test_a_refusal_says_which_limit_and_split_were_given(tmp_path):
    root = slake(tmp_path / "slake")
    evaluate(Says(), "slake", root, out=tmp_path / "out", limit=4)
    settings = json.loads((tmp_path / "out/settings.json").read_text())["questions"]
    assert {name: settings[name] for name in ("split", "limit", "count")} == {"split": "test", "limit": 4, "count": 4}
    message = refusal(Says(), "slake", root, out=tmp_path / "out")
    assert "other settings:\n  count: 4 there, 8 now\n  limit: 4 there, none now\nGive another --out" in message


def test_answers_that_an_earlier_version_kept_are_refused_in_words(tmp_path):
    root = slake(tmp_path / "slake")
    evaluate(Says(), "slake", root, out=tmp_path / "out")
    file = tmp_path / "out/settings.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "questions": "cfd5936fd4cb6a79"}))
    message = refusal(Says(), "slake", root, out=tmp_path / "out")
    assert "an earlier version of umed-plugin wrote them" in message and "cfd5" not in message


def test_a_tower_that_was_written_anew_is_another_checkpoint(tiny_mistral, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    checkpoint, root = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-tw"), rad(tmp_path / "rad", 2)
    config = json.loads((checkpoint / "config.json").read_text())
    config["mm_vision_tower"] = str(checkpoint / "vision_tower")
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(command(checkpoint, "vqa_rad", root, tmp_path / "out")) == 0
    file = checkpoint / "vision_tower/model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    capsys.readouterr()
    assert main(command(checkpoint, "vqa_rad", root, tmp_path / "out")) == 1
    assert "weights: files of the checkpoint, its base, its vision tower" in capsys.readouterr().err


def test_an_image_may_have_a_name_that_is_not_utf_8(tmp_path):
    name, root = os.fsdecode(b"caf\xe9.png"), tmp_path / "lm"
    root.mkdir()
    Image.new("L", (40, 50)).save(root / name)
    row = {"question_id": name, "image": name, "text": "Which organ?", "answer": "liver"}
    (root / "u.jsonl").write_text(json.dumps(row) + "\n")
    for _ in range(2):
        evaluation = evaluate(Says("liver"), root / "u.jsonl", out=tmp_path / "out")
        assert [prediction.image for prediction in evaluation.predictions] == [str(root / name)]
    assert Evaluation.load(tmp_path / "out") == evaluation
    assert json.loads((tmp_path / "out/llava_med/answers.jsonl").read_text())["question_id"] == name


def test_a_full_disk_is_named_with_the_file_of_answers(tmp_path):
    import resource

    root = slake(tmp_path / "slake")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            evaluate(Says("yes " * 2000), "slake", root, out=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "out/predictions.jsonl")
