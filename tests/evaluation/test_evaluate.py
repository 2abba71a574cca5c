"""Metrics on cases worked out by hand, and the whole way from records to a table."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.records import evaluated_records

from umed_plugin.cli import main
from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.benchmarks.recipe_cases import headline
from umed_plugin.evaluation.benchmarks.recipe_scoring import case_values
from umed_plugin.evaluation.evaluation_run import EvaluationSettings
from umed_plugin.evaluation.evaluator import evaluate, evaluate_questions
from umed_plugin.evaluation.metrics.metric import measure
from umed_plugin.evaluation.results import Evaluation, Prediction, compare
from umed_plugin.evaluation.stages_table import stages_table
from umed_plugin.grounding.scoring import AnswerScore
from umed_plugin.model.answerer import Answerer, AnswererSettings, prompt_ids


def case(name, accuracy, iou, relevance=0.5, negative=False):
    """A study whose answer scores so; the model sees its lesion."""
    true = [] if negative else [(0.1, 0.1, 0.2, 0.2)]
    values = case_values(AnswerScore(accuracy, accuracy, iou, [], [], true), None if negative else relevance)
    return Prediction(name, "", "", "", "", values, name, groups={"source": ""})


def evaluation(*cases):
    rows = [prediction.row() for prediction in cases]
    return Evaluation("recipe", "checkpoint", "template", list(cases), measure(RECIPE.metrics(rows), rows))


def metrics(cases):
    return headline(evaluation(*cases))


def ask(checkpoint, made, folder, out=None, **settings):
    return evaluate_questions(
        checkpoint, RECIPE, record_questions(made, folder), EvaluationSettings(**settings), out=out
    )


def answers_of(evaluated):
    return [prediction.answer for prediction in evaluated.predictions]


def test_metrics_by_hand():
    found = metrics(
        [
            case("a", 1.0, 0.50, 0.2),
            case("b", 0.0, 0.49, 0.4),
            case("c", 1.0, 0.00, 0.0),
            case("d", 1.0, 1.0, negative=True),
        ]
    )
    assert found["n"] == 4 and found["n_with_lesion"] == 3
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["mean_iou"] == pytest.approx(0.99 / 3), "a study without a lesion is not asked where it is"
    assert found["acc_at_50"] == pytest.approx(1 / 3), "an IoU of exactly 0.5 counts"
    assert found["vision_relevance"] == pytest.approx(0.2)
    for name in ("accuracy", "mean_iou", "acc_at_50", "vision_relevance"):
        assert found[f"{name}_ci95"] is None, "four studies are too few"


def test_metrics_that_nothing_answers_are_none_and_one_right_answer_says_little():
    found = metrics([case("a", 1.0, 1.0, negative=True)])
    assert found["mean_iou"] is None and found["mean_iou_ci95"] is None
    assert found["accuracy_ci95"] == pytest.approx([0.025, 1.0])


def test_compare_pairs_studies_by_id_and_not_by_order():
    before = evaluation(case("a", 0.0, 0.1), case("b", 1.0, 0.5), case("n", 0.0, 0.0, negative=True))
    after = evaluation(case("n", 1.0, 1.0, negative=True), case("b", 1.0, 0.6), case("a", 0.0, 0.4))
    found = compare(before, after)
    assert found["accuracy"]["difference"] == pytest.approx(1 / 3)
    assert found["mean_iou"]["difference"] == pytest.approx(0.2) and found["mean_iou"]["n"] == 2
    assert found["acc_at_50"]["difference"] == 0.0
    assert found["mean_iou"]["ci95"] is None and found["mean_iou"]["interval"] == "too few"
    assert found["acc_at_50"]["ci95"] == pytest.approx([0.025**0.5 - 1, 1 - 0.025**0.5])
    studies = [case(str(number), 0.0, 0.1) for number in range(8)]
    later = [case(str(number), 0.0, 0.2 + 0.02 * (number % 2)) for number in range(8)]
    low, high = compare(evaluation(*studies), evaluation(*later))["mean_iou"]["ci95"]
    assert 0.1 - 1e-9 <= low < high <= 0.12 + 1e-9, "a paired interval lies within the differences seen"


def test_compare_refuses_other_studies_and_other_benchmarks():
    with pytest.raises(UmedError, match="same questions"):
        compare(evaluation(case("a", 1.0, 1.0)), evaluation(case("b", 1.0, 1.0)))
    other = dataclasses.replace(evaluation(case("a", 1.0, 1.0)), benchmark="vqa_rad")
    with pytest.raises(UmedError, match=r"evaluated on vqa_rad, checkpoint on recipe.*the same benchmark"):
        compare(other, evaluation(case("a", 1.0, 1.0)))


def scored(name, source, size, answer, true=True, patient=""):
    """A study as `evaluate` scores an answer, for an image of ``size`` pixels whose lesion is the left upper quarter."""
    from umed_plugin.grounding.geometry import ImageGeometry
    from umed_plugin.grounding.scoring import score_answer

    box = [0, 0, size / 2, size / 2]
    objects = {"ref": ["cyst"], "bbox": [box]} if true else {"ref": [], "bbox": []}
    score = score_answer(answer, {"objects": objects, "terms": {"cyst": ["cyst"]}}, ImageGeometry(size, size))
    values = case_values(score, 0.5 if true else None)
    return Prediction(name, "", "", answer, "", values, f"{source}/{patient or name}", groups={"source": source})


def test_metrics_of_mau_by_hand():
    cases = [
        scored("a", "deeplesion", 100, "A cyst at [0.00, 0.00, 0.50, 0.50]."),
        scored("b", "deeplesion", 100, "A cyst at [0.00, 0.00, 0.25, 0.50]."),
        scored("c", "tbx11k", 100, "[0.50, 0.50, 1.00, 1.00]"),
        scored("d", "tbx11k", 100, "All is normal.", true=False),
        scored("e", "tbx11k", 100, "At [0.10, 0.10, 0.20, 0.20] and [0.30, 0.30, 0.40, 0.40].", true=False),
        scored("f", "kvasir", 100, "It is [0.10, 0.10, 0.20, 0.20], a cyst"),
    ]
    found = {name: one["value"] for name, one in evaluation(*cases).metrics.items()}
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert (found["accuracy/deeplesion"], found["accuracy/kvasir"]) == (1, 1)
    assert found["accuracy/tbx11k"] == pytest.approx(1 / 3)
    assert found["accuracy_average"] == pytest.approx((1 + 1 + 1 / 3) / 3), (
        "as the paper prints it: each source weighs the same"
    )
    assert found["mean_iou"] == pytest.approx((1 + 0.5 + 0 + 0.04) / 4)
    assert (found["acc_at_25"], found["acc_at_50"]) == (0.5, 0.5)
    assert found["pointing_game"] == 0.75
    assert (found["false_box_rate"], found["false_boxes_per_negative"]) == (0.5, 1.0)
    assert found["vision_relevance"] == 0.5
    # The lesions have half the side of the square of 336: large.
    assert found["lesion_iou/large"] == pytest.approx(found["mean_iou"]) and found["lesion_iou/small"] is None
    assert found["lesions_found/large"] == 0.5
    counts = {name: one["n"] for name, one in evaluation(*cases).metrics.items()}
    assert counts["accuracy"] == 6 and counts["mean_iou"] == 4 and counts["false_box_rate"] == 2


def test_slices_of_one_patient_are_drawn_together():
    def width(patients):
        answers = ["A cyst.", "nothing"]
        cases = [scored(str(i), "s", 10, answers[i // 4 % 2], patient=f"p{i // patients}") for i in range(48)]
        return np.ptp(evaluation(*cases).metrics["accuracy"]["ci95"])

    assert width(4) > 1.5 * width(1), "four slices of a patient that are answered alike tell as much as one"


def test_the_attention_of_a_name_hits_a_lesion_or_not():
    from umed_plugin.evaluation.benchmarks.recipe_scoring import _attention_hit
    from umed_plugin.grounding.geometry import ImageGeometry
    from umed_plugin.grounding.scoring import score_answer
    from umed_plugin.model.heat_map import encode_heat_map

    geometry = ImageGeometry(100, 100, "pad", 64, 8)
    record = {"objects": {"ref": ["cyst"], "bbox": [[0, 0, 50, 50]]}, "terms": {"cyst": ["cyst"]}}
    score = score_answer("A cyst.", record, geometry)
    for place, hit in ((9, 1.0), (63, 0.0)):
        attention = np.full(64, 0.01)
        attention[place] = 0.5
        assert _attention_hit(encode_heat_map(attention, geometry, True), score) == hit
        assert _attention_hit(encode_heat_map(attention, geometry, False), score) == 0.0, "another abnormality's name"
    assert _attention_hit(None, score) == 0.0


def test_answers_do_not_depend_on_the_batch_they_are_asked_in(tiny_mistral, tmp_path):
    made = evaluated_records(tmp_path)
    together = ask(tiny_mistral, made, tmp_path, batch_size=3, max_new_tokens=6)
    alone = ask(tiny_mistral, made, tmp_path, batch_size=1, max_new_tokens=6)
    assert together.template == "umed_mistral"
    assert answers_of(together) == answers_of(alone)
    assert headline(together)["n"] == 3


def test_through_the_image_cache_answers_are_the_same_and_the_second_time_no_image_is_opened(tiny_mistral, tmp_path):
    made = evaluated_records(tmp_path)
    plain = ask(tiny_mistral, made, tmp_path, max_new_tokens=6)
    for _ in range(2):
        cached = ask(tiny_mistral, made, tmp_path, max_new_tokens=6, image_cache=tmp_path / "cache")
        assert answers_of(cached) == answers_of(plain)
        for record in made:
            # Of the same size and time, but no image any more: whoever opens it fails.
            path = tmp_path / record["image"]
            status = path.stat()
            path.write_bytes(bytes(status.st_size))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UmedError, match="cannot be read as an image"):
        ask(tiny_mistral, made, tmp_path, max_new_tokens=6)


@pytest.mark.parametrize("start_end", [False, True])
@pytest.mark.parametrize(
    ("family", "template"),
    [("tiny_llama", "umed_v1"), ("tiny_llama", "llava_v1"), ("tiny_mistral", "mistral_instruct")],
)
def test_the_prompt_is_the_one_of_training_and_of_stock_llava(family, template, start_end, request, tmp_path):
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
    from llava.mm_utils import tokenizer_image_token
    from transformers import AutoTokenizer

    from umed_plugin.checkpoints.prompt_templates import conversation_template
    from umed_plugin.training.tuning_data import tokenize_record

    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(family), use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    config = SimpleNamespace(mm_use_im_start_end=start_end)
    ours = prompt_ids("What is it?", template, tokenizer, config).tolist()

    # As llava.eval.model_vqa writes it.
    question = DEFAULT_IMAGE_TOKEN + "\n" + "What is it?"
    if start_end:
        question = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN + "\n" + "What is it?"
    conversation = conversation_template(template)
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    assert ours == tokenizer_image_token(conversation.get_prompt(), tokenizer)

    data_args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=start_end)
    dataset = SimpleNamespace(list_data_dict=evaluated_records(tmp_path, 1), tokenizer=tokenizer, data_args=data_args)
    ids, labels = tokenize_record(dataset, 0, template)
    assert ours == ids[: int((labels != IGNORE_INDEX).nonzero()[0])].tolist()
    assert start_end == (tokenizer.convert_tokens_to_ids(DEFAULT_IM_START_TOKEN) in ours)


def test_the_model_is_asked_as_its_config_says(tiny_llama, tmp_path, monkeypatch):
    """LLaVA-Med 1.0 has tokens around the image."""
    from umed_plugin.model import forward

    config = json.loads((tiny_llama / "config.json").read_text())
    checkpoint = shutil.copytree(tiny_llama, tmp_path / "v1", ignore=shutil.ignore_patterns("vision_tower"))
    (checkpoint / "config.json").write_text(json.dumps({**config, "mm_use_im_start_end": True}))
    asked, stock = [], forward.embed_prompts
    monkeypatch.setattr(
        forward, "embed_prompts", lambda model, ids, features: asked.extend(ids) or stock(model, ids, features)
    )
    ask(checkpoint, evaluated_records(tmp_path, 1), tmp_path, max_new_tokens=2)
    place = asked[0].tolist().index(-200)
    vocabulary = config["vocab_size"]
    assert (asked[0][place - 1], asked[0][place + 1]) == (vocabulary, vocabulary + 1)


def test_records_for_another_aspect_ratio_are_refused(tiny_mistral, tmp_path):
    with pytest.raises(UmedError, match="--image-aspect-ratio pad"):
        ask(tiny_mistral, evaluated_records(tmp_path, mode="square"), tmp_path)


def test_an_image_that_cannot_be_read_is_named(tiny_mistral, tmp_path):
    made = evaluated_records(tmp_path)
    (tmp_path / "1.png").write_bytes(b"not an image")
    with pytest.raises(UmedError, match=r"1\.png: cannot be read"):
        ask(tiny_mistral, made, tmp_path, max_new_tokens=2)


def test_the_evaluate_command_writes_metrics_and_every_case(tiny_llama, tmp_path, capsys):
    file = tmp_path / "records.json"
    file.write_text(json.dumps(evaluated_records(tmp_path)))
    out = tmp_path / "out"
    command = ["evaluate", str(tiny_llama), "--benchmark", str(file), "--out", str(out), "--limit", "2"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    assert "accuracy" in capsys.readouterr().out
    summary = json.loads((out / "evaluation.json").read_text())
    assert summary["n"] == 2 and summary["template"] == "umed_v1"
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r1"]
    assert main([*command, "--split", "val"]) == 1
    assert "--split" in capsys.readouterr().err


def test_the_evaluate_command_builds_a_recipe_for_the_checkpoint(tiny_mistral, tmp_path, capsys):
    make_studies(tmp_path / "studies", train=4, val=0, test=4)
    command = ["evaluate", str(tiny_mistral), "--benchmark", "demo_studies", "--data-root", str(tmp_path / "studies")]
    out = tmp_path / "out"
    assert main([*command, "--max-new-tokens", "2", "--out", str(out), "--template", "mistral_instruct"]) == 0
    summary = json.loads((out / "evaluation.json").read_text())
    assert summary["n"] == 4 and summary["template"] == "mistral_instruct"


def test_the_table_holds_every_stage(tmp_path):
    from rich.console import Console

    stages = {"base": evaluation(case("a", 1.0, 0.5, 0.1)), "rewarding": evaluation(case("a", 1.0, 0.5, 0.1))}
    console = Console(record=True, width=160, file=open(tmp_path / "table", "w"))  # noqa: SIM115
    console.print(stages_table({n: headline(e) for n, e in stages.items()}, compare(*stages.values())))
    text = console.export_text()
    assert "rewarding - " in text.replace("\n", " ") or "rewarding -" in text
    assert "0.500" in text and "[0.500, 0.500]" not in text and "+0.000 [-0.975, +0.975]" in text


def test_a_record_whose_question_is_the_image_alone_is_evaluated(tiny_mistral, tmp_path):
    made = evaluated_records(tmp_path, 2)
    made[0]["conversations"][0]["value"] = "<image>"
    (tmp_path / "records.json").write_text(json.dumps(made))
    evaluated = evaluate(tiny_mistral, str(tmp_path / "records.json"), max_new_tokens=4, out=tmp_path / "out")
    assert [prediction.question for prediction in evaluated.predictions] == ["", "What is it?"]
    assert all("vision_relevance" in prediction.values for prediction in evaluated.predictions)
    assert Evaluation.load(tmp_path / "out") == evaluated


def test_records_may_be_given_as_a_path(tiny_mistral, tmp_path):
    file: Path = tmp_path / "records.json"
    file.write_text(json.dumps(evaluated_records(tmp_path, 2)))
    by_path, by_text = (evaluate(tiny_mistral, benchmark, max_new_tokens=4) for benchmark in (file, str(file)))
    assert by_path.predictions == by_text.predictions and len(by_path.predictions) == 2


def test_in_bfloat16_it_is_another_evaluation(tiny_mistral, tmp_path):
    records = evaluated_records(tmp_path, 2)
    ask(tiny_mistral, records, tmp_path, out=tmp_path / "out", max_new_tokens=4, dtype="float32")
    with pytest.raises(UmedError, match="bfloat16"):
        ask(tiny_mistral, records, tmp_path, out=tmp_path / "out", max_new_tokens=4, dtype="bfloat16")
    made = ask(tiny_mistral, records, tmp_path, out=tmp_path / "other", max_new_tokens=4, dtype="bfloat16")
    assert len(made.predictions) == 2
    assert str(Answerer(tiny_mistral, AnswererSettings(device="cpu", dtype="bfloat16")).model.dtype) == "torch.bfloat16"
