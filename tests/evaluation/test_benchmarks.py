"""Benchmarks read real and made files, ask a small checkpoint, and write metrics; a killed run goes on with the same answers."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import forked
from support.benchmark_runs import command, lines, metrics_of, picture, rad
from support.probing import Follows
from support.umed_runs import environment

from umed_plugin import evaluate
from umed_plugin.cli import main
from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.commands.evaluate import _show
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.benchmarks.llava_med import file_benchmark, is_question_file
from umed_plugin.evaluation.evaluator import check_benchmark
from umed_plugin.evaluation.questions import chosen_questions, in_batches
from umed_plugin.model.answerer import Answerer

ROOT = Path(__file__).resolve().parents[2]


# --- VQA-RAD and SLAKE


def test_vqa_rad_metrics_by_hand(tmp_path):
    questions, skipped = chosen_questions(BENCHMARKS["vqa_rad"], rad(tmp_path), work=tmp_path)
    assert [question.id for question in questions] == ["0", "1", "2", "3", "4", "5"] and skipped == 0
    assert questions[1].groups == {"answer_type": "CLOSED"}
    # Open: recall 1/2, 1, 0. Closed (truth no, yes, yes): "normal" (wrong, found by the substring), wrong, right.
    answers = ["a lung", "It looks normal", "The left lung.", "no", "heart", "Yes."]
    found = metrics_of("vqa_rad", questions, answers)
    assert found["open_recall"] == pytest.approx(0.5)
    assert found["open_accuracy"] == pytest.approx(1 / 3)
    assert found["closed_llava_med"] == pytest.approx(2 / 2), "the wrong 'no' is not counted there"
    assert found["closed_llava_med_batch"] == pytest.approx(2 / 3)
    assert found["closed_accuracy"] == pytest.approx(1 / 3)


def test_the_training_part_is_the_rest(tmp_path):
    questions, _ = chosen_questions(BENCHMARKS["vqa_rad"], rad(tmp_path), split="train", work=tmp_path)
    assert [question.id for question in questions] == ["99"]
    with pytest.raises(UmedError, match=r"unknown split of vqa_rad 'val'.*test, train"):
        chosen_questions(BENCHMARKS["vqa_rad"], tmp_path, split="val", work=tmp_path)


def test_what_constant_answers_score(tmp_path):
    """docs/evaluation.md says so: LLaVA-Med's figures are high for an answer that ignores the image."""
    questions, _ = chosen_questions(BENCHMARKS["vqa_rad"], rad(tmp_path), work=tmp_path)  # closed: no, yes, yes
    yes = metrics_of("vqa_rad", questions, ["yes"] * 6)
    assert yes["closed_llava_med"] == 1 and yes["closed_accuracy"] == pytest.approx(2 / 3)
    both = metrics_of("vqa_rad", questions, ["yes or no"] * 6)
    assert both["closed_llava_med"] == both["closed_llava_med_batch"] == 1 and both["closed_accuracy"] == 0
    long = metrics_of("vqa_rad", questions, ["left right upper lower lung heart liver brain"] * 6)
    assert long["open_recall"] == 1 and long["open_precision"] < 0.5
    assert metrics_of("vqa_rad", questions, [""] * 6)["closed_accuracy"] == 0


def test_a_file_without_a_test_split_says_why(tmp_path):
    """VQA-Med 2019 in VQA-RAD's schema: no phrase_type begins with test."""
    file = rad(tmp_path) / "VQA_RAD Dataset Public.json"
    rows = [{**row, "phrase_type": "freeform"} for row in json.loads(file.read_text())]
    file.write_text(json.dumps(rows))
    with pytest.raises(UmedError, match=r"none has a phrase_type that begins with 'test'. Found: 'freeform'"):
        chosen_questions(BENCHMARKS["vqa_rad"], tmp_path, work=tmp_path)
    row = {"qid": 0, "img_name": "a.png", "question": "q", "answer": "a", "answer_type": "OPEN", "q_lang": "zh"}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    with pytest.raises(UmedError, match="none of its 1 questions is in English"):
        chosen_questions(BENCHMARKS["slake"], tmp_path, work=tmp_path)


def test_missing_images_are_the_reason_also_when_they_are_skipped(tmp_path):
    shutil.rmtree(rad(tmp_path) / "VQA_RAD Image Folder")
    with pytest.raises(
        UmedError, match="nothing is left to ask: 3 images of vqa_rad are missing, with 6 of 6 questions"
    ):
        chosen_questions(BENCHMARKS["vqa_rad"], tmp_path, work=tmp_path, skip=True)


