"""The curve over held-out studies: its values, and that training does not notice it."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.records import grounded_records
from support.taught import learn_by_heart, study_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run, weights

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.evaluation_run import EvaluationSettings
from umed_plugin.evaluation.evaluator import evaluate_questions
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.training import early_stopping
from umed_plugin.training.start_check import StartCheck, no_boxes, studies_with_lesion
from umed_plugin.training.validation import METRICS, chosen_indices, metrics, sums_and_counts

FLAGS = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 60 --umed_rewards relevance,localization"
    " --umed_stock_template_share 1 --umed_log_candidates 1 --learning_rate 2e-3 --max_steps 5 --save_steps 3"
    " --per_device_train_batch_size 1 --per_device_eval_batch_size 2"
)
# At temperature 1 not all of them have one.
CHECKED = r"umed: before the first step, [1-4] of 4 answers sampled to 2 training studies have a box; their mean IoU is [01]\."
# Boxes as the taught answers say them, and others: 16 pixels of padding lie above an 80 x 48 image.
BOXES = {"nodule": [9.6, 11.2, 44.8, 46.4], "cyst": [40, 4, 60, 16]}


@pytest.fixture(scope="module")
def taught(tiny_mistral, tmp_path_factory):
    """A checkpoint that gives three answers by heart, and a file with training and held-out records about them."""
    folder = tmp_path_factory.mktemp("validation")
    records = study_records(folder / "data")
    checkpoint = folder / "taught-llava-mistral"
    learn_by_heart(tiny_mistral, records, folder / "data", checkpoint)
    shutil.copytree(tiny_mistral / "vision_tower", checkpoint / "vision_tower")
    for record, name in zip(records, BOXES):
        record["objects"] = {"ref": [name], "bbox": [BOXES[name]], "bbox_type": "real"}
    held_out = []
    for i, record in enumerate(records + records[:2]):
        record = json.loads(json.dumps(record)) | {"id": f"held out {i}", "split": "val"}
        if i == 3:  # half of the box that the answer gives
            record["objects"]["bbox"][0][2] = 27.2
        held_out.append(record)
    every = [record | {"split": "train"} for record in records] + held_out
    for record in every:
        record["terms"] = {"nodule": ["nodule"], "cyst": ["cyst"]}
        record |= {"source": "test", "modality": "CT", "patient": "1"}
        record["answer_type"] = "grounded" if record["objects"]["ref"] else "negative"
    file = folder / "data" / "records.json"
    file.write_text(json.dumps(every))
    return checkpoint, file, [record for record in every if record["split"] == "val"]


def rewarding(checkpoint, file, output, *more, launcher=("python", "-m", "llava.train.train_mem")):
    flags = train_flags(checkpoint, file, output, *FLAGS, *more)
    run = umed_run([*launcher, *flags])
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def curve(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {
        line["step"]: {name: line[name] for name in METRICS if name in line} for line in history if "val/iou" in line
    }


@pytest.fixture(scope="module")
def with_curve(taught, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "with"
    rewarding(*taught[:2], output, "--umed_val_every", "2")
    return output


def test_the_curve_is_what_evaluate_says_of_the_same_weights(taught, with_curve):
    checkpoint, _, held_out = taught
    found = curve(with_curve)
    assert list(found) == [0, 2, 4, 5], "before the first step, every 2 steps, after the last"
    folder = Path(taught[1]).parent
    for step, weights_of in ((0, checkpoint), (5, with_curve)):
        settings = EvaluationSettings(template="mistral_instruct", max_new_tokens=60, device="cpu")
        expected = evaluate_questions(weights_of, RECIPE, record_questions(held_out, folder), settings).metrics
        assert found[step]["val/iou"] == pytest.approx(expected["mean_iou"]["value"], abs=1e-6)
        assert found[step]["val/accuracy"] == pytest.approx(expected["accuracy"]["value"], abs=1e-6)
    # Of four studies with a lesion one has a true box of half the area: the fourth root of 2.
    assert found[0]["val/iou"] == pytest.approx((1 + 1 + 0.5 + 1) / 4, abs=0.01)
    assert found[0]["val/box_area_ratio"] == pytest.approx(2 ** (1 / 4), abs=0.01)
    # A guard compares them with the answers sampled to the training studies.
    history = json.loads((with_curve / "trainer_state.json").read_text())["log_history"]
    (first, *_) = [line for line in history if "guard/iou_over_held_out" in line]
    groups = [json.loads(line) for line in (with_curve / "candidates.jsonl").read_text().splitlines()[: first["step"]]]
    ious = [one["localization"] for group in groups if group["true"]["bbox"] for one in group["candidates"]]
    assert first["guard/iou_over_held_out"] == pytest.approx(sum(ious) / len(ious) - found[0]["val/iou"], abs=1e-6)
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4, 5], (
        "a validation takes no step's own log"
    )
    assert "guard/accuracy_over_held_out" in first and first["guard/questions_over_held_out"] == first["step"]
    assert found[0] != found[5], "five steps at a high rate change the answers, or the last value showed nothing"


def test_training_samples_the_same_answers_with_and_without_the_curve(taught, with_curve, tmp_path):
    """And with and without the check of the first step, which this short run does only where it is asked for."""
    run = rewarding(*taught[:2], tmp_path / "without", "--umed_start_check", "2")
    assert len(re.findall(CHECKED, run.stdout)) == 1
    assert run.stdout.count("umed: nothing compares answers to training studies with those to held-out ones") == 1
    assert curve(tmp_path / "without") == {}
    sampled = [(output / "candidates.jsonl").read_text() for output in (with_curve, tmp_path / "without")]
    assert len(sampled[0].splitlines()) == 5
    assert sampled[0] == sampled[1]
    expected, found = weights(tmp_path / "without"), weights(with_curve)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_resumed_run_goes_on_with_the_same_curve(taught, with_curve, tmp_path):
    shutil.copytree(with_curve / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    rewarding(*taught[:2], tmp_path / "resumed", "--umed_val_every", "2")
    assert curve(tmp_path / "resumed") == curve(with_curve)


def test_two_processes_answer_each_record_once(taught, with_curve, tmp_path):
    """Five records do not divide by two, and one process has a batch more."""
    more = ("--umed_val_every", "9", "--max_steps", "1", "--umed_start_check", "16")
    run = rewarding(*taught[:2], tmp_path / "two", *more, launcher=TWO_PROCESSES)
    assert len(re.findall(CHECKED, run.stdout)) == 1 and "nothing compares" not in run.stdout
    assert curve(tmp_path / "two")[0] == pytest.approx(curve(with_curve)[0], abs=1e-6)


def test_a_checkpoint_that_writes_no_boxes_is_refused_before_the_first_step(tiny_mistral, tmp_path):
    """A run of 20 steps is checked by itself. The message goes to a terminal, so what a model writes is not printed raw."""
    records = grounded_records(tmp_path / "data")
    flags = train_flags(
        tiny_mistral, records, tmp_path / "out", *FLAGS, "--umed_max_new_tokens", "6", "--max_steps", "20"
    )
    run = umed_run(["python", "-m", "llava.train.train_mem", *flags])
    assert run.returncode == 1
    assert "umed: error: none of the 12 answers sampled to 6 training studies with a lesion has a box." in run.stderr
    assert "12 answers are cut off at --umed_max_new_tokens 6" in run.stderr and "--umed_start_check 0" in run.stderr
    assert (
        "In run.yaml of umed upgrade these are instruction_tuning.epochs or steps, rewarding.max_new_tokens"
        in run.stderr
    )
    assert not (tmp_path / "out" / "candidates.jsonl").exists() and not list((tmp_path / "out").glob("checkpoint-*"))


def test_studies_with_a_lesion_are_spread_over_the_data():
    has_boxes = np.arange(100) % 2 == 1
    assert studies_with_lesion(has_boxes, 3) == [1, 33, 67]
    assert studies_with_lesion(has_boxes[::2], 3) == studies_with_lesion(has_boxes[:0], 3) == []
    assert studies_with_lesion(has_boxes[:4], 16) == [1, 3]
    assert studies_with_lesion(np.arange(10_000) == 7_777, 16) == [7_777], "a rare one is found"
    assert "'\\x1b[31m box'" in no_boxes(1, 2, 0, ["\x1b[31m box"], 8).replace("\\\\", "\\")


def test_the_start_check_says_that_no_record_has_a_box(monkeypatch, capsys):
    records = SimpleNamespace(column={"has_boxes": np.zeros(70, dtype=bool)}.__getitem__)
    flags = UmedFlags(umed_stage="rewarding", umed_rewards="localization", umed_start_check=16)
    trainer = SimpleNamespace(flags=flags, train_dataset=SimpleNamespace(list_data_dict=records))
    args = SimpleNamespace(process_index=0, world_size=1)
    StartCheck(trainer).on_train_begin(args, SimpleNamespace(global_step=0, max_steps=1), None)
    assert "none of the 70 training records has a box" in capsys.readouterr().out


@pytest.mark.parametrize(("iou", "every", "told"), [(0.95, 0, True), (0.7, 0, False), (0.95, 20, False)])
def test_the_start_check_hints_at_training_studies_known_by_heart(iou, every, told, monkeypatch, capsys):
    """With a held-out validation, the guards compare, and need no hint."""
    records = SimpleNamespace(column={"has_boxes": np.ones(70, dtype=bool)}.__getitem__)
    flags = UmedFlags(umed_stage="rewarding", umed_rewards="localization", umed_start_check=2, umed_val_every=every)
    trainer = SimpleNamespace(flags=flags, train_dataset=SimpleNamespace(list_data_dict=records))
    monkeypatch.setattr(StartCheck, "_sample", lambda self, indices: (["[0.1, 0.1, 0.2, 0.2]"], [8, 8, 0, 8 * iou]))
    monkeypatch.setattr(StartCheck, "_of_all_ranks", lambda self, counts: counts)
    args = SimpleNamespace(process_index=0, world_size=1)
    StartCheck(trainer).on_train_begin(args, SimpleNamespace(global_step=0, max_steps=20), None)
    printed = capsys.readouterr()
    assert f"their mean IoU is {iou:.2f}" in printed.out
    assert ("Stage 1 may know them by heart" in printed.err and "--umed_val_every 20" in printed.err) is told


def test_the_choice_of_records_does_not_depend_on_their_order():
    names = [f"study {i}" for i in range(50)]
    chosen = {names[i] for i in chosen_indices(names, 10)}
    assert len(chosen) == 10
    turned = names[::-1]
    assert {turned[i] for i in chosen_indices(turned, 10)} == chosen
    assert chosen_indices(names, 99) == list(range(50))
    assert chosen_indices(names, 10) != list(range(10))


def test_metrics_from_sums_of_several_ranks():
    square = ImageGeometry(100, 100)
    lesion = {"objects": {"ref": ["nodule"], "bbox": [[10, 10, 50, 50]]}, "terms": {"nodule": ["nodule"]}}
    nothing = {"objects": {"ref": [], "bbox": []}, "terms": {"nodule": ["nodule"]}}
    scores = [
        score_answer("[0.10, 0.10, 0.50, 0.90] nodule", lesion, square),
        score_answer("nodule", lesion, square),
        score_answer("normal", nothing, square),
    ]
    parts = [sums_and_counts(part) for part in (scores[:1], scores[1:], [])]
    assert metrics(sum(parts)) == pytest.approx({"val/iou": 0.25, "val/accuracy": 1.0, "val/box_area_ratio": 2.0})
    assert metrics(parts[2]) == {}
    assert math.isfinite(metrics(parts[1])["val/iou"])
    assert "val/box_area_ratio" not in metrics(parts[1])


STOPS = shlex.split("--umed_val_every 1 --umed_stop_after 2 --max_steps 9 --save_steps 1 --learning_rate 5e-2")


def stopping(checkpoint, file, output, *more):
    flags = train_flags(checkpoint, file, output, *FLAGS, *STOPS, *more)
    run = umed_run(["python", "-m", "llava.train.train_mem", *flags])
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def state_of(output):
    return json.loads((output / "trainer_state.json").read_text())


TUNING = (
    "--umed_stage",
    "instruction_tuning",
    "--umed_num_candidates",
    "8",
    "--umed_rewards",
    "relevance,localization,vision_relevance",
    "--umed_log_candidates",
    "0",
)


@pytest.mark.parametrize("stage", [TUNING, ("--umed_algorithm", "ppo")], ids=["stage 1", "stage 2"])
def test_a_stage_ends_after_validations_without_gain_and_keeps_the_best(taught, stage, tmp_path):
    """At such a rate the first step ruins what the checkpoint knows by heart, so stage 2 ends where it began."""
    checkpoint, file, _ = taught
    run = stopping(checkpoint, file, tmp_path / "out", *stage)
    found = state_of(tmp_path / "out")
    scores = {v.step: v.score for v in early_stopping.validations(found["log_history"])}
    assert max(scores.values()) == scores[0] > scores[2]
    counted = {step: score for step, score in scores.items() if step > 0 or stage != TUNING}
    best = max(counted, key=counted.get)
    assert best == 0 or stage == TUNING
    assert found["global_step"] == best + 2 < 9 and list(scores) == list(range(best + 3))
    assert [line["val/kept_step"] for line in found["log_history"] if "val/kept_step" in line] == [best]
    told = f"training ended after step {best + 2}: 2 validations without gain. Kept are the weights after step {best}: val/"
    assert told in run.stdout
    expected = weights(tmp_path / "out" / f"checkpoint-{best}" if best else checkpoint)
    kept = weights(tmp_path / "out")
    shared = {name for name in expected if "vision_tower" not in name}
    assert shared and all(torch.equal(kept[name], expected[name]) for name in shared)

    # A run that was killed before its end, or while it saved its result, ends in the same way.
    for step in (best + 1, best + 2):
        again = tmp_path / f"again{step}"
        shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", again / f"checkpoint-{step}")
        shutil.copytree(tmp_path / "out" / "best_weights", again / "best_weights")
        stopping(checkpoint, file, again, *stage)
        assert curve(again) == curve(tmp_path / "out") and state_of(again)["global_step"] == best + 2
        resumed = weights(again)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in kept.items())


def test_two_processes_stop_after_the_same_step(taught, tmp_path):
    checkpoint, file, _ = taught
    flags = train_flags(checkpoint, file, tmp_path / "two", *FLAGS, *STOPS, "--umed_stop_after", "1")
    run = umed_run([*TWO_PROCESSES, *flags])
    assert run.returncode == 0, run.stderr[-3000:]
    assert state_of(tmp_path / "two")["global_step"] == 1 and run.stdout.count("Kept are the weights after step 0") == 1
    expected, kept = weights(checkpoint), weights(tmp_path / "two")
    assert all(torch.equal(kept[name], expected[name]) for name in expected if "vision_tower" not in name)


# Each process says what it holds after the best weights were put back, and which files of the result it writes.
WATCH = """
import json, os
import torch
from umed_plugin.training.early_stopping import EarlyStopping
FILE, save, restore = os.environ["WATCHED"] + os.environ["RANK"], torch.save, EarlyStopping.restore

