"""Reports: BLEU, ROUGE-L and CIDEr-D against the COCO tools, R2Gen's treatment by hand, and the benchmark as a whole."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from PIL import Image

from umed_plugin import cli, compare, evaluate
from umed_plugin.commands.report.table import metrics_table
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.evaluation.benchmarks.report import read_scores, treatment_of
from umed_plugin.evaluation.metrics.captions import ORDERS, bleu, bleu_counts, rouge_l
from umed_plugin.evaluation.metrics.cider import DocumentFrequencies
from umed_plugin.evaluation.metrics.r2gen_text import R2GenTreatment, cleaned
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

pytestmark = pytest.mark.one_stack
WORDS = [
    *("the", "heart", "is", "normal", "in", "size", "lungs", "are", "clear", "no", "effusion", "pneumothorax"),
    *("small", "left", "right", "basal", "opacity", "mild", "edema", "seen"),
]
# pycocoevalcap 1.2 on the pairs below, their words joined by spaces: its wheel has 104 MB and is no dependency of a test.
COCO = {
    "bleu": [0.4483200042316856, 0.35770504690615373, 0.28741540175201413, 0.22507734061016207],
    "cider": 2.1356967611609297,
    "rouge": 0.49579415438410357,
    "cider_each": [1.7339881954230125, 1.5911011753615767, 1.5323640491564312, 2.5296230337602923, 2.600546271894247],
    "rouge_each": [
        0.45556385362210605,
        0.38946528332003194,
        0.4953596287703016,
        0.5830346475507765,
        0.5865384615384615,
    ],
}


def pairs(count=50, seed=0):
    """Made-up answers and references as words; answers are cut, and some words exchanged."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        wanted = [WORDS[int(rng.random() * len(WORDS))] for _ in range(3 + int(rng.random() * 25))]
        said = [word if rng.random() < 0.7 else WORDS[int(rng.random() * len(WORDS))] for word in wanted]
        made.append((said[: 1 + int(rng.random() * len(said))] + wanted[: int(rng.random() * 4)], wanted))
    return made


def test_bleu_rouge_and_cider_are_those_of_the_coco_tools():
    made = pairs()
    rows = [bleu_counts(*pair) for pair in made]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    assert [bleu(columns, order) for order in ORDERS] == pytest.approx(COCO["bleu"], abs=1e-6)
    rouge = [rouge_l(*pair) for pair in made]
    assert np.mean(rouge) == pytest.approx(COCO["rouge"], abs=1e-6)
    assert rouge[:5] == pytest.approx(COCO["rouge_each"], abs=1e-6)
    known = DocumentFrequencies(wanted for _, wanted in made)
    cider = [known.cider_d(*pair) for pair in made]
    assert np.mean(cider) == pytest.approx(COCO["cider"], abs=1e-6)
    assert cider[:5] == pytest.approx(COCO["cider_each"], abs=1e-6)


def test_cider_of_a_single_reference_is_0_and_of_an_empty_answer_too():
    alone = DocumentFrequencies([["no", "effusion"]])
    assert alone.cider_d(["no", "effusion"], ["no", "effusion"]) == 0 and not alone.weighs(["no", "effusion"])
    assert DocumentFrequencies([["no", "effusion"], ["clear"]]).weighs(["no", "effusion"])
    assert DocumentFrequencies([["a", "b"], ["c"]]).cider_d([], ["a", "b"]) == 0


def test_r2gens_treatment_by_hand():
    """A list, a hyphen, marks that are dropped, a rare word, and a long text."""
    text = '1. The heart is "normal" (mild).  2. No follow-up; 50% of XXXX..'
    assert cleaned(text) == ["the", "heart", "is", "normal", "mild", ".", "no", "follow-up", "50", "of", "xxxx", "."]
    training = ["The heart is normal."] * 3 + ["The aorta is normal."] * 2
    treatment = R2GenTreatment()
    vocabulary = treatment.vocabulary(training)
    assert vocabulary == {"the", "heart", "is", "normal", "."}
    assert treatment.reference("The aorta is normal.", vocabulary) == ["the", "<unk>", "is", "normal", "."]
    assert treatment.answer("The aorta is normal.") == ["the", "aorta", "is", "normal", "."]
    assert len(treatment.reference("heart " * 80, vocabulary)) == 59
    mimic = treatment_of("r2gen:10,100")
    assert mimic == R2GenTreatment(10, 100) and len(mimic.reference("heart " * 120, frozenset())) == 99
    for wrong in ("r2gen:10", "coco", "r2gen:1,0"):
        with pytest.raises(UsageError, match="allowed are r2gen"):
            treatment_of(wrong)