@pytest.mark.llava  # DICOM files are read by MONAI
def test_a_recipes_bad_and_missing_images_are_counted_as_skipped(tmp_path, capsys, short_bootstrap):
    """The recipe leaves them out while it is built, before there are questions."""
    make_studies(tmp_path / "studies", train=0, val=0, test=9)
    xrays = sorted((tmp_path / "studies" / "xray").glob("*.png"))
    xrays[0].write_bytes(xrays[0].read_bytes()[:40])
    xrays[1].unlink()
    asked = {"data_root": tmp_path / "studies", "on_bad_image": "skip"}
    model = Follows(lambda text, image: "No.")
    assert evaluate(model, "probes:demo_studies", limit=1, **asked).skipped == 2
    evaluation = evaluate(model, "demo_studies", limit=1, out=tmp_path / "out", **asked)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["skipped"] == 2
    _show(argparse.Namespace(checkpoint=Path("x"), compare=None, out=None, similar=0), evaluation, None)
    assert "2 questions were left out: their images are missing or cannot be read." in capsys.readouterr().out


def test_llava_med_s_own_question_files_are_a_benchmark(tmp_path):
    picture(tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "Is it normal?\n<image>"}, {"from": "gpt", "value": "No"}]
    truth = [
        {"id": 1, "image": "a.png", "answer_type": "CLOSED", "conversations": turns},
        {
            "id": 2,
            "image": "a.png",
            "answer_type": "OPEN",
            "conversations": [turns[0], {"from": "gpt", "value": "left lung"}],
        },
    ]
    (tmp_path / "test.json").write_text(json.dumps(truth))
    asked = [{"question_id": n, "image": "a.png", "text": "Is it normal?\n<image>"} for n in (1, 2)]
    own = {"question_id": 3, "image": "a.png", "text": "Lesion?", "gpt4_answer": "yes"}
    lines = [*map(json.dumps, [*asked, own]), "not JSON"]
    (tmp_path / "questions.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    for name, kinds in (("questions.jsonl", "COC"), ("test.json", "CO")):
        file = str(tmp_path / name)
        assert is_question_file(file)
        check_benchmark(file)
        questions, _ = chosen_questions(file_benchmark(file, None), None, work=tmp_path)
        assert "".join(question.groups["answer_type"][0] for question in questions) == kinds
        assert [question.truth for question in questions] == ["No", "left lung", "yes"][: len(kinds)]
        assert questions[0].text == "Is it normal?"
    assert not is_question_file("mau") and not is_question_file("recipe.yaml")
    (tmp_path / "test.json").unlink()
    with pytest.raises(UmedError, match="has no answer to compare with"):
        chosen_questions(file_benchmark(str(tmp_path / "questions.jsonl"), None), None, work=tmp_path)
    found = metrics_of("llava_med", questions, ["**No**", "The left lung."])
    assert found["closed_accuracy"] == found["open_accuracy"] == 1


@pytest.mark.parametrize("nothing", ["", " ", float("nan")])
def test_rows_of_llava_med_without_a_reference_are_left_out_and_named(nothing, tmp_path, capsys):
    picture(tmp_path / "a.png")

    def asked_of(*answers):
        rows = [{"question_id": n, "image": "a.png", "text": "Organ?", "answer": a} for n, a in enumerate(answers)]
        (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return chosen_questions(file_benchmark(str(tmp_path / "e.jsonl"), None), None, work=tmp_path)[0]

    assert [question.id for question in asked_of("liver", nothing, "lung", nothing)] == ["0", "2"]
    told = capsys.readouterr().err
    assert "llava_med: 2 of 4 rows are left out" in told and "e.jsonl[1]: its answer is empty." in told
    with pytest.raises(
        UmedError, match=r"llava_med: 3 of 4 rows cannot be read[^\0]*e.jsonl\[1\]: its answer is empty"
    ):
        asked_of("liver", nothing, nothing, nothing)
    truth = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "Organ?"}, {"value": "heart"}]}
    (tmp_path / "test.json").write_text(json.dumps([truth]))
    assert [question.truth for question in asked_of("liver", nothing)] == ["liver", "heart"]