def say(**found):
    with open(FILE, "a") as file:
        file.write(json.dumps(found) + "\\n")

def saved(content, target, *args, **keywords):
    if "checkpoint-" not in str(target):
        say(written=os.path.basename(str(target)))
    return save(content, target, *args, **keywords)

def restored(self):
    restore(self)
    policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
    say(moved=sum(p.abs().sum().item() for name, p in policy.named_parameters() if "lora_B" in name))

torch.save, EarlyStopping.restore = saved, restored

def watch(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    ("more", "written"),
    [
        (("--lora_enable", "True", "--lora_r", "4"), "non_lora_trainables.bin"),
        (("--tune_mm_mlp_adapter", "True"), "mm_projector.bin"),
    ],
    ids=["lora", "projector"],
)
def test_both_processes_hold_the_best_weights_and_one_writes_them(taught, more, written, tmp_path, monkeypatch):
    """LLaVA lets each process of local rank 0 or -1 write, and transformers 5 left it at -1 in all."""
    checkpoint, file, _ = taught
    (tmp_path / "watch.py").write_text(WATCH)
    monkeypatch.setenv("WATCHED", str(tmp_path / "rank"))
    rewards = ("--umed_rewards", "localization,watch:watch", "--umed_stop_after", "1")
    flags = train_flags(checkpoint, file, tmp_path / "two", *FLAGS, *STOPS, *rewards, *more)
    run = umed_run([*TWO_PROCESSES, *flags], pythonpath=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    ranks = [[json.loads(line) for line in (tmp_path / f"rank{rank}").read_text().splitlines()] for rank in "01"]
    assert [line["moved"] for rank in ranks for line in rank if "moved" in line] == [0, 0], (
        "the best are the untrained ones"
    )
    assert [line["written"] for line in ranks[0] if "written" in line][-1] == written
    assert not [line for line in ranks[1] if "written" in line]
    kept, base = torch.load(tmp_path / "two" / written, weights_only=True), weights(checkpoint)
    projector = {
        name[name.index("model.mm_projector") :]: tensor for name, tensor in kept.items() if "mm_projector" in name
    }
    assert projector and all(torch.equal(base[name], tensor) for name, tensor in projector.items())
    assert json.loads((tmp_path / "two" / "config.json").read_text())["model_type"] == "llava_mistral"


def test_the_best_validation_is_the_first_with_the_highest_score():
    log = [{"loss": 1.0, "step": 1}, {"val/iou": 0.2, "val/accuracy": 0.4, "step": 2}, {"val/accuracy": 0.3, "step": 4}]
    validated = early_stopping.validations(log)
    assert validated == [early_stopping.Validated(2, pytest.approx(0.3)), early_stopping.Validated(4, 0.3)]
    best = early_stopping.best_of([early_stopping.Validated(n, s) for n, s in ((0, 0.1), (2, 0.5), (4, 0.5), (6, 0.2))])
    assert best.step == 2 and early_stopping.best_of([]) is None
    assert early_stopping.without_gain([early_stopping.Validated(n, 1 - n) for n in range(4)]) == 3
    assert early_stopping.without_gain([]) == 0


def stopping_at(
    output: Path, log: list[dict], step: int, weight: float, max_steps: int = 1000
) -> early_stopping.EarlyStopping:
    """Early stopping in a run of one weight that stands at a step, resumed unless it is the first."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(weight)
    flags = SimpleNamespace(umed_stop_after=5, umed_stage="rewarding")
    args = SimpleNamespace(output_dir=output, umed=flags, should_save=True, process_index=0, device="cpu")
    accelerator = SimpleNamespace(gather=lambda tensor: tensor, unwrap_model=lambda model: model)
    state = SimpleNamespace(log_history=log, global_step=step, max_steps=max_steps)
    trainer = SimpleNamespace(args=args, model=model, accelerator=accelerator, state=state)
    stopping = early_stopping.EarlyStopping(trainer)
    stopping.on_train_begin(args, state, None)
    return stopping


def test_weights_in_parts_are_not_kept_as_the_best(tmp_path):
    """Under ZeRO-3 a process would write tensors without entries."""
    stopping = stopping_at(tmp_path, [], 0, 0.5)
    stopping.trainer.model.weight.ds_id = 0
    with pytest.raises(UmedError, match="does not work with ZeRO-3"):
        validate(stopping, 1, 0.5)
    assert not list(tmp_path.rglob("*.safetensors"))


def validate(stopping: early_stopping.EarlyStopping, step: int, score: float) -> None:
    """A step after which the weight is the step's number, and its validation and checkpoint."""
    trainer = stopping.trainer
    trainer.state.global_step = step
    trainer.state.log_history.append({"step": step, "val/iou": score})
    trainer.model.weight.data.fill_(step)
    stopping.on_step_end(trainer.args, trainer.state, SimpleNamespace(should_training_stop=False))
    stopping.on_save(trainer.args, trainer.state, None)


def test_after_best_weights_were_lost_the_next_ones_are_kept_over_every_resume(tmp_path, capsys):
    log = [{"step": 10, "val/iou": 0.9}, {"step": 20, "val/iou": 0.3}]  # the file of step 10 is lost with its machine
    stopping = stopping_at(tmp_path, log, 20, 20.0)
    assert "after step 10, are lost" in capsys.readouterr().err
    validate(stopping, 30, 0.8)
    validate(stopping, 40, 0.4)
    again = stopping_at(tmp_path, json.loads(json.dumps(stopping.trainer.state.log_history)), 40, 40.0)
    assert "lost" not in capsys.readouterr().err
    validate(again, 50, 0.5)
    assert [file.name for file in (tmp_path / early_stopping.FOLDER).iterdir()] == ["step-30.safetensors"]
    again.restore()
    assert again.trainer.model.weight.item() == 30
    (tmp_path / early_stopping.FOLDER / "step-30.safetensors").unlink()
    stopping_at(tmp_path, again.trainer.state.log_history, 50, 50.0)
    assert "after step 30, are lost" in capsys.readouterr().err


@pytest.mark.parametrize(("last", "max_steps"), [(60, 1000), (40, 40)])
def test_a_finished_run_without_its_best_weights_is_left_as_it_is(tmp_path, last, max_steps):
    """Removed after the run, as the pages allow. The same command must neither train on nor replace the result."""
    log = [{"step": step, "val/iou": 1 - step / 100} for step in range(10, last + 1, 10)]
    with pytest.raises(UmedError, match=f"had ended after step {last}, and .*step-10.safetensors.* is missing"):
        stopping_at(tmp_path, log, last, 1.0, max_steps)
    assert not any(early_stopping.KEPT_FROM in line for line in log)
    # The last step was the best: its weights are in the checkpoint.
    stopping_at(tmp_path, [{"step": 40, "val/iou": 0.9}], 40, 40.0, 40).restore()


def test_the_check_before_the_first_step_samples_in_the_precision_of_the_run(monkeypatch):
    """A callback lies outside of the trainer's autocast, and flash attention refuses float32."""
    seen = []
    args = SimpleNamespace(deepspeed=None, bf16=True, fp16=False, device=torch.device("cpu"))
    trainer = SimpleNamespace(
        args=args,
        model=torch.nn.Linear(2, 2),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model, gather=lambda own: own),
        compute_loss_context_manager=nullcontext,
        train_dataset=[{"record": {}}],
        maker=SimpleNamespace(geometry=lambda record: None),
    )

    def answers(self, policy, query):
        seen.append(policy(torch.ones(1, 2)).dtype)
        return [], 0

    monkeypatch.setattr(StartCheck, "_answers", answers)
    check = StartCheck(trainer)
    check._sample([0])
    args.bf16 = False
    check._sample([0])
    assert seen == [torch.bfloat16, torch.float32]
