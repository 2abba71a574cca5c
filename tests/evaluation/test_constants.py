"""What scores high without a look at the image, beside each metric."""

from __future__ import annotations

import json

from support.benchmark_runs import picture
from support.probing import Follows, studies, with_images

from umed_plugin.data.records import save_records
from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.benchmarks.probes import OF_RECIPE, probe_questions
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.constants import MOST, best_constants, constant_notes
from umed_plugin.evaluation.evaluator import evaluate
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.evaluation.tables import metrics_table
from umed_plugin.grounding.dialects import find_dialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.terminal.console import console


def best(name, questions):
    return best_constants(BENCHMARKS[name], questions, Scorer())


def choice(number, right, options=("CT", "MRI", "X-ray"), **groups):
    about = {"choices": list(options), "right": right}
    return BenchmarkQuestion(str(number), f"{number}.png", "What?", options[right], groups=groups, about=about)


def test_the_last_choice_is_found_where_it_is_always_right():
    listed = [("a", "b", "c", "d", "e")[: 3 + n % 3] for n in range(6)]
    questions = [choice(n, len(options) - 1, options, part="nota") for n, options in enumerate(listed)]
    found = best("medvh", questions)
    assert found["accuracy/nota"] == {"value": 1.0, "answer": "the last choice"}
    assert "says_last/nota" not in found, "it says what is answered, not how well"


def test_the_choice_that_is_most_often_right_is_found_wherever_it_stands():
    options = ("CT", "MRI", "X-ray")
    rotated = [[*options[n % 3 :], *options[: n % 3]] for n in range(9)]
    questions = [choice(n, order.index("MRI"), order, task="choice", part="choice") for n, order in enumerate(rotated)]
    assert best("pmc_vqa", questions)["choice_accuracy"] == {
        "value": 1.0,
        "answer": "the choice that is most often right",
    }


def test_likelihoods_of_a_constant_answer():
    """MedMNIST: the commonest class has its share as accuracy, and every constant an AUC of one half."""
    classes, part = ("normal", "pneumonia"), {"part": "pneumoniamnist"}
    questions = [
        BenchmarkQuestion(str(n), f"{n}.png", "What?", classes[n % 4 == 0], classes, groups=part, write=False)
        for n in range(8)
    ]
    found = best("medmnist", questions)
    assert found["acc/pneumoniamnist"] == {"value": 0.75, "answer": "the first choice"}
    assert found["auc/pneumoniamnist"]["value"] == 0.5