def test_real_rows_of_vqa_rad_and_slake(real_data, tmp_path):
    root = real_data / "vqa_rad"
    with pytest.raises(UmedError, match=r"11 images of vqa_rad are missing.*synpic29265.jpg[^\0]*--on-bad-image skip"):
        chosen_questions(BENCHMARKS["vqa_rad"], root, split="train", work=tmp_path)
    there, skipped = chosen_questions(BENCHMARKS["vqa_rad"], root, split="train", work=tmp_path, skip=True)
    assert len(there) >= 2 and len(there) + skipped == 19
    assert {Path(question.image).name for question in there} <= {"synpic42202.jpg", "synpic32933.jpg"}
    (tmp_path / "slake").mkdir()
    shutil.copy(real_data / "slake" / "train_first80.json", tmp_path / "slake" / "train.json")
    records = json.loads((tmp_path / "slake" / "train.json").read_text())
    for name in {record["img_name"] for record in records}:
        picture(tmp_path / "slake" / "imgs" / name)
    questions, _ = chosen_questions(BENCHMARKS["slake"], tmp_path / "slake", split="train", work=tmp_path)
    assert len(questions) == sum(record["q_lang"] == "en" for record in records)
    perfect = metrics_of("slake", questions, [question.truth for question in questions])
    assert perfect["closed_accuracy"] == perfect["open_recall"] == perfect["open_accuracy"] == 1
    assert perfect["closed_llava_med"] < 1, (
        "answers other than yes and no are misses in run_eval.py, even when they are right"
    )


# --- the whole way


def test_the_command_writes_metrics_predictions_and_llava_med_s_files(tiny_mistral, tmp_path, capsys, monkeypatch):
    root, out = rad(tmp_path / "rad"), tmp_path / "out"
    assert main(command(tiny_mistral, "vqa_rad", root, out)) == 0
    assert "closed_accuracy" in capsys.readouterr().out
    summary = json.loads((out / "evaluation.json").read_text())
    assert (summary["benchmark"], summary["template"], summary["n"], summary["images"]) == (
        "vqa_rad",
        "mistral_instruct",
        6,
        3,
    )
    assert summary["metrics"]["open_recall"]["n"] == 3 and len(summary["metrics"]["open_recall"]["ci95"]) == 2
    assert summary["schema"] == 2 and summary["resampling"] == {"unit": "image", "units": 3, "resamples": 2000}
    predictions = lines(out / "predictions.jsonl")
    assert [line["id"] for line in predictions] == ["0", "1", "2", "3", "4", "5"]
    # What run_eval.py insists on: the same ids in the same order, and these keys.
    answers, truth = lines(out / "llava_med/answers.jsonl"), json.loads((out / "llava_med/test.json").read_text())
    assert [line["question_id"] for line in answers] == [item["id"] for item in truth]
    assert list(answers[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert [line["text"] for line in answers] == [line["answer"] for line in predictions]
    assert truth[1]["answer_type"] == "CLOSED" and truth[1]["conversations"][1] == {"from": "gpt", "value": "No"}
    assert json.loads((out / "llava_med/candidate.json").read_text()) == {"0": ["left lung"]}, "of the training part"
    # Again: nothing is asked, the same is written.
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    monkeypatch.setattr(Answerer, "answer", lambda *_: pytest.fail("asked again"))
    assert main(command(tiny_mistral, "vqa_rad", root, out)) == 0
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
    assert main(command(tiny_mistral, "vqa_rad", root, out, "--template", "llava_v1")) == 1
    assert "template: 'mistral_instruct' there, 'llava_v1' now" in capsys.readouterr().err


def test_what_is_on_the_disk_is_not_asked_again_and_a_batch_that_is_not_whole_is(tiny_mistral, tmp_path, monkeypatch):
    root, out = rad(tmp_path / "rad"), tmp_path / "out"
    assert main(command(tiny_mistral, "vqa_rad", root, out, "--batch-size", 2)) == 0
    whole = lines(out / "predictions.jsonl")
    (out / "predictions.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*whole[:2], whole[2], whole[5]])
    )
    asked, answer = [], Answerer.answer
    monkeypatch.setattr(Answerer, "answer", lambda self, asks: asked.append(len(asks)) or answer(self, asks))
    assert main(command(tiny_mistral, "vqa_rad", root, out, "--batch-size", 2)) == 0
    assert asked == [2, 2] and lines(out / "predictions.jsonl") == whole


@pytest.mark.parametrize("more", [(), ("--quiet",)])
def test_a_log_holds_no_bars_of_libraries(more, tiny_mistral, tmp_path, capfd):
    assert main(command(tiny_mistral, "vqa_rad", rad(tmp_path / "rad", 2), tmp_path / "out", *more)) == 0
    said = capfd.readouterr().err
    assert "\r" not in said and "Loading weights" not in said and "%|" not in said


def test_images_go_through_the_cache_of_training(tiny_mistral, tmp_path):
    root = rad(tmp_path / "rad")
    for out in ("plain", "first", "second"):
        more = () if out == "plain" else ("--image-cache", tmp_path / "cache")
        assert main(command(tiny_mistral, "vqa_rad", root, tmp_path / out, *more)) == 0
    assert len(list((tmp_path / "cache").rglob("*.square"))) == 3
    first, second = (lines(tmp_path / out / "predictions.jsonl") for out in ("plain", "second"))
    assert first == second


def test_two_checkpoints_are_compared_pair_by_pair(tiny_mistral, tiny_llama, tmp_path, capsys):
    root = rad(tmp_path / "rad")
    assert main(command(tiny_mistral, "vqa_rad", root, tmp_path / "a")) == 0
    assert main(command(tiny_llama, "vqa_rad", root, tmp_path / "b", "--compare", tmp_path / "a")) == 0
    printed = capsys.readouterr().out
    assert f"{tiny_llama.name} −" in printed and "A positive difference is an improvement." in printed
    found = json.loads((tmp_path / "b/comparison.json").read_text())["differences"]
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text())["metrics"] for name in "ab")
    for name, one in found.items():
        if one["difference"] is not None and name != "closed_llava_med":
            assert one["difference"] == pytest.approx(second[name]["value"] - first[name]["value"])
    assert main(command(tiny_llama, "vqa_rad", root, tmp_path / "b")) == 0
    assert not (tmp_path / "b/comparison.json").exists(), "what an earlier command compared"
    assert main(command(tiny_llama, "slake", root, tmp_path / "c", "--compare", tmp_path / "a")) == 1
    assert "evaluation of vqa_rad, not of slake" in capsys.readouterr().err


