"""Which evaluations are compared: those of the same questions, checked before the checkpoint is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.benchmark_runs import picture
from support.records import evaluated_records

from umed_plugin import compare, evaluate
from umed_plugin.cli import main
from umed_plugin.commands.evaluate import _show
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion
from umed_plugin.evaluation.evaluation_run import Answerer
from umed_plugin.evaluation.pairing import Asked, check_questions
from umed_plugin.evaluation.questions import _unique
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.grounding.dialects import LLAVA
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

pytestmark = pytest.mark.one_stack


class Says:
    """In place of a checkpoint: always the same text; counts what it is asked."""

    template = "none"

    def __init__(self, text):
        self.text, self.asked = text, 0

    def fingerprint(self):
        return {}

    def scorer(self, dialect=LLAVA):
        return Scorer(dialect=dialect)

    def answer(self, questions, examine=None):
        self.asked += len(questions)
        return [ModelAnswer(self.text, []) for _ in questions]


def write_questions(file, question, truth, count=8):
    for number in range(4):
        picture(file.parent / f"{number}.png", seed=number)
    rows = [
        {"question_id": n, "image": f"{n % 4}.png", "text": f"{question} {n}", "answer": truth} for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("question", "truth", "said"),
    [
        ("Which modality?", "ct scan", r"question '0' is 'Which organ\? 0' in the earlier one and 'Which modality\? 0' in"),
        ("Which organ?", "lung", r"the reference of question '0' is 'liver' in the earlier one and 'lung' in the other"),
    ],
)  # fmt: skip
def test_other_questions_with_the_same_ids_are_refused_before_any_is_asked(question, truth, said, tmp_path):
    first = write_questions(tmp_path / "x.jsonl", "Which organ?", "liver")
    other = write_questions(tmp_path / "y.jsonl", question, truth)
    before = evaluate(Says("liver"), first, out=tmp_path / "x")
    evaluate(Says("no idea"), other, out=tmp_path / "y")
    with pytest.raises(UmedError, match=rf"not asked the same questions \(8 and 8 of them\)[^\0]*{said}"):
        compare(tmp_path / "x", tmp_path / "y")
    model = Says("no idea")
    with pytest.raises(UmedError, match=rf"comparison with Says: [^\0]*{said}"):
        evaluate(model, other, compare_with=before)
    assert model.asked == 0
    with pytest.raises(UmedError, match=r"question '7' is in one of them only"):
        evaluate(model, first, limit=7, compare_with=before)
    assert model.asked == 0 and evaluate(model, first, compare_with=before).predictions


def test_the_command_refuses_before_the_checkpoint_is_loaded(tiny_mistral, tmp_path, monkeypatch, capsys):
    evaluate(Says("liver"), write_questions(tmp_path / "x.jsonl", "Which organ?", "liver"), out=tmp_path / "x")
    other = write_questions(tmp_path / "y.jsonl", "Which modality?", "ct scan")
    monkeypatch.setattr(Answerer, "__init__", lambda *_: pytest.fail("the checkpoint was loaded"))
    command = ["evaluate", str(tiny_mistral), "--benchmark", str(other), "--compare", str(tmp_path / "x")]
    assert main(command) == 1
    assert "question '0' is 'Which organ? 0'" in " ".join(capsys.readouterr().err.split())


def test_the_command_compares_no_folder_with_itself(tmp_path, capsys):
    command = ["evaluate", "ckpt", "--benchmark", "slake", "--out", str(tmp_path / "x")]
    assert main([*command, "--compare", str(tmp_path / "y" / ".." / "x")]) == 2
    assert "compared with itself" in " ".join(capsys.readouterr().err.split())


def test_the_table_is_printed_also_if_the_comparison_is_refused(tmp_path, capsys):
    first, other = (write_questions(tmp_path / f"{name}.jsonl", name, "liver") for name in "xy")
    before, after = evaluate(Says("liver"), first), evaluate(Says("liver"), other)
    args = argparse.Namespace(checkpoint=Path("ckpt"), compare=Path("before"), out=None, similar=0)
    with pytest.raises(UmedError, match="not asked the same questions"):
        _show(args, after, before)
    assert "open_accuracy" in capsys.readouterr().out


def test_what_depends_on_the_checkpoint_is_no_other_question():
    """Boxes in its square, similar cases before the question, true boxes behind it; and what an old file does not hold."""
    plain = Asked("a", "A nodule at [0.10, 0.20, 0.30, 0.40].", "What is it?")
    for other in (
        replace(plain, truth="A nodule at [0.15, 0.20, 0.35, 0.40]."),
        replace(plain, truth=""),
        replace(plain, question="Similar studies, nearest first: nodule; no finding.\nWhat is it?"),
        replace(plain, question="What is it? The abnormal regions are at [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]."),
        replace(plain, question=None),
    ):
        check_questions([plain], [other])
        check_questions([other], [plain])
    for other in (replace(plain, truth="A cyst at [0.1, 0.2, 0.3, 0.4]."), replace(plain, question="Is it normal?")):
        with pytest.raises(UmedError, match="same questions"):
            check_questions([plain], [other])


def test_other_true_boxes_are_another_question(tmp_path):
    """The same ids and classes with another lesion: IoU would be compared against two truths."""
    boxed = Asked("a", "nodule", "What is it?", [[10, 20, 30, 40], [50, 60, 70, 80]])
    for same in (
        replace(boxed, boxes=[[50.2, 60, 70, 80], [10, 20, 30, 39.8]]),
        replace(boxed, boxes=None),
    ):
        check_questions([boxed], [same])
        check_questions([same], [boxed])
    for other in ([[10, 20, 30, 40], [50, 60, 70, 90]], [[10, 20, 30, 40]], [[10, 20, 30, 40]] * 2, []):
        with pytest.raises(UmedError, match=r"the true boxes of question 'a' are '\[10, 20, 30, 40\], \[50"):
            check_questions([boxed], [replace(boxed, boxes=other)])
    made = evaluated_records(tmp_path, 2)
    file = tmp_path / "records.json"
    file.write_text(json.dumps(made))
    before = evaluate(Says("Normal."), file)
    x1, y1, x2, y2 = made[1]["objects"]["bbox"][0]
    made[1]["objects"]["bbox"][0] = [x1, y1, x2, y2 - 3]
    file.write_text(json.dumps(made))
    model = Says("Normal.")
    with pytest.raises(UmedError, match="the true boxes of question"):
        evaluate(model, file, compare_with=before)
    assert model.asked == 0
    with pytest.raises(UmedError, match="the true boxes of question"):
        compare(before, evaluate(model, file))


def test_an_id_that_returns_gets_a_number_that_is_free():
    questions = [BenchmarkQuestion(name, "a.png", "?", "") for name in ("a", "a", "a#2", "a", "b")]
    assert [question.id for question in _unique(questions)] == ["a", "a#3", "a#2", "a#4", "b"]
    twice = [BenchmarkQuestion(name, "a.png", "?", "") for name in ("a", "a", "a")]
    assert [question.id for question in _unique(twice)] == ["a", "a#2", "a#3"]


def given_and_plain(folder):
    """The same three studies, of which the last has no lesion, without and with the true boxes in the question."""
    made = evaluated_records(folder, 3)
    made[2]["objects"] = {"ref": [], "bbox": [], "bbox_type": "real"}
    (folder / "records.json").write_text(json.dumps(made))
    file = folder / "records.json"
    evaluate(Says("Normal."), file, out=folder / "plain")
    evaluate(
        Says("A nodule."), file, out=folder / "given", give_box=True, compare_with=Evaluation.load(folder / "plain")
    )
    return folder / "plain", folder / "given"


def test_given_boxes_are_compared_with_the_same_studies_without(tmp_path):
    plain, given = given_and_plain(tmp_path)
    found = compare(plain, given)
    assert (found["accuracy"]["difference"], found["accuracy"]["n"]) == (1.0, 2), "of the studies with a lesion"
    assert all(name.startswith("accuracy") for name in found), "what both have"
    assert compare(given, plain)["accuracy"]["difference"] == -1.0


def test_the_command_compares_given_boxes_with_the_recipe(tiny_mistral, tmp_path, capsys):
    plain, _ = given_and_plain(tmp_path)
    command = ["evaluate", str(tiny_mistral), "--benchmark", str(tmp_path / "records.json"), "--max-new-tokens", "4"]
    assert main([*command, "--give-box", "--compare", str(plain)]) == 0
    assert "Differences are over the studies that both were asked" in capsys.readouterr().out