def test_who_reads_the_question_and_does_not_look_is_found_out():
    """The same question with the same answer about every image, in choices and in words; another one has no other image."""
    options = ["CT", "MRI", "X-ray"]
    questions = [
        BenchmarkQuestion(f"{word}{n}", f"{n}.png", f"What is {word}?", right, groups={"answer_type": "CLOSED"})
        for n in range(4)
        for word, right in (("one", "yes"), ("two", "no"), ("three", "yes"), ("four", "no"), ("five", "yes"))
    ]
    found = best("slake", [*questions, *open_closed(["no"], "CLOSED")])["closed_accuracy"]
    assert found["answer"] == "what the same question mostly has elsewhere" and found["value"] == 20 / 21
    turned = [[*options[n % 3 :], *options[: n % 3]] for n in range(12)]
    asked = [
        BenchmarkQuestion(
            f"{n}", f"{n}.png", f"Question {n % 3}", options[n % 3], groups={"part": "x", "task": "choice"},
            about={"choices": turned[(n // 3) % 3], "right": turned[(n // 3) % 3].index(options[n % 3])},
        )
        for n in range(12)
    ]  # fmt: skip
    assert best("medvh", asked)["accuracy/x"] == {"value": 1.0, "answer": "what the same question mostly has elsewhere"}


def open_closed(truths, kind):
    return [
        BenchmarkQuestion(f"{kind}{n}", f"{n}.png", "Q?", truth, groups={"answer_type": kind})
        for n, truth in enumerate(truths)
    ]


def test_llava_meds_numbers_and_lists_of_words():
    found = best(
        "slake", open_closed(["Yes", "No", "Yes", "no"], "CLOSED") + open_closed(["Left Lung", "heart"], "OPEN")
    )
    assert found["closed_llava_med"] == {"value": 1.0, "answer": '"Yes."'}
    assert found["closed_llava_med_batch"] == {"value": 1.0, "answer": '"Yes or no."'}
    assert found["closed_accuracy"]["value"] == 0.5
    assert found["open_recall"] == {"value": 1.0, "answer": "the 50 commonest words"}


def test_boxes_that_are_the_same_in_every_image():
    questions = record_questions(studies(30))
    found = best_constants(RECIPE, questions, Scorer())
    assert found["accuracy"]["value"] < 0.5 and 0 < found["mean_iou"]["value"] < 0.3
    assert "false_box_rate" not in found and "vision_relevance" not in found
    for dialect in ("qwen_vl", "coco"):
        other = best_constants(RECIPE, questions, Scorer(dialect=find_dialect(dialect)))
        assert other == found, "constants are ours: they have LLaVA's form, whatever form the checkpoint has"


def test_probes_have_no_answer_above_one_half():
    questions = probe_questions(record_questions(studies(60, weights=(9, 1, 1, 1))))
    found = best_constants(OF_RECIPE.benchmark, questions, Scorer())
    balanced = [value["value"] for name, value in found.items() if name.startswith("balanced")]
    assert len(balanced) == 5 and max(balanced) <= 0.5


def test_many_questions_are_a_sample_of_all_parts():
    questions = [choice(n, 0, part=f"p{n % 2}", task="choice") for n in range(MOST + 100)]
    found = best("medvh", questions)
    assert found["accuracy/p0"]["value"] == found["accuracy/p1"]["value"] == 1


def test_notes_name_what_says_little_and_what_is_not_beaten():
    metrics = {name: {"value": value} for name, value in (("a", 0.99), ("b", 0.4), ("c", 0.8), ("d", None))}
    constants = {
        name: {"value": value, "answer": "x"} for name, value in (("a", 1.0), ("b", 0.5), ("c", 0.6), ("d", 0.3))
    }
    high, beaten = constant_notes(metrics, constants)
    assert "say little: a (x: 1.000)." in high
    assert beaten == "No better than an answer that never looks at the image: b (x: 0.500)."
    assert constant_notes(metrics, {}) == []


def test_a_metric_that_ends_elsewhere_than_at_1_is_judged_by_its_own_limit():
    """CIDEr-D goes from 0 to 10: 1.2 is little, and 9.5 is much."""
    metrics = {"cider_d": {"value": 0.3}}
    (beaten,) = constant_notes(metrics, {"cider_d": {"value": 1.2, "answer": "x", "limit": 10.0}})
    assert beaten == "No better than an answer that never looks at the image: cider_d (x: 1.200)."
    (high,) = constant_notes(metrics, {"cider_d": {"value": 9.5, "answer": "x", "limit": 10.0}})
    assert "reaches 90 % of the highest value or more here" in high


def test_files_and_the_table_hold_it(tmp_path, capsys):
    rows = [
        {"qid": n, "img_name": f"{n}.png", "question": "Q?", "answer": "Yes", "answer_type": "CLOSED"} for n in range(6)
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    for n in range(6):
        picture(tmp_path / "imgs" / f"{n}.png", seed=n)
    evaluate(Follows(lambda text, image: "No."), "slake", tmp_path, out=tmp_path / "out")
    loaded = Evaluation.load(tmp_path / "out")
    assert loaded.constants["closed_accuracy"] == {"value": 1.0, "answer": '"Yes."'}
    console(wide_in_pipes=True).print(metrics_table("x", loaded.metrics, constants=loaded.constants))
    assert '1.000 "Yes."' in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    del summary["constants"]
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps(summary))
    assert Evaluation.load(tmp_path / "out").constants == {}, "earlier versions did not look"


def test_a_recipes_studies_by_file(tmp_path):
    records = with_images(tmp_path, studies(30))
    save_records(records, tmp_path / "records.json")
    evaluation = evaluate(Follows(lambda text, image: ""), str(tmp_path / "records.json"))
    negatives = sum(not record["objects"]["ref"] for record in records) / len(records)
    assert evaluation.constants["accuracy"]["value"] >= negatives