def test_recipes_are_compared_too_and_read_by_llava_med(tiny_mistral, tiny_llama, tmp_path, capsys):
    from support.records import evaluated_records

    made = evaluated_records(tmp_path, 4)
    for record, source in zip(made, ("deeplesion", "deeplesion", "tbx11k", "tbx11k")):
        record["source"] = source
    (tmp_path / "records.json").write_text(json.dumps(made))
    start = ["--benchmark", str(tmp_path / "records.json"), "--max-new-tokens", "4"]
    assert main(["evaluate", str(tiny_mistral), *start, "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "accuracy by source" in printed and "Avg" in printed
    assert (
        main(["evaluate", str(tiny_llama), *start, "--out", str(tmp_path / "b"), "--compare", str(tmp_path / "a")]) == 0
    )
    found = json.loads((tmp_path / "b/comparison.json").read_text())["differences"]
    assert found["accuracy"]["n"] == 4 and "accuracy_average" in found
    answers = lines(tmp_path / "a/llava_med/answers.jsonl")
    assert [line["question_id"] for line in answers] == ["r0", "r1", "r2", "r3"] and answers[0][
        "prompt"
    ] == "What is it?"
    assert main(["evaluate", str(tiny_llama), *start, "--compare", str(tmp_path)]) == 1
    assert "no finished evaluation" in capsys.readouterr().err


def test_a_name_that_is_no_benchmark_is_answered_with_those_that_are(tiny_mistral, capsys):
    assert main(["evaluate", str(tiny_mistral), "--benchmark", "vqa_rda"]) == 2
    assert "Did you mean 'vqa_rad'?" in capsys.readouterr().err


def test_a_misspelt_benchmark_is_named_before_the_evaluation_to_compare_with_is_read(tiny_mistral, tmp_path, capsys):
    root = rad(tmp_path / "rad")
    assert main(command(tiny_mistral, "vqa_rad", root, tmp_path / "a")) == 0
    capsys.readouterr()
    for before in (tmp_path / "a", tmp_path / "missing"):
        assert main(command(tiny_mistral, "slkae", root, tmp_path / "b", "--compare", before)) == 2
        assert "unknown benchmark 'slkae'. Did you mean 'slake'?" in capsys.readouterr().err


def test_a_checkpoint_of_several_squares_an_image_is_refused(tiny_mistral, tmp_path, capsys):
    """LLaVA-NeXT's: its images are not one square, and boxes and prefixes would be wrong."""
    copy = shutil.copytree(tiny_mistral, tmp_path / "llava-next-mistral")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "anyres"}))
    assert main(command(copy, "vqa_rad", rad(tmp_path / "rad"), tmp_path / "out")) == 1
    assert "'anyres' in config.json" in capsys.readouterr().err


