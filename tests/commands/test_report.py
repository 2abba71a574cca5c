"""What is read from a run's folder, what the report's data says, and what is refused; the page itself: test_report_page.py."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.report_runs import HOSTILE, SHIFTS, change_predictions, make_records, write_log, write_run

from umed_plugin.cli import main
from umed_plugin.commands.report.about import about_run, about_training, other_settings
from umed_plugin.commands.report.before_after import at_even_ranks, write_before_after
from umed_plugin.commands.report.curves import charts_of
from umed_plugin.commands.report.gallery import candidate_cards, choose, looked_over_uniform, study_cards
from umed_plugin.commands.report.page import write_report
from umed_plugin.commands.report.pictures import as_augmented, see
from umed_plugin.commands.report.run_folder import Training, read_candidates, read_run
from umed_plugin.commands.report.runs_page import write_runs_page
from umed_plugin.commands.report.table import Looked, metrics_table
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe_cases import Case, cases_of
from umed_plugin.model.heat_map import decode_heat_map

pytestmark = pytest.mark.one_stack
PREDICTIONS = "evaluation/base/predictions.jsonl"
CANDIDATES = "runs/rewarded-llava-mistral/candidates.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, write_run(folder)


@pytest.fixture
def run(finished, tmp_path):
    """A copy to be changed; its images are those of the original."""
    return shutil.copytree(finished[0], tmp_path / "run")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def case(name: str, iou: float, accuracy: float = 1.0) -> Case:
    return Case(name, "", "", "", ["cyst"], [[0, 0, 1, 1]], [], accuracy, iou, 0.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"extra_sampling": 2}, "extra sampling 2"),
        ({"learnt_from": False}, "replaced by another question, not learnt from"),
        ({"extra_sampling": 1, "learnt_from": False}, "extra sampling 1, not learnt from"),
    ],
)
def test_a_card_says_what_dynamic_sampling_has_done_with_its_answers(fields, words, tmp_path):
    row = {"text": "none", "reward": 0.0, "localization": 0.0}
    line = {"step": 3, "id": "s", "true": {"ref": [], "bbox": []}, "candidates": [row], **fields}
    (tmp_path / "candidates.jsonl").write_text(json.dumps(line) + "\n")
    (card,) = candidate_cards(read_candidates(tmp_path / "candidates.jsonl"), tmp_path)
    assert card["sampling"] == words


def test_the_report_has_table_curves_studies_and_candidates(run):
    page = write_report(run).read_text()
    data = data_of(page)
    assert data["stages"] == ["base", "stage 1", "stage 2"]
    assert len(data["studies"]) == 16 and len(data["candidates"]) == 8
    assert all(card["picture"].startswith("data:image/webp;base64,") for card in data["studies"] + data["candidates"])
    for title in ("Mean IoU", "stage 2 − stage 1", "stage 2 − base", "reward/localization", "guard/box_area_ratio"):
        assert title in page, title
    assert page.count("6 of 11 points are above 1.5: boxes hedge by growing") == 2, (
        "at the chart, and beside the results"
    )
    assert page.index("boxes hedge by growing") < page.index('id="metric-mean_iou"') < page.index('id="curves"')
    assert 'class=""' in page[page.rindex("<details", 0, page.index("Hacking guards (1 warning)")) :][:40], (
        "never folded"
    )
    assert "reward/total, which the model learns by, cannot be added up" in page
    assert " × uniform</span>" in page and "uniform attention has 0." in page
    assert "share of answers with the most frequent wording" in page
    assert "of 4 patients;" in page and "This is one training run" in page
    drawn = sum("mean_iou" in one.values for one in read_run(run).evaluations["base"].predictions)
    assert f"base in 0 of {drawn}, stage 1 in {drawn} of {drawn}" in page
    assert data["candidates"][0]["terms"] == ["relevance", "localization"]
    assert data["candidates"][0]["rows"][2]["terms"] == [None, 0.0]
    summary = json.loads((run / "evaluation" / "rewarding" / "evaluation.json").read_text())
    assert f"<b>{summary['metrics']['mean_iou']['value']:.3f}</b>" in page


def tried(run, stage_2: str):
    """The run as `umed upgrade` with rewarding: auto leaves it."""
    shutil.copytree(run / "runs" / "rewarded-llava-mistral", run / "runs" / "trial-llava-mistral")
    (run / "run.yaml").write_text("rewarding: {run: auto}\n")
    decided = {"stage_2": stage_2, "because": ["their <b>mean</b> has not risen."], "trial": {}}
    if stage_2 == "left out":
        shutil.rmtree(run / "runs" / "rewarded-llava-mistral")
        shutil.rmtree(run / "evaluation" / "rewarding")
    (run / "summary.json").write_text(json.dumps({"rewarding_auto": decided}))
    return decided


def test_a_trial_is_shown_as_one_with_what_it_decided(run):
    tried(run, "left out")
    page, found = write_report(run).read_text(), read_run(run)
    assert "Trial of stage 2: trial-llava-mistral" in page and "Stage 2, rewarding" not in page
    told = "stage 2 was left out: their &lt;b&gt;mean&lt;/b&gt; has not risen."
    assert page.index(f"By its trial, {told}") < page.index('id="run"') and page.count(told) == 2
    assert [(one.stage, one.trial) for one in found.trainings] == [("instruction_tuning", False), ("rewarding", True)]
    assert "in the trial of stage 2, guard/box_area_ratio" in page and not data_of(page)["candidates"]
    # The curves of several runs are those of what made their results.
    other = shutil.copytree(run, run.with_name("other"))
    index = write_runs_page([run, other], run.parent / "reports.html").read_text()
    assert "guard/box_area_ratio" not in index and "reward/total" not in index and "loss" in index


def test_the_trial_comes_before_the_stage_that_it_tried(run):
    decided = tried(run, "started")
    found = read_run(run)
    assert [one.label for one in found.trainings] == ["stage 1", "trial of stage 2", "stage 2"]
    assert len(found.candidates) == 8, "those of stage 2 alone"
    assert dict(about_run(found))["rewarding: auto"].startswith("stage 2 was started: ")
    # A run that has not come to its end has no summary yet.
    (run / "summary.json").unlink()
    assert "rewarding: auto" not in dict(about_run(read_run(run)))
    (run / "trial").mkdir()
    (run / "trial" / "decision.json").write_text(json.dumps(decided))
    assert dict(about_run(read_run(run)))["rewarding: auto"].startswith("stage 2 was started: ")
    # A training of that name elsewhere is no trial.
    (run / "run.yaml").unlink()
    assert not any(one.trial for one in read_run(run).trainings)


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_boxes_lie_on_the_lesions_of_dicom_nifti_and_png_as_the_model_sees_them(tmp_path, mode):
    """Within each box, in the picture of the square, the pixels are brighter or darker than around it."""
    records = make_records(tmp_path, 24, mode)
    assert {record["image"].rsplit(".", 1)[-1] for record in records} == {"dcm", "gz", "png"}
    compared = 0
    for record in records:
        seen = see(record["image"], mode, record.get("reading"), tmp_path)
        grey, side = np.asarray(seen.square.convert("L")).astype(float), seen.square.width
        boxes = seen.boxes01(record["objects"]["bbox"])
        for name, (x1, y1, x2, y2) in zip(record["objects"]["ref"], boxes) if len(boxes) == 1 else ():
            left, top, right, bottom = (round(value * side) for value in (x1, y1, x2, y2))
            inside = grey[top + 3 : bottom - 3, left + 3 : right - 3].mean()
            around = np.concatenate(
                [grey[max(top - 4, 0) : top - 1, left:right].ravel(), grey[bottom + 1 : bottom + 4, left:right].ravel()]
            )
            assert (inside < around.mean() - 15) if name == "cyst" else (inside > around.mean() + 15), record["id"]
            compared += 1
    assert compared > 10


def test_what_is_hostile_stays_text_in_the_file(run):
    def change(_number, line):
        line.update(answer=HOSTILE, id=HOSTILE + line["id"], groups={"source": HOSTILE})

    for stage in ("base", "instruction_tuning", "rewarding"):
        change_predictions(run, stage, change)
    write_log(run / "runs" / "tuned-llava-mistral", "instruction_tuning", [{f"{HOSTILE}$x$": 1.0, "loss": 1.0}] * 2)
    page = write_report(run.rename(run.with_name("<img src=x onerror=alert(1)>"))).read_text()
    assert len(re.findall("<script", page)) == 2 and "<img" not in page and "<b>bold" not in page
    assert data_of(page)["studies"][0]["answers"][0]["text"] == HOSTILE


def test_too_many_studies_are_chosen_by_gain_by_failure_and_evenly(run):
    studies = [[case(f"s{i}", 0.0), case(f"s{i}", i / 100, accuracy=float(i % 2))] for i in range(100)]
    chosen = [int(cases[0].id[1:]) for cases in choose(studies, 30)]
    assert len(set(chosen)) == 30
    assert set(range(90, 100)) <= set(chosen) and set(range(10)) <= set(chosen)
    assert len([i for i in chosen if 10 <= i < 50]) == len([i for i in chosen if 50 <= i < 90]) == 5
    page = write_report(run, most_studies=6).read_text()
    assert len(data_of(page)["studies"]) == 6 and "6 of the 16 studies" in page


def test_a_run_that_is_not_finished_shows_what_there_is(run):
    shutil.rmtree(run / "evaluation" / "rewarding")
    (run / "evaluation" / "rewarding").mkdir()
    (run / "evaluation" / "rewarding" / "predictions.jsonl").write_text('{"id": "begun"')
    rewarded = run / "runs" / "rewarded-llava-mistral"
    with open(rewarded / "candidates.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 90, "id": "\xe4')
    with open(rewarded / "candidates.jsonl", "r+b") as stream:
        stream.truncate((rewarded / "candidates.jsonl").stat().st_size - 1)  # inside a letter of two bytes
    state = json.loads((rewarded / "trainer_state.json").read_text())
    (rewarded / "trainer_state.json").unlink()
    for step in (20, 100):
        kept = {**state, "global_step": step, "max_steps": 200, "log_history": state["log_history"][: step // 10]}
        (rewarded / f"checkpoint-{step}").mkdir()
        (rewarded / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(kept))
    page = write_report(run).read_text()
    assert "100 of 200 steps: not finished" in page
    assert data_of(page)["stages"] == ["base", "stage 1"] and len(data_of(page)["candidates"]) == 8


def test_the_folder_of_one_training_gives_its_curves(run):
    page = write_report(run / "runs" / "tuned-llava-mistral").read_text()
    assert "Stage 1, instruction tuning: tuned-llava-mistral" in page and page.count("<svg") == 2
    assert data_of(page)["studies"] == [] and 'id="results"' not in page


def test_metrics_that_are_not_numbers_are_gaps(run):
    log = [{"step": 1, "loss": math.inf, "kl": 0.1}, {"step": 2, "loss": 2.0, "kl": 0.2}, {"step": 3, "loss": math.nan}]
    groups = charts_of(Training("t", None, log, 3, 3))
    assert list(groups) == ["Loss", "KL and policy"]
    assert groups["KL and policy"][0].summary == "0.1 at step 1, 0.2 at step 2"
    write_log(run / "runs/tuned-llava-mistral", "instruction_tuning", [{"grad_norm": 0.0, "loss": 1.0}] * 3)
    assert (
        "0 throughout: grad_norm." in (page := write_report(run).read_text()) and 'aria-label="grad_norm"' not in page
    )
    folder = run / "runs" / "rewarded-llava-mistral"
    line = json.loads((folder / "candidates.jsonl").read_text().splitlines()[0])
    line["candidates"][0]["relevance"] = math.nan
    (folder / "candidates.jsonl").write_text(json.dumps(line) + "\n")
    assert data_of(write_report(run).read_text())["candidates"][0]["rows"][0]["terms"][0] is None


def test_an_image_that_is_gone_or_damaged_is_said_on_its_card(run, tmp_path):
    def change(number, line):
        line["image"] = [line["image"], str(tmp_path / "gone.png"), str(tmp_path / "bad.png")][min(number, 2)]
        line["reading"] = None if number else line["reading"]

    (tmp_path / "bad.png").write_bytes(b"no picture")
    for stage in ("base", "instruction_tuning", "rewarding"):
        change_predictions(run, stage, change)
    first, gone, bad, *_ = data_of(write_report(run).read_text())["studies"]
    assert first["picture"] and not gone["picture"] and not bad["picture"]
    assert "gone.png: no such image file" in gone["fault"] and "bad.png: cannot be read" in bad["fault"]


def test_images_of_a_run_that_was_moved_are_found(finished, tmp_path):
    moved = shutil.copytree(finished[0], tmp_path / "elsewhere" / "run")
    change_predictions(
        moved, "base", lambda _n, line: line.update(image=line["image"].replace(str(finished[0]), "/was/here/run"))
    )
    assert all(card["picture"] for card in data_of(write_report(moved).read_text())["studies"])


def test_stages_that_were_asked_other_studies_are_not_compared(run):
    change_predictions(run, "rewarding", lambda number, line: line.update(id=f"other-{number}"))
    page = write_report(run).read_text()
    assert "were not asked the same questions" in page and "stage 1 − base" in page
    assert "stage 2 − stage 1" not in page
    assert [answer is None for answer in data_of(page)["studies"][0]["answers"]] == [False, False, True]


def test_the_table_shows_metrics_of_benchmarks_too_and_marks_clear_differences(run):
    for stage in SHIFTS:  # the run's own four patients are too few for an interval
        change_predictions(run, stage, lambda number, line: line.update(cluster=f"p{number // 2}"))
    evaluations = read_run(run).evaluations
    evaluations["rewarding"].metrics["open_recall"] = {"value": 0.25, "ci95": [0.125, 0.5], "n": 8}
    table, notes = metrics_table(evaluations)
    assert notes == [] and table["heads"][-1] == "stage 2 − base"
    by_title = {row["title"]: row["cells"] for row in table["rows"] + table["more"]}
    assert len(table["rows"]) == 4 and len(by_title) == 4 + len(table["more"])
    assert [cell["value"] for cell in by_title["open recall"]][:3] == ["–", "–", "0.250"]
    assert "n = 8" in next(row["about"] for row in table["more"] if row["title"] == "open recall")
    assert by_title["false box rate"][0]["value"] == "0.000" and by_title["false box rate"][-1]["value"] == "+0.000"
    assert [cell["verdict"] for cell in by_title["Mean IoU"][:2]] == ["exact; no box drawn", ""]
    assert by_title["Vision relevance"][0]["verdict"] == "", (
        "the gallery, which knows how much is covered, was not asked"
    )
    assert any('"exact"' in note for note in table["notes"])
    assert any("except for false box rate, false boxes per negative, unread boxes" in note for note in table["notes"])
    assert "lesion IoU, large" in table["without_rows"] and "lesion IoU, large" not in by_title
    clear = by_title["Mean IoU"][-1]
    assert clear["trend"] == "up" and clear["value"].startswith("▲ +") and clear["verdict"] == "better"
    assert by_title["Accuracy"][-1]["trend"] == "", "equal answers have no trend"


def test_stages_of_other_numbers_of_studies_say_each_number(run):
    file = run / PREDICTIONS
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:5]))
    summary = json.loads((file.parent / "evaluation.json").read_text())
    summary["n"] = summary["metrics"]["accuracy"]["n"] = 5
    (file.parent / "evaluation.json").write_text(json.dumps(summary))
    table, _ = metrics_table(read_run(run).evaluations)
    accuracy, iou = (
        next(row["about"] for row in table["rows"] if row["id"] == name) for name in ("accuracy", "mean_iou")
    )
    assert accuracy.endswith("; n = 5, 16, 16") and re.search(r"; n = \d+$", iou)
    assert "The stages were not asked alike: base 5, stage 1 16, stage 2 16." in table["about"]


def test_what_was_run_is_told(run):
    settings = {"model_name_or_path": {"path": "/ckpt", "sha256": "0123456789abcdef"}, "seed": 7, "learning_rate": 2e-4}
    settings |= {"umed_recipe": "brain_tumor_coco", "umed_algorithm": "grpo", "umed_rewards": "relevance,localization"}
    settings |= {"umed_reward_weights": "4,2", "adam_beta1": 0.9, "lora_r": 64, "lora_enable": False}
    settings |= {"accelerator_config": "'AcceleratorConfig'"}
    made = {"at": "2026-11-28T20:00:00+00:00", "machine": "node7", "commit": "abc", "versions": {"torch": "2.0.1"}}
    for name, stage in (("tuned", "instruction_tuning"), ("rewarded", "rewarding")):
        content = {"umed_stage": stage, "settings": settings, "made_with": made}
        (run / f"runs/{name}-llava-mistral/umed.json").write_text(json.dumps(content))
    (run / "summary.json").write_text(json.dumps({"seed": 3, "seconds": 3700.0}))
    write_log(run / "runs/captions-llava-mistral", None, [{"loss": 1.0}])
    (run / "logs").mkdir()
    (run / "logs/captions.log").write_text(
        "python -m x --output_dir /out --seed 5 --max_steps -1 --data_path c.json\n--seed 6\n"
    )
    captions, *trainings = read_run(run).trainings
    assert dict(about_training(captions)) == {"records": "c.json", "seed": "5", "duration of its last start": "9 s"}
    read = replace(read_run(run), trainings=trainings)
    facts = dict(about_run(read))
    assert facts["started from"] == "/ckpt (sha256 0123456789ab)" and facts["recipe"] == "brain_tumor_coco"
    assert facts["sources of the studies"] == "demo_studies"
    assert facts["stage 2 last started, ended"] == "2026-11-28 19:59 UTC, 2026-11-28 20:00 UTC"
    assert "(exported from rewarded-llava-mistral, which stage 2 trained)" in facts["evaluated as stage 2"]
    assert (facts["seed"], facts["duration"], facts["machine"]) == ("3", "1 h 01 min", "node7")
    assert (facts["commit"], facts["versions"]) == ("abc", "torch 2.0.1")
    of_stage_2 = dict(about_training(read.trainings[1]))
    assert of_stage_2["weights of the rewards"] == "4,2" and of_stage_2["duration of its last start"] == "9 s"
    assert "LoRA rank" not in of_stage_2 and dict(other_settings(read.trainings[1]))["adam_beta1"] == "0.9"
    of_stage_1 = dict(other_settings(read.trainings[0]))
    assert "adam_beta1" in of_stage_1, "and no flags of rewarding, no settings without content"
    assert not {"umed_rewards", "umed_reward_weights", "lora_r", "accelerator_config"} & of_stage_1.keys()
    page = write_report(run).read_text()
    assert "loss is near 0 in every step" in page and page.index(">Rewards<") < page.index("GRPO&#39;s loss")


def test_several_runs_get_an_index_of_their_reports(run, finished, tmp_path, capsys):
    index = tmp_path / "index.html"
    assert main(["report", str(run), str(finished[0]), "--index", str(index)]) == 0
    assert str(index) in capsys.readouterr().out
    page = index.read_text()
    links = re.findall(r'<th scope="row">.*?<a href="([^"]+)">', page)
    assert [(tmp_path / link).resolve() for link in links] == [folder / "report.html" for folder in (run, finished[0])]
    assert all((tmp_path / link).is_file() for link in links)
    assert 'aria-label="reward/total"' in page and "stroke: var(--run-1)" in page and "guard/" not in page
    low, high = read_run(run).evaluations["rewarding"].metrics["accuracy"]["ci95"] or (None, None)
    assert ("no interval" if low is None else f"{low:.3f} to {high:.3f}") in page
    assert main(["report", str(run), str(run)]) == 2
    assert main(["report", str(run), str(finished[0]), "--picture", "x.png"]) == 2


def test_a_run_without_a_training_takes_no_other_runs_colour(run, finished, tmp_path):
    """Its row has the first colour, so the curves of the two behind it have the second and the third."""
    evaluated, other = tmp_path / "only #1", tmp_path / "other"
    shutil.copytree(finished[0] / "evaluation", evaluated / "evaluation")
    shutil.copytree(run, other)
    runs = [read_run(folder) for folder in (evaluated, run, other)]
    assert not runs[0].trainings
    page = write_runs_page([one.folder for one in runs], tmp_path / "index.html").read_text()
    curves = page[page.index('aria-label="reward/total"') :]
    assert "var(--run-1)" in curves and "var(--run-2)" in curves and "stroke: var(--run-0)" not in curves
    assert 'href="only%20%231/report.html"' in page


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: (run / "evaluation/base/evaluation.json").write_text("{"), "evaluation.json: is not JSON"),
        (lambda run: (run / PREDICTIONS).write_text('{"id": "a"}\n'), "predictions.jsonl:1: has no answer, cluster"),
        (lambda run: (run / PREDICTIONS).unlink(), "no finished evaluation"),
        (lambda run: (run / "runs/tuned-llava-mistral/trainer_state.json").write_text("[]"), "holds a list"),
        (lambda run: (run / CANDIDATES).write_text("{\n{}\n"), "candidates.jsonl:1: is not JSON"),
        (lambda run: (run / CANDIDATES).write_bytes(b'{"id": "\xff"}\n'), "candidates.jsonl:1: .*can't decode byte 0xff"),
        (lambda run: (run / CANDIDATES).write_text("[" * 100_000 + "\n"), r"candidates.jsonl:1: .*nested too deeply"),
        (lambda run: (run / PREDICTIONS).write_text("[" * 100_000 + "\n"), r"predictions.jsonl:1: .*nested too deeply"),
        (lambda run: (run / "summary.json").write_text('{"seconds": "x"}'), "summary.json: seconds: found 'x'"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_the_old_report_stays(run, break_it, said):
    (run / "report.html").write_text("old")
    break_it(run)
    with pytest.raises(UmedError, match=said):
        write_report(run)
    assert (run / "report.html").read_text() == "old"


def put(file, line, *keys, value):
    """Set one value of a JSON file, or of a line of a JSONL file, and write it back."""
    texts = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    texts[line - 1] = json.dumps(changed(json.loads(texts[line - 1]), keys, value))
    file.write_text("\n".join(texts) + "\n")


def changed(content, keys, value):
    """The content with one value set; REMOVED takes the key away."""
    if not keys:
        return value
    content = content.copy()
    if value is REMOVED and len(keys) == 1:
        del content[keys[0]]
    else:
        content[keys[0]] = changed(content[keys[0]] if len(keys) > 1 else None, keys[1:], value)
    return content


REMOVED = object()
STATE, SUMMARY = "runs/rewarded-llava-mistral/trainer_state.json", "evaluation/base/evaluation.json"
FLAGS = "runs/rewarded-llava-mistral/umed.json"


@pytest.mark.parametrize(
    ("file", "line", "keys", "value", "said"),
    [
        (PREDICTIONS, 2, ("values", "accuracy"), "1", "predictions.jsonl:2: values.accuracy: found '1'"),
        (PREDICTIONS, 2, ("values", "accuracy"), REMOVED, "predictions.jsonl:2: values: has no accuracy"),
        (PREDICTIONS, 3, ("boxes",), REMOVED, "predictions.jsonl:3: boxes: missing"),
        (PREDICTIONS, 3, ("true_boxes",), [[1, 2, 3]], r"predictions.jsonl:3: true_boxes.0: .*at least 4"),
        (PREDICTIONS, 1, ("groups",), {}, "predictions.jsonl:1: groups: has no source"),
        (PREDICTIONS, 1, ("groups",), REMOVED, "predictions.jsonl:1: groups: missing"),
        (PREDICTIONS, 1, ("examined",), 1, "predictions.jsonl:1: examined: found int"),
        (PREDICTIONS, 1, ("id",), [[]], "predictions.jsonl:1: id: found list"),
        (PREDICTIONS, 1, ("image_aspect_ratio",), "x", "predictions.jsonl:1: image_aspect_ratio: found 'x'"),
        (SUMMARY, 1, ("metrics", "mean_iou"), REMOVED, "evaluation.json: metrics: has no mean_iou"),
        (SUMMARY, 1, ("metrics", "mean_iou", "ci95"), [1], "evaluation.json: metrics.mean_iou.ci95: .*at least 2"),
        (SUMMARY, 1, ("checkpoint",), None, "evaluation.json: checkpoint: found None"),
        (SUMMARY, 1, ("benchmark",), ["x"], "evaluation.json: benchmark: found list"),
        (STATE, 1, ("global_step",), [1], "trainer_state.json: global_step: found list"),
        (STATE, 1, ("log_history", 3), 7, "trainer_state.json: log_history.3: found int"),
        (STATE, 1, ("log_history", 3, "kl"), "x", "trainer_state.json: log_history: row 3 has kl = 'x'"),
        (STATE, 1, ("log_history", 3, "step"), None, "trainer_state.json: log_history: row 3 has step = None"),
        (STATE, 1, ("log_history", 11, "train_runtime"), "x", "row 11 has train_runtime = 'x'"),
        (FLAGS, 1, ("umed_stage",), [1], "umed.json: umed_stage: found list"),
        (FLAGS, 1, ("settings",), {"max_steps": "4"}, "umed.json: settings.max_steps: found '4'"),
        (FLAGS, 1, ("made_with",), {"versions": [1]}, "umed.json: made_with.versions: found list"),
        (CANDIDATES, 2, (), [1], "candidates.jsonl:2: holds a list; expected an object"),
        (CANDIDATES, 2, ("true", "bbox"), REMOVED, "candidates.jsonl:2: true.bbox: missing"),
        (CANDIDATES, 2, ("candidates",), [], "candidates.jsonl:2: candidates: .*at least 1"),
        (CANDIDATES, 2, ("candidates", 1), 5, "candidates.jsonl:2: candidates.1: found int"),
        (CANDIDATES, 2, ("candidates", 1, "relevance"), "x", "candidates.jsonl:2: candidates.1.relevance: found 'x'"),
        (CANDIDATES, 2, ("candidates", 1, "relevance"), REMOVED, "candidates.jsonl:2: candidates: differ in their"),
        (CANDIDATES, 2, ("study",), None, "candidates.jsonl:2: study: found NoneType"),
        (CANDIDATES, 2, ("study", "image_aspect_ratio"), None, "candidates.jsonl:2: study: names an image, but no"),
        (CANDIDATES, 2, ("study", "augmented"), {"zoom": []}, "candidates.jsonl:2: study.augmented: is not a mov"),
        (CANDIDATES, 2, ("normalised",), {"relevance": [1.0]}, "2: normalised: holds 1 values of relevance for 3"),
    ],
)  # fmt: skip
def test_a_damaged_value_is_named_with_file_line_and_key(run, file, line, keys, value, said):
    put(run / file, line, *keys, value=value)
    with pytest.raises(UmedError, match=rf"{Path(file).name} is damaged \(remedy: (.|\n)*{said}"):
        read_run(run)


def test_all_damaged_lines_of_a_file_are_named_up_to_25(run):
    change_predictions(run, "base", lambda _number, line: line.update(truth=1, answer=2))
    with pytest.raises(UmedError, match=r"32 faults\n(.|\n)*predictions.jsonl:12: (.|\n)*\.\.\. and 7 more"):
        read_run(run)


def test_what_a_later_version_adds_and_text_in_the_log_are_no_faults(run):
    change_predictions(run, "base", lambda _number, line: line.update(new={"a": 1}))
    put(run / CANDIDATES, 1, "study", "reading", value={"unknown": 1})
    put(run / STATE, 1, "log_history", 3, "note", value="a callback's text")
    put(run / SUMMARY, 1, "metrics", "mean_iou", "value", value=math.inf)
    data = data_of(write_report(run).read_text())
    assert (
        "cannot be read as an image" in data["candidates"][0]["fault"] and "unknown" in data["candidates"][0]["fault"]
    )
    assert data["metrics"]["stages"]["base"]["mean_iou"]["value"] is None


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 1 and "there is no such folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1 and "holds nothing to report" in capsys.readouterr().err


def test_the_command_writes_report_and_picture(run, tmp_path, capsys):
    picture = tmp_path / "docs" / "before_after.png"
    assert main(["report", str(run), "--studies", "5", "--picture", str(picture)]) == 0
    written = capsys.readouterr().out
    assert f"written: {run / 'report.html'}" in written and f"written: {picture}" in written
    assert len(data_of((run / "report.html").read_text())["studies"]) == 5
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert picture.stat().st_size < 300_000 and pixels.shape[1] > 1200
    assert pixels.shape[0] > 850, "a row for the base and one for each stage"
    for colour in ((240, 228, 66), (255, 122, 51)):
        assert (np.abs(pixels - colour).sum(axis=2) < 30).sum() > 500, "the boxes of truth and answers are drawn"


def test_the_picture_takes_studies_at_even_ranks_and_needs_two_stages(run):
    after = [case(f"s{i}", i / 10) for i in range(10)]
    before, between = ([case(f"s{i}", iou) for i in range(10)] for iou in (0.0, 0.05))
    studies = at_even_ranks([before, between, after], 5)
    assert [[one.set_iou for one in study] for study in studies] == [
        [0.0, 0.05, last] for last in (0.8, 0.6, 0.4, 0.2, 0.0)
    ]
    assert all(len({one.id for one in study}) == 1 for study in studies)
    assert len(at_even_ranks([after, after[:3]], 6)) == 3
    assert at_even_ranks([after[:3], after[5:]], 6) == []
    for stage in ("base", "instruction_tuning"):
        shutil.rmtree(run / "evaluation" / stage)
    with pytest.raises(UmedError, match="need two evaluations in evaluation/; found: rewarding"):
        write_before_after(run, run / "picture.png")


def test_heat_is_what_was_put_in(finished):
    evaluation = read_run(finished[0]).evaluations["rewarding"]
    found = next(one for one in cases_of(evaluation) if one.heat is not None)
    shares = decode_heat_map(found.heat)
    assert shares.shape == (8, 8) and shares.sum() == pytest.approx(1, abs=0.05)
    with pytest.raises(UmedError, match="64 values for a grid of 4 x 4"):
        decode_heat_map({**found.heat, "grid": [4, 4]})


@pytest.mark.llava
def test_a_study_of_an_augmented_run_is_shown_as_it_was_moved(run):
    from umed_plugin.data.augmentation.study import Study
    from umed_plugin.grounding.square_move import SquareMove, clipped

    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[10:20, 6:18] = 255
    Image.fromarray(pixels).save(run / "moved.png")
    move = SquareMove(left_right=True, zoom=1.25, shift=(0.05, 0.0))
    seen = as_augmented(see(str(run / "moved.png"), "pad", None, run), Study({}, move).as_json())
    rows, columns = np.nonzero(np.asarray(seen.square)[..., 0] > 127)
    extent = [value / 60 for value in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
    assert extent == pytest.approx(clipped(move.boxes([(6 / 60, 20 / 60, 18 / 60, 30 / 60)])[0]), abs=1 / 60)
    # The page draws the picture and the boxes of the same movement.
    lines = [json.loads(line) for line in (run / CANDIDATES).read_text().splitlines()[:1]]
    plain = candidate_cards(lines, run)[0]
    lines[0]["study"]["augmented"] = Study({}, move).as_json()
    moved = candidate_cards(lines, run)[0]
    assert moved["picture"] != plain["picture"] and moved["picture"] and moved["true"] == plain["true"]


@pytest.mark.parametrize(
    ("times", "told"),
    [
        (2.0, ""),
        (1.04, "Vision relevance of tuned is 1.04 times that of uniform attention: about chance."),
        (0.0, "Vision relevance of tuned is 0: no answer names the abnormality"),
    ],
)
def test_attention_about_chance_and_a_name_that_never_comes_are_two_things(times, told):
    said = Looked(0.05, {"base": 3.0, "tuned": times}).warning()
    assert said.startswith(told) and bool(said) == bool(told)


def test_a_sampled_answer_that_is_cut_off_in_its_box_has_a_malformed_box():
    """The rewards count it as a box without area, so the page must not say "no box"."""
    line = {"id": "a", "step": 1, "true": {"ref": ["cyst"], "bbox": [[0, 0, 9, 9]]}}
    texts = ["A cyst at [0.10, 0.20, 0.30", "A cyst at [0.10, 0.20, 0.30, 1.40].", "A cyst.", "[0.1, 0.2, 0.3, 0.4]"]
    line["candidates"] = [{"text": text, "reward": 0.0, "relevance": 0.0} for text in texts]
    (card,) = candidate_cards([line], Path())
    assert [(len(row["boxes"]), row["malformed"]) for row in card["rows"]] == [(0, 1), (0, 1), (0, 0), (1, 0)]


def test_chance_is_that_of_all_studies_and_not_of_those_in_the_gallery(run):
    """Relevance and cover differ from study to study, so a selection has another ratio than the value in the table."""
    for stage in SHIFTS:
        change_predictions(run, stage, _looked_at)
    evaluations = read_run(run).evaluations
    cards = study_cards(evaluations, 99, run)
    looked, note = looked_over_uniform(evaluations, cards)
    value = evaluations["base"].metrics["vision_relevance"]
    covers = [card["covered"] for card in cards if card["covered"]]
    assert looked.uniform == pytest.approx(np.mean(covers)) and note == "" and len(covers) == value["n"]
    relevances = [
        one.values["vision_relevance"] for one in evaluations["base"].predictions if one.details["true_boxes"]
    ]
    assert looked.times["base"] == pytest.approx(np.mean(relevances) / np.mean(covers))
    assert looked_over_uniform(evaluations, cards[:3]) == (looked, "") == looked_over_uniform(evaluations, [])
    for stage in SHIFTS:  # as an earlier version wrote it
        change_predictions(run, stage, lambda number, line: line.pop("image_size"))
    old = read_run(run).evaluations
    assert looked_over_uniform(old, cards)[0].times == pytest.approx(looked.times)
    without, note = looked_over_uniform(old, cards[:3])
    assert without is None and re.match(r"Vision relevance is not shown .*: for \d+ of \d+ studies", note)


def _looked_at(number, line):
    if line["true_boxes"]:
        line["values"]["vision_relevance"] = 0.02 * (number + 1)