REPORTS = [
    ("train", "The heart is normal."),
    ("train", "The heart is normal."),
    ("train", "The heart is normal."),
    ("test", "The heart is normal. Small effusion."),
    ("test", "The lungs are clear. No nodule."),
    ("test", "A nodule lies in the left lung."),
]


def write_reports(folder):
    records = []
    for number, (split, text) in enumerate(REPORTS):
        Image.fromarray(np.full((40, 60), 20 * number, np.uint8)).save(folder / f"{number}.png")
        named = [name for name, found in (("effusion", "effusion"), ("nodule", "A nodule")) if found in text]
        records.append(
            {
                "id": f"r{number}",
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWrite the report of this study."},
                    {"from": "gpt", "value": text},
                ],
                "objects": {"ref": named, "bbox": [], "bbox_type": "real"},
                "image_size": [60, 40],
                "terms": {"effusion": ["effusion"], "nodule": ["nodule"]},
                "source": "drawn",
                "patient": str(number),
                "split": split,
                "answer_type": "report",
                "provenance": {"image_aspect_ratio": "pad"},
            }
        )
    (folder / "r.json").write_text(json.dumps(records))
    return folder / "r.json"


class Writes:
    """In place of a checkpoint: always the same report."""

    template = "none"

    def __init__(self, text="The heart is normal. Small effusion."):
        self.text = text

    def fingerprint(self):
        return {"text": self.text}

    def scorer(self, dialect=None):
        return Scorer()

    def answer(self, questions, examine=None):
        return [ModelAnswer(self.text, []) for _ in questions]


def values_of(evaluation):
    return {name: entry["value"] for name, entry in evaluation.metrics.items()}


def test_the_benchmark_scores_texts_and_named_findings(tmp_path):
    file = write_reports(tmp_path)
    evaluation = evaluate(Writes(), f"report:{file}", out=tmp_path / "out")
    values = values_of(evaluation)
    assert evaluation.benchmark == "report" and len(evaluation.predictions) == 3
    # One of three says what is there, and one of the two true findings is named.
    assert (values["findings_precision"], values["findings_recall"]) == pytest.approx((1 / 3, 1 / 2))
    assert values["findings_f1"] == pytest.approx(2 / 5)
    first = evaluation.predictions[0].values
    assert first["rouge_l"] == pytest.approx(1) and first["cider_d"] > 7
    # A draw keeps the document frequencies: each row's score is a column.
    assert values["cider_d"] == pytest.approx(np.mean([row.values["cider_d"] for row in evaluation.predictions]))
    other = evaluate(Writes("Clear."), f"report:{file}", out=tmp_path / "other")
    assert compare(tmp_path / "other", tmp_path / "out")["rouge_l"]["difference"] == pytest.approx(
        values["rouge_l"] - values_of(other)["rouge_l"]
    )
    # As the records of a recipe they are scored by the findings alone.
    plain = evaluate(Writes(), file)
    assert plain.metrics["accuracy"]["value"] == pytest.approx(1 / 3) and plain.metrics["mean_iou"]["n"] == 0
    assert plain.metrics["findings_f1"]["value"] == pytest.approx(2 / 5)


def test_r2gens_treatment_makes_rare_words_unknown(tmp_path):
    file = write_reports(tmp_path)
    treated = values_of(evaluate(Writes(), f"report:{file}", report_as="r2gen"))
    # "the heart is normal . small effusion ." against "the heart is normal . <unk> <unk> ." loses two words.
    plain = values_of(evaluate(Writes(), f"report:{file}"))
    assert treated["rouge_l"] != plain["rouge_l"]
    records = [record for record in json.loads(file.read_text()) if record["split"] == "test"]
    file.write_text(json.dumps(records))
    with pytest.raises(UmedError, match="--as r2gen: the vocabulary is made of the reports of the split train"):
        evaluate(Writes(), f"report:{file}", report_as="r2gen")
    for record in records:
        record |= {"answer_type": "negative", "objects": {"ref": [], "bbox": []}}
    file.write_text(json.dumps(records))
    with pytest.raises(UmedError, match="none of the 3 records of the split 'test' is a report"):
        evaluate(Writes(), f"report:{file}")