def test_questions_about_one_image_stand_in_one_batch():

    asked = [BenchmarkQuestion(f"{image}{number}", image, "?", "") for number in range(3) for image in "ab"]
    asked += [BenchmarkQuestion(f"c{number}", "c", "?", "") for number in range(7)]
    found = [[question.id for question in batch] for batch in in_batches(asked, 5)]
    assert found == [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2", "c3", "c4"], ["c5", "c6"]]
    options = [BenchmarkQuestion(str(number), "d", "?", "x", options=("x", "y")) for number in range(3)]
    assert [len(batch) for batch in in_batches(options, 4)] == [2, 1], "options are rows"


def test_slices_of_one_volume_fill_batches_as_other_images_do():
    """12 volumes of 9 slices in batches of 16: slices of one volume share no computation, so they may be parted."""

    def about(volume, index):
        return BenchmarkQuestion(f"{volume}-{index}", f"{volume}.nii", "?", "", reading={"slice": index})

    slices = [about(volume, index) for volume in range(12) for index in range(9)]
    assert [len(batch) for batch in in_batches(slices, 16)] == [16, 16, 16, 16, 16, 16, 12]
    # Two questions about each of two slices, alternating: those about the same slice stay together.
    twice = [replace(about(0, index), id=f"{index}{turn}") for turn in "ab" for index in range(2)]
    assert [[question.id for question in batch] for batch in in_batches(twice, 3)] == [["0a", "0b"], ["1a", "1b"]]


def test_a_benchmark_without_its_files_says_what_it_needs(tiny_mistral, tmp_path, capsys):
    assert main(["evaluate", str(tiny_mistral), "--benchmark", "vqa_rad"]) == 2
    assert "VQA_RAD Dataset Public.json" in capsys.readouterr().err
    assert main(["evaluate", str(tiny_mistral), "--benchmark", "vqa_rad", "--data-root", str(tmp_path / "no")]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["vqa_rad", "records"])
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_files(kind, tiny_mistral, tmp_path):
    """`kill -9` once the first answers are on the disk; the same command then ends with what an undisturbed run writes."""
    if kind == "vqa_rad":
        arguments = command(tiny_mistral, "vqa_rad", rad(tmp_path / "rad", 40), "OUT", "--batch-size", "2")
    else:
        from support.records import evaluated_records

        (tmp_path / "data").mkdir()
        (tmp_path / "data/records.json").write_text(json.dumps(evaluated_records(tmp_path / "data", 40)))
        arguments = [
            "evaluate", str(tiny_mistral), "--benchmark", str(tmp_path / "data/records.json"), "--out", "OUT",
            "--max-new-tokens", "6", "--batch-size", "2",
        ]  # fmt: skip

    def start(out):
        words = [str(out) if word == "OUT" else word for word in arguments]
        return forked.start([sys.executable, "-m", "umed_plugin.cli", *words], env=environment(), cwd=tmp_path)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(timeout=200) == 0
    process = start(killed)
    written, deadline = killed / "predictions.jsonl", time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        if written.exists() and written.read_bytes().count(b"\n") >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait(timeout=20) == -signal.SIGKILL, "it ended before it could be killed"
    done = written.read_bytes().count(b"\n")
    assert 4 <= done < 40 and not (killed / "evaluation.json").exists()
    with written.open("ab") as stream:
        stream.write(b'{"id": "torn')
    assert start(killed).wait(timeout=200) == 0
    for name in ("predictions.jsonl", "evaluation.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def shared_evaluation(tiny_mistral, folder):
    """The command of an evaluation of 40 records in 20 batches; OUT stands for its folder."""
    from support.records import evaluated_records

    (folder / "data").mkdir()
    (folder / "data/records.json").write_text(json.dumps(evaluated_records(folder / "data", 40)))
    return [
        "evaluate", str(tiny_mistral), "--benchmark", str(folder / "data/records.json"), "--out", "OUT",
        "--max-new-tokens", "6", "--batch-size", "2",
    ]  # fmt: skip


def test_two_ranks_end_with_the_files_of_one_process_also_after_a_kill(tiny_mistral, tmp_path):
    arguments = shared_evaluation(tiny_mistral, tmp_path)

    def start(out, **ranks):
        words = [str(out) if word == "OUT" else word for word in arguments]
        variables = {**environment(), **{name: str(value) for name, value in ranks.items()}}
        return forked.start([sys.executable, "-m", "umed_plugin.cli", *words], env=variables, cwd=tmp_path)

    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert start(whole).wait(timeout=200) == 0
    first, second = (start(shared, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2) for rank in (0, 1))
    deadline, written = time.monotonic() + 150, shared / "predictions.shard-2-of-2.jsonl"
    while time.monotonic() < deadline and not (written.exists() and written.read_bytes().count(b"\n") >= 2):
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    assert second.wait(timeout=20) == -signal.SIGKILL, "it ended before it could be killed"
    assert first.poll() is None, "rank 0 does not end before all questions are answered"
    assert start(shared, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2).wait(timeout=200) == 0
    assert first.wait(timeout=60) == 0
    for name in ("predictions.jsonl", "evaluation.json"):
        assert (shared / name).read_bytes() == (whole / name).read_bytes()
    assert not list(shared.glob("*shard*"))


def test_shards_of_a_scheduler_are_joined_by_the_last(tiny_mistral, tmp_path, capsys):
    arguments = shared_evaluation(tiny_mistral, tmp_path)
    whole, shared = (
        [str(tmp_path / out) if word == "OUT" else word for word in arguments] for out in ("whole", "shared")
    )
    assert main(whole) == 0
    capsys.readouterr()
    for shard in ("3/3", "1/3"):
        assert main([*shared, "--shard", shard]) == 0
        assert f"shard {shard} is answered" in capsys.readouterr().out
        assert not (tmp_path / "shared/evaluation.json").exists()
    assert main([*shared, "--shard", "2/3"]) == 0
    assert "evaluation.json" in capsys.readouterr().out
    for name in ("predictions.jsonl", "evaluation.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "variables", "words"),
    [
        (["--shard", "0/4", "--out", "x"], {}, "I from 1 to N"),
        (["--shard", "5/4", "--out", "x"], {}, "I from 1 to N"),
        (["--shard", "half", "--out", "x"], {}, "I from 1 to N"),
        (["--shard", "1/4"], {}, "needs --out"),
        ([], {"RANK": "1", "WORLD_SIZE": "4"}, "shard 2/4 needs --out"),
        (["--shard", "1/4", "--out", "x"], {"RANK": "1", "WORLD_SIZE": "4"}, "a launcher has already given"),
    ],
)
def test_a_share_that_cannot_be_is_refused(more, variables, words, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", "ckpt", "--benchmark", "vqa_rad", *more]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("how", ["parent", "absolute", "link"])
def test_images_outside_of_the_data_root_are_refused_and_named(how, tmp_path, capsys, monkeypatch):
    root = tmp_path / "root"
    picture(root / "imgs" / "a.png")
    picture(tmp_path / "secret" / "b.png")
    name = {"parent": "../../secret/b.png", "absolute": str(tmp_path / "secret" / "b.png"), "link": "b.png"}[how]
    if how == "link":
        (root / "imgs" / "b.png").symlink_to(tmp_path / "secret" / "b.png")
    row = {"qid": 0, "img_name": "a.png", "question": "q", "answer": "Yes", "answer_type": "CLOSED", "q_lang": "en"}
    (root / "test.json").write_text(json.dumps([row, {**row, "qid": 1}, {**row, "qid": 2, "img_name": name}]))
    asked, _ = chosen_questions(BENCHMARKS["slake"], root, work=tmp_path)
    assert [question.id for question in asked] == ["0", "1"]
    told = capsys.readouterr().err
    assert "slake: 1 of 3 rows are left out" in told and f"{tmp_path}/secret/b.png, which is not in" in told
    monkeypatch.setenv("UMED_LINKED_ROOTS", str(tmp_path / "secret"))
    asked, _ = chosen_questions(BENCHMARKS["slake"], root, work=tmp_path)
    assert [question.id for question in asked] == ["0", "1", "2"]
