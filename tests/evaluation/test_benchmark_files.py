"""What holds for the files of every benchmark: wrong and missing ones, the whole way once, and constant answers."""

from __future__ import annotations

import json

import pytest
from support.benchmark_files import closed, grit, medvh, mnist, omni, pmc, questions_of
from support.benchmark_runs import command, lines, metrics_of, picture

from umed_plugin.cli import main
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.constants import best_constants, constant_answers
from umed_plugin.evaluation.metrics.metric import Row, statistics
from umed_plugin.grounding.scoring import Scorer

pytestmark = pytest.mark.one_stack


def test_a_folder_without_the_files_is_named(tmp_path):
    for name in BENCHMARKS:
        with pytest.raises(UmedError, match="data-root|needs one"):
            questions_of(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file"), [("medvh", "multi_choices/test_a.json"), ("pmc_vqa", "test.csv"), ("llava_med", "test.jsonl")]
)
def test_a_pointer_in_place_of_a_file_is_told(tmp_path, name, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UmedError, match=r"is a Git LFS pointer and not the file itself\. Get it: git lfs pull"):
        questions_of(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("medvh", medvh, "multi_choices/test_more.json"),
        ("med_grit", grit, "more_VG_test.json"),
        ("omnimedvqa", omni, "QA_information/Open-access/Chest.json"),
        ("medmnist", mnist, "octmnist.npz"),
        ("pmc_vqa", None, "test.csv"),
        ("slake", None, "test.json"),
    ],
)
def test_a_file_that_is_not_fetched_is_told_and_the_others_are_not_taken_for_all(name, make, file, tmp_path):
    """git-annex and DataLad leave such links."""
    if make is not None:
        make(tmp_path)
        questions_of(name, tmp_path)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).symlink_to("../.git/annex/objects/x")
    with pytest.raises(UmedError, match=rf"{file}: is a link to .*annex/objects/x, which is not there. Fetch it"):
        questions_of(name, tmp_path)


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
    for constant in constant_answers(questions, benchmark).values():
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
