"""Evaluations on disk: this version's files, those of earlier versions, and evaluations that an earlier version began.

`tests/support/old` holds small folders that the code of commit 6baa41d wrote, the last before ``schema`` 2.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.benchmark_files import mnist, omni
from support.benchmark_runs import command, lines, rad
from support.records import evaluated_records

from umed_plugin.cli import main
from umed_plugin.commands.report.page import write_report
from umed_plugin.data.records import FILE_NAME
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.asking import ask
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.benchmarks.recipe_cases import cases_of, headline
from umed_plugin.evaluation.evaluator import evaluate, evaluate_questions
from umed_plugin.evaluation.kept_answers import KeptAnswers
from umed_plugin.evaluation.results import Evaluation, compare, resampling_unit
from umed_plugin.evaluation.tables import unread_boxes_line
from umed_plugin.grounding.dialects import DIALECTS, LLAVA
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import Answerer, ModelAnswer
from umed_plugin.model.heat_map import decode_heat_map

pytestmark = pytest.mark.one_stack
OLD = Path(__file__).parents[1] / "support" / "old"
RIGHT = "A nodule at [0.10, 0.30, 0.40, 0.60]."


class Says:
    """A model that gives the same text to every question; what it looks at cannot be read."""

    template = "none"

    def __init__(self, text):
        self.text, self.examined = text, None

    def fingerprint(self):
        return {}

    def scorer(self, dialect=LLAVA):
        return Scorer(dialect=dialect)

    def answer(self, questions, examine=None):
        return [ModelAnswer(self.text, [], self.examined) for _ in questions]


def old_records(folder):
    """The records that the old folder was asked about: two sources, two patients, one record without, one negative."""
    made = evaluated_records(folder, 4)
    for record, source, patient in zip(made, ("deeplesion", "deeplesion", "tbx11k", "tbx11k"), ("p0", "p0", "p1", "")):
        record["source"], record["patient"] = source, patient
    made[3]["objects"] = {"ref": [], "bbox": [], "bbox_type": "real"}
    return made


def test_what_is_saved_is_loaded_and_every_metric_stands_there_once(tmp_path):
    model = Says(RIGHT)
    model.examined = {"vision_relevance": 0.25, "heat": None}
    made = evaluate_questions(model, RECIPE, record_questions(old_records(tmp_path), tmp_path))
    made.save(tmp_path / "out")
    assert Evaluation.load(tmp_path / "out") == made
    text = (tmp_path / "out" / "evaluation.json").read_text()
    content = json.loads(text)
    assert (content["schema"], content["benchmark"], content["n"], content["images"]) == (2, "recipe", 4, 4)
    assert content["resampling"] == {
        "unit": "patient, or image where no patient is known",
        "units": 3,
        "resamples": 2000,
    }
    best, measured = content.pop("constants"), json.dumps(content)
    assert measured.count('"accuracy"') == measured.count('"mean_iou"') == 1, (
        "one value and one interval of each metric"
    )
    assert set(best["mean_iou"]) == {"value", "answer"}
    accuracy = {"value": 0.75, "ci95": None, "n": 4, "units": 3, "interval": "too few"}
    assert content["metrics"]["accuracy"] == accuracy
    short = headline(made)
    assert (short["accuracy"], short["accuracy_ci95"], short["n"], short["n_with_lesion"]) == (0.75, None, 4, 3)
    assert short["intervals"]["accuracy"] == {"n": 4, "units": 3, "interval": "too few"}


def test_an_answer_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path):
    made = evaluate_questions(
        Says("Left.\u2028Right.\x85\x0c\nBelow."), RECIPE, record_questions(old_records(tmp_path))
    )
    made.save(tmp_path / "out")
    assert Evaluation.load(tmp_path / "out") == made
    (tmp_path / "out" / "predictions.jsonl").write_text("")
    with pytest.raises(UmedError, match=r"predictions.jsonl: holds no answers beside evaluation.json"):
        Evaluation.load(tmp_path / "out")


def test_the_resampling_unit_is_the_patient_where_it_is_known():
    assert resampling_unit(["a", "b"]) == "patient" and resampling_unit(["", ""]) == "image"
    assert resampling_unit(["a", ""]) == "patient, or image where no patient is known"


def test_the_name_of_a_file_is_no_patient(tmp_path):
    """Two volumes of one name in two folders, two slices of each: clusters are the volumes, and no one is called a patient."""
    made = evaluated_records(tmp_path, 4)
    for number, record in enumerate(made):
        record["patient"] = "1"
        record["provenance"] |= {"patient": FILE_NAME, "original": f"{'aabb'[number]}/1.nii.gz"}
    questions = record_questions(made)
    assert [question.cluster for question in questions] == ["test/a/1.nii.gz"] * 2 + ["test/b/1.nii.gz"] * 2
    assert resampling_unit([question.patient for question in questions]) == "image"
    del made[0]["provenance"]["patient"]  # as an earlier version wrote it
    assert record_questions(made)[0].cluster == "test/1"


def test_an_old_evaluation_of_a_recipe_is_read():
    """Its summary has two intervals of one accuracy. Both are from three patients, which are too few: they are computed anew."""
    old = Evaluation.load(OLD / "recipe")
    assert (old.benchmark, old.template, len(old.predictions)) == ("recipe", "umed_mistral", 4)
    summary = json.loads((OLD / "recipe" / "evaluation.json").read_text())
    assert summary["accuracy_ci95"] == [0.25, 1.0] and summary["figures"]["accuracy"]["ci95"] == [0.0, 1.0]
    old_values = {name: (entry["value"], entry["n"]) for name, entry in summary["figures"].items()}
    assert {name: (entry["value"], entry["n"]) for name, entry in old.metrics.items()} == old_values
    assert old.metrics["accuracy"] == {"value": 0.75, "ci95": None, "n": 4, "units": 3, "interval": "too few"}
    assert old.unit == "patient, or image where no patient is known"
    assert {name: headline(old)[name] for name in ("mean_iou", "vision_relevance", "n", "n_with_lesion")} == {
        "mean_iou": 0.5,
        "vision_relevance": 0.125,
        "n": 4,
        "n_with_lesion": 3,
    }
    first, *_, last = cases_of(old)
    assert (first.id, first.source, first.modality, first.set_iou) == ("r0", "deeplesion", "CT", 1.0)
    assert first.boxes == first.true_boxes == [[6.0, 8.0, 24.0, 26.0]] and last.vision_relevance is None
    assert decode_heat_map(first.heat).sum() == pytest.approx(1, abs=0.05)


def test_an_old_evaluation_of_a_named_benchmark_is_read():
    old = Evaluation.load(OLD / "vqa_rad")
    assert (old.benchmark, old.unit, len(old.predictions)) == ("vqa_rad", "image", 6)
    assert old.metrics == json.loads((OLD / "vqa_rad" / "evaluation.json").read_text())["figures"]
    assert old.metrics["closed_llava_med_batch"]["value"] == pytest.approx(2 / 3)


def test_the_first_version_of_a_recipe_s_lines_had_the_scores_alone(tmp_path):
    shutil.copytree(OLD / "recipe", tmp_path / "recipe")
    kept = ("id", "image", "question", "answer", "true_classes", "true_boxes", "boxes", "accuracy", "set_iou")
    rest = [{key: line[key] for key in (*kept, "vision_relevance")} for line in lines(OLD / "recipe/predictions.jsonl")]
    (tmp_path / "recipe/predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rest))
    first, newer = Evaluation.load(tmp_path / "recipe"), Evaluation.load(OLD / "recipe")
    for name in ("accuracy", "mean_iou", "acc_at_50", "vision_relevance"):
        assert first.metrics[name]["value"] == newer.metrics[name]["value"]
        assert first.metrics[name]["n"] == newer.metrics[name]["n"]
    assert first.unit == "image"


def test_a_new_evaluation_is_compared_with_an_old_one(tmp_path):
    new = evaluate_questions(Says(RIGHT), RECIPE, record_questions(old_records(tmp_path), tmp_path))
    differences = compare(OLD / "recipe", new)
    assert differences["mean_iou"]["difference"] == pytest.approx(0.5) and differences["mean_iou"]["n"] == 3
    assert differences["accuracy"]["difference"] == 0.0, "one more right, and a box on the study without a lesion"
    assert differences["vision_relevance"]["n"] == 0, "the new model's attention was not read"
    assert {"accuracy/deeplesion", "accuracy_average", "lesion_iou/large"} <= set(differences)


def test_the_command_compares_with_old_folders_of_both_kinds(tiny_mistral, tmp_path):
    more = ("--compare", OLD / "vqa_rad")
    assert main(command(tiny_mistral, "vqa_rad", rad(tmp_path / "rad"), tmp_path / "named", *more)) == 0
    (tmp_path / "records.json").write_text(json.dumps(old_records(tmp_path)))
    start = ["evaluate", str(tiny_mistral), "--benchmark", str(tmp_path / "records.json"), "--max-new-tokens", "4"]
    assert main([*start, "--out", str(tmp_path / "recipe"), "--compare", str(OLD / "recipe")]) == 0
    for name, metric in (("named", "open_recall"), ("recipe", "mean_iou")):
        old = Evaluation.load(OLD / ("vqa_rad" if name == "named" else name)).metrics[metric]["value"]
        new = Evaluation.load(tmp_path / name).metrics[metric]["value"]
        differences = json.loads((tmp_path / name / "comparison.json").read_text())["differences"]
        assert differences[metric]["difference"] == pytest.approx(new - old)


def test_the_report_of_old_folders_of_both_kinds(tmp_path):
    for name in ("recipe", "vqa_rad"):
        shutil.copytree(OLD / name, tmp_path / name / "evaluation" / "base")
    page = write_report(tmp_path / "recipe").read_text()
    assert "4 studies; 3 of the studies have a lesion" in page and "<b>0.750</b>" in page and page.count("r3") == 1
    page = write_report(tmp_path / "vqa_rad").read_text()
    assert "6 questions of vqa_rad" in page and "closed accuracy" in page and 'id="studies"' not in page


def half(folder, keep):
    """A folder as a killed run left it: some lines, no summary."""
    (folder / "evaluation.json").unlink(missing_ok=True)
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines(file)[:keep]))


def test_an_old_named_evaluation_that_was_killed_goes_on(tiny_mistral, tmp_path, monkeypatch):
    """Settings and lines of named benchmarks are those of before: nothing that is kept is asked again."""
    root, out = rad(tmp_path / "rad"), tmp_path / "out"
    start = command(tiny_mistral, "vqa_rad", root, out, "--batch-size", 2)
    assert main(start) == 0
    whole = {name: (out / name).read_text() for name in ("evaluation.json", "predictions.jsonl")}
    settings = json.loads((out / "settings.json").read_text())
    assert list(settings) == list(json.loads((OLD / "vqa_rad/settings.json").read_text()))
    half(out, 4)
    before = [
        {key: value for key, value in line.items() if key not in ("values", "cluster")}
        for line in lines(out / "predictions.jsonl")
    ]
    old_keys = set(lines(OLD / "vqa_rad/predictions.jsonl")[0]) - {"values", "cluster"}
    assert all(set(line) == old_keys for line in before)
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    asked, answer = [], Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, asks, *more: asked.append(len(asks)) or answer(self, asks, *more)
    )
    assert main(start) == 0
    assert asked == [2] and {name: (out / name).read_text() for name in whole} == whole


def test_an_old_evaluation_of_records_is_not_continued_but_left_as_it_is(tiny_mistral, tmp_path, capsys):
    out = shutil.copytree(OLD / "recipe", tmp_path / "out")
    half(out, 2)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (tmp_path / "records.json").write_text(json.dumps(old_records(tmp_path)))
    start = ["evaluate", str(tiny_mistral), "--benchmark", str(tmp_path / "records.json"), "--max-new-tokens", "6"]
    assert main([*start, "--out", str(out)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "an evaluation of records by an earlier version" in said
        and "Remove that folder to evaluate again; `umed evaluate` also takes another --out." in said
    )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_file_of_a_later_version_and_a_damaged_line_are_named(tmp_path):
    folder = shutil.copytree(OLD / "vqa_rad", tmp_path / "vqa_rad")
    summary = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**summary, "schema": 3}))
    with pytest.raises(UmedError, match=r"evaluation.json: schema 3; this version of umed-plugin reads up to 2"):
        Evaluation.load(folder)
    (folder / "evaluation.json").write_text(json.dumps(summary))
    first, *rest = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text(first)
    with pytest.raises(UmedError, match=f"holds 1 answers, and evaluation.json is of {summary['n']}"):
        Evaluation.load(folder)
    (folder / "predictions.jsonl").write_text(first * (1 + len(rest)))
    with pytest.raises(UmedError, match=r"predictions.jsonl:2: has the id '.*' a second time"):
        Evaluation.load(folder)
    for wrong in (float("nan"), float("inf")):
        values = {**json.loads(first)["values"], "closed_accuracy": wrong}
        line = json.dumps({**json.loads(first), "values": values}) + "\n"
        (folder / "predictions.jsonl").write_text("".join([line, *rest]))
        with pytest.raises(UmedError, match=rf"predictions.jsonl:1: values.closed_accuracy: found {wrong}. .*finite"):
            Evaluation.load(folder)
    (folder / "evaluation.json").write_text(json.dumps({**summary, "n": 1}))
    (folder / "predictions.jsonl").write_text('{"id": "0"}\n')
    with pytest.raises(UmedError, match=r"predictions.jsonl:1: has no answer, cluster, image"):
        Evaluation.load(folder)
    (folder / "predictions.jsonl").write_text("[]\n")
    with pytest.raises(UmedError, match=r"predictions.jsonl:1: holds a list; expected an object"):
        Evaluation.load(folder)
    (folder / "predictions.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(UmedError, match=r"predictions.jsonl:1: not JSON \(.*byte 0xff"):
        Evaluation.load(folder)


def test_a_benchmark_is_one_file_that_is_found_by_itself():
    from umed_plugin.evaluation import benchmarks
    from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS

    folder = Path(benchmarks.__file__).parent
    defined = [file.stem for file in folder.glob("*.py") if "\nBENCHMARK = Benchmark(" in file.read_text()]
    assert sorted(BENCHMARKS) == sorted(defined), "each is named as its file is"
    assert list(BENCHMARKS) == [
        "vqa_rad",
        "slake",
        "pmc_vqa",
        "medmnist",
        "omnimedvqa",
        "medvh",
        "med_grit",
        "llava_med",
    ]


def test_the_attention_pass_sees_the_answers_that_were_written(tiny_mistral, tmp_path):
    """What the hook is given fits together: a row of embeddings and an answer for each question, in their order."""
    shapes = []

    def look(answerer, questions, prompts, answers):
        shapes.append((len(questions), prompts.embeds.shape[0], answers.token_ids.shape[0], prompts.n_patches))
        texts = answerer.tokenizer.batch_decode(answers.answers(), skip_special_tokens=True)
        return [
            {"vision_relevance": 0.0, "heat": None, "id": q.id, "text": t.strip()} for q, t in zip(questions, texts)
        ]

    benchmark = dataclasses.replace(RECIPE, examine=look, max_new_tokens=6)
    made = evaluate_questions(tiny_mistral, benchmark, record_questions(old_records(tmp_path), tmp_path))
    assert shapes == [(4, 4, 4, 64)]
    assert [(p.examined["id"], p.examined["text"]) for p in made.predictions] == [
        (p.id, p.answer) for p in made.predictions
    ]
    assert np.unique([p.examined["id"] for p in made.predictions]).size == 4


def test_numbers_that_were_not_read_as_a_box_are_told():
    answers = ["At [0.1, 0.2, 0.3, 0.4] a nodule.", "Nodule (12, 20, 35, 40).", "At [0.1, 0.2\x1b[31m", "Normal."]
    line = unread_boxes_line(answers, LLAVA)
    assert line.startswith(
        "2 of 4 answers hold numbers that were not read as a box, e.g. '(12, 20, 35, 40)'; see --boxes."
    )
    assert unread_boxes_line(answers[:1], LLAVA) is None
    assert unread_boxes_line(answers[1:2], DIALECTS["qwen_vl"]) is None
    assert "\x1b" not in unread_boxes_line(answers[2:], LLAVA)


def test_kept_answers_that_were_damaged_are_named_before_anything_is_asked(tmp_path):
    questions = record_questions(old_records(tmp_path), tmp_path)

    def ask_with(line):
        kept = KeptAnswers(tmp_path / "out", "predictions.jsonl", {})
        kept.add([{"answer": RIGHT, "losses": [], **line, "id": question.id} for question in questions])
        return ask(RECIPE, questions, None, kept, batch_size=2)

    assert [answer.text for answer in ask_with({}).values()] == [RIGHT] * 4
    with pytest.raises(
        UmedError, match=r"predictions.jsonl is damaged(.|\n)*4 faults\n.*question 'r0': answer: found 7"
    ):
        ask_with({"answer": 7})
    (tmp_path / "out" / "predictions.jsonl").write_text("[1]\n")
    with pytest.raises(UmedError, match=r"predictions.jsonl: line 1 is not an object with the key 'id'"):
        KeptAnswers(tmp_path / "out", "predictions.jsonl", {})


class Rates(Says):
    """A model whose first option has this loss, and the others a usual one."""

    def __init__(self, loss):
        super().__init__("CT")
        self.loss = loss

    def answer(self, questions, examine=None):
        return [ModelAnswer(self.text, [self.loss, *[1.0] * (len(q.options) - 1)]) for q in questions]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "make", "first"), [("medmnist", mnist, "chestmnist/0/atelectasis"), ("omnimedvqa", omni, "ACRIMA/a")]
)
def test_likelihoods_that_are_not_finite_are_refused(name, make, first, loss, tmp_path, monkeypatch):
    """The lowest of [NaN, 1, .5] would be the first, which is the right option of some questions."""
    monkeypatch.setattr("umed_plugin.evaluation.metrics.metric.RESAMPLES", 2)
    root, out = make(tmp_path / "data"), tmp_path / "out"
    refused = (
        rf"question '{first}': its likelihoods are not finite \({loss}, 1\.0.*diverged.*--dtype bfloat16 or float32"
    )
    with pytest.raises(UmedError, match="Rates: " + refused):
        evaluate(Rates(loss), name, root, out=out)
    assert not lines(out / "predictions.jsonl"), "nothing of it is kept"
    evaluate(Rates(0.5), name, root, out=out)
    kept = lines(out / "predictions.jsonl")
    kept[0]["losses"][0] = loss
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    kept_first = kept[0]["id"]
    with pytest.raises(
        UmedError, match=rf"Rates, answers kept in .*predictions.jsonl: question '{kept_first}': its like"
    ):
        evaluate(Rates(0.5), name, root, out=out)