def test_scores_of_a_file_are_averaged_with_the_others(tmp_path):
    file, scores = write_reports(tmp_path), tmp_path / "s.csv"
    scores.write_text("id,bertscore,radgraph\nr3,0.5,1\nr4,0.7,0\nr5,0.9,0\nr9,1,1\n")
    evaluation = evaluate(Writes(), f"report:{file}", report_scores=scores)
    values = values_of(evaluation)
    assert values["file/bertscore"] == pytest.approx(0.7) and values["file/radgraph"] == pytest.approx(1 / 3)
    # They are of the model's own answers: one that never looks has none.
    assert evaluation.constants["cider_d"]["limit"] == 10 and "limit" not in evaluation.constants["rouge_l"]
    assert not any(name.startswith("file/") for name in evaluation.constants)
    scores.write_text("id,bertscore\nr3,high\nr4,nan\nr4,0.1\n")
    with pytest.raises(UmedError) as caught:
        read_scores(scores, ["r3", "r4", "r5"])
    text = str(caught.value)
    assert "s.csv:2: needs a finite number in each column; bertscore is 'high'" in text
    assert "s.csv:4: has the id 'r4' a second time" in text
    assert "has no row for 1 of 3 reports, such as 'r5'" in text
    scores.write_text("id,bertscore\nr3,0,85\nr4\n")
    with pytest.raises(UmedError) as caught:
        read_scores(scores, [])
    assert "s.csv:2: has 3 cells, and the header has 2. Write 0.85 and not 0,85" in str(caught.value)
    assert "s.csv:3: has 1 cells" in str(caught.value)
    for header in ("id,bertscore,bertscore", "id,bertscore,"):
        scores.write_text(f"{header}\nr3,0,85\n")
        with pytest.raises(UmedError, match="each needs a name of its own"):
            read_scores(scores, [])
    scores.write_text("name,bertscore\n")
    with pytest.raises(UmedError, match="needed: id"):
        read_scores(scores, [])


def test_flags_of_reports_are_refused_elsewhere(tmp_path, capsys):
    for flags in (["--as", "r2gen"], ["--scores", "s.csv"]):
        assert cli.main(["evaluate", str(tmp_path), "--benchmark", "mau", *flags]) == 2
        assert f"{flags[0]} has no effect without --benchmark report:RECIPE" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path), "--benchmark", "report:nothing"]) == 2
    assert "unknown recipe 'nothing'" in capsys.readouterr().err


def test_the_command_of_the_page(tmp_path, capsys, monkeypatch):
    """Scores are computed anew from the answers that an evaluation has kept, so the second command asks nothing."""
    file = write_reports(tmp_path)
    monkeypatch.setattr("umed_plugin.patches.prepare_llava", lambda: None)
    monkeypatch.setattr("umed_plugin.evaluation.evaluation_run._answerer", lambda *_: Writes())
    monkeypatch.setattr("umed_plugin.evaluation.evaluator._aspect_ratio", lambda *_: "pad")
    call = ["evaluate", str(tmp_path), "--benchmark", f"report:{file}", "--out", str(tmp_path / "out")]
    assert cli.main(call) == 0
    plain = capsys.readouterr().out
    assert cli.main([*call, "--as", "r2gen"]) == 0
    treated = capsys.readouterr().out
    for name in ("bleu_4", "cider_d", "findings_f1"):
        assert name in plain and name in treated
    assert plain != treated


def test_reports_that_were_treated_in_two_ways_are_not_compared(tmp_path):
    """The same answers, once as they are and once as R2Gen treats them: the difference would be the treatment's."""
    name = f"report:{write_reports(tmp_path)}"
    plain = evaluate(Writes(), name, out=tmp_path / "plain")
    treated = evaluate(Writes(), name, out=tmp_path / "r2gen", report_as="r2gen")
    assert json.loads((tmp_path / "r2gen" / "evaluation.json").read_text())["treatment"] == "r2gen:3,60"
    assert "treatment" not in json.loads((tmp_path / "plain" / "evaluation.json").read_text())
    said = r"scored with no --as in one evaluation and with --as r2gen:3,60 in the other"
    with pytest.raises(UmedError, match=said):
        compare(tmp_path / "plain", tmp_path / "r2gen")
    with pytest.raises(UmedError, match=said):
        evaluate(Writes(), name, report_as="r2gen", compare_with=plain)
    again = evaluate(Writes(), name, report_as="r2gen:3,60", compare_with=treated)
    assert compare(tmp_path / "r2gen", again)["bleu_1"]["difference"] == 0


def test_reports_are_not_called_studies_without_a_lesion(tmp_path):
    """A report that names an effusion has no box; how many studies have a lesion is not known."""
    file = write_reports(tmp_path)
    evaluation = evaluate(Writes(), file)
    table, _ = metrics_table({"base": evaluation})
    assert "lesion" not in table["about"] and table["about"].startswith("3 studies of 3 patients. Intervals")
    evaluation.metrics["mean_iou"]["n"] = 2
    assert "; 2 of the studies have a lesion with a box." in metrics_table({"base": evaluation})[0]["about"]
