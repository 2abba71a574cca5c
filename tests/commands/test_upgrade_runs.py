"""`umed upgrade` as a person starts it: killed with -9 in every step, by hand from its dry run, and asked by stock LLaVA."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import forked
from support.forked_shells import programs
from support.records import grounded_records
from support.taught import STOCK, write_lora
from support.umed_runs import environment, python_of_llavas_pins, run_python

from umed_plugin.checkpoints.folder import read_tensors, weight_files
from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

# Two optimizer steps behind the checkpoint that a killed run goes on from.
SMALL = {
    "instruction_tuning.steps": 4,
    "instruction_tuning.save_steps": 2,
    "instruction_tuning.batch_size": 2,
    "instruction_tuning.accumulation": 1,
    "rewarding.steps": 3,
    "rewarding.save_steps": 1,
    "rewarding.batch_size": 2,
    "rewarding.accumulation": 1,
    "rewarding.candidates": 4,
    "rewarding.learning_rate": 1e-2,
    "rewarding.max_new_tokens": 8,
    "evaluation.max_new_tokens": 8,
}


def call(checkpoint: Path, recipe: Path | str, out: Path, *more: str, **settings: object) -> list[str]:
    """The command line of a small upgrade."""
    sets = [word for key, value in {**SMALL, **settings}.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "umed_plugin.cli", "upgrade", str(checkpoint), "--recipe", str(recipe)]
    return [*command, "--out", str(out), *sets, *more]


def run(command: list[str], **keywords: object) -> subprocess.CompletedProcess:
    done = run_python(command[1:], python=command[0], env=environment(), forks_too=True, timeout=600, **keywords)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def begun(folder: Path, step: str) -> bool:
    """Whether a step has begun and not ended."""
    file = folder / "made" / f"{step}.json"
    return file.is_file() and json.loads(file.read_text())["outputs"] is None


def trained(folder: Path, stage: str, steps: int) -> bool:
    """Whether a stage's training is behind a checkpoint and before its end."""
    output = folder / "runs" / f"{stage}-llava-mistral"
    return (output / f"checkpoint-{steps}").is_dir() and not (output / "trainer_state.json").is_file()


# Where the run is killed -> seen on disk.
POINTS: dict[str, Callable[[Path], bool]] = {
    "recipe build": lambda folder: any((folder / "data").rglob("*.png")) and begun(folder, "records"),
    "stage 1": lambda folder: trained(folder, "instruction_tuning", 2),
    "between stages": lambda folder: (
        begun(folder, "evaluation_instruction_tuning") and not (folder / "made" / "stage_2_rewarding.json").is_file()
    ),
    "stage 2": lambda folder: trained(folder, "rewarding", 1),
    "export": lambda folder: begun(folder, "checkpoint_rewarding"),
    "evaluation": lambda folder: begun(folder, "evaluation_rewarding"),
}


def kill_at(reached: Callable[[Path], bool], command: list[str], folder: Path) -> None:
    """Start the command, and kill it and all it has started when ``reached`` says so."""
    process = forked.start(command, env=environment(), new_session=True, forks_too=True)
    while not reached(folder):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(checkpoint) for name, tensor in read_tensors(file).items()}


def check_layout(result: Path, like: Path) -> None:
    """Same files, tensor names, shapes and dtypes, and the same configuration but for the tower's place."""
    ours, theirs = tensors(result), tensors(like)
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs), "nothing was trained"
    names = {path.relative_to(like) for path in like.rglob("*") if path.is_file()}
    assert {path.relative_to(result) for path in result.rglob("*") if path.is_file()} == {
        *names,
        Path("umed_manifest.json"),
    }
    found, expected = (json.loads((folder / "config.json").read_text()) for folder in (result, like))
    assert found.pop("mm_vision_tower") == str(result / "vision_tower") and expected.pop("mm_vision_tower")
    assert found.pop("umed_label_share") == 1, "of the labelled studies that stage 1 has trained on"
    assert found == expected


def answers(folder: Path, stage: str) -> list[dict]:
    lines = (folder / "evaluation" / stage / "predictions.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "image"} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(1800)  # a dozen whole starts
def test_killed_in_every_step_it_ends_as_the_run_that_was_not(tmp_path):
    studies, checkpoint = tmp_path / "studies", make_checkpoint(tmp_path / "tiny-llava-mistral")
    make_studies(studies, seed=0, train=40, val=4, test=4)
    before = contents(checkpoint)
    more = ("--data-root", str(studies), "--rewards", "relevance,localization")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(call(checkpoint, "demo_studies", whole, *more))

    command = call(checkpoint, "demo_studies", killed, *more)
    for point, reached in POINTS.items():
        kill_at(reached, command, killed)
        assert not (killed / "summary.json").exists(), f"the run was over before it was killed in {point}"
    run(command)

    name = f"{checkpoint.name}-umed"
    found, expected = (folder / "checkpoint" / name for folder in (killed, whole))
    check_layout(expected, checkpoint)
    assert {key for key, t in tensors(found).items() if not torch.equal(t, tensors(expected)[key])} == set()
    for stage in ("base", "instruction_tuning", "rewarding"):
        assert answers(killed, stage) == answers(whole, stage) and len(answers(whole, stage)) == 4
    assert json.loads((killed / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())
    assert all(case["question"] in (killed / "report.html").read_text() for case in answers(killed, "rewarding"))
    assert contents(checkpoint) == before, "the input was changed"
    tuned = tensors(whole / "runs" / "instruction_tuned-llava-mistral")
    assert any(not torch.equal(tuned[key], t) for key, t in tensors(expected).items()), "stage 2 has taught nothing"
    # Both trainings went on where they were killed.
    for step in ("stage_1_instruction_tuning", "stage_2_rewarding"):
        assert (killed / "logs" / f"{step}.log").read_text().count("--umed_stage") == 2

    # What is done is not done again, and what it was made from is written down.
    files = [
        *(whole / "logs").iterdir(),
        whole / "report.html",
        whole / "summary.json",
        expected / "umed_manifest.json",
    ]
    states = [path.stat().st_mtime_ns for path in files]
    run(call(checkpoint, "demo_studies", whole, *more))
    assert [path.stat().st_mtime_ns for path in files] == states
    manifest = json.loads((expected / "umed_manifest.json").read_text())
    assert manifest["settings"]["rewarding"]["candidates"] == SMALL["rewarding.candidates"]
    assert manifest["versions"]["torch"] == version("torch")
    assert set(manifest["input"][str(checkpoint)]) == set(before)

    # The swap at the very end, of a run that is done but for it.
    for _ in range(2):
        told = run(call(checkpoint, "demo_studies", whole, *more, "--in-place")).stdout
        assert str(checkpoint.with_name(f"{checkpoint.name}.before-umed")) in told
    old = contents(checkpoint.with_name(f"{checkpoint.name}.before-umed"))
    assert old == before
    check_layout(checkpoint, checkpoint.with_name(f"{checkpoint.name}.before-umed"))
    assert all(torch.equal(t, tensors(expected)[key]) for key, t in tensors(checkpoint).items())


@pytest.fixture(scope="module")
def by_heart(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(adapter over a Llama base that has learnt the records' answers, base, records)."""
    folder = tmp_path_factory.mktemp("by_heart")
    file = grounded_records(folder / "data")
    records = json.loads(file.read_text())
    for index, record in enumerate(records):
        record["split"] = "train" if index < 6 else "test"
    file.write_text(json.dumps(records))
    base = learn(tiny_llama, records, file.parent, folder / "base-llava")
    return write_small_lora(base, folder / "adapter-llava-lora"), base, file


def learn(checkpoint: Path, records: list[dict], images: Path, out: Path) -> Path:
    """Train until the model gives the answers under the stock template: a random one would never end its answer."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.checkpoints.prompt_templates import question_prompt

    tokenizer, model, processor = load_checkpoint(checkpoint, device="cpu")
    question = records[0]["conversations"][0]["value"]
    prompt = tokenizer_image_token(question_prompt(question, "llava_v1"), tokenizer)
    told = [record["conversations"][1]["value"] for record in records]
    ids = [tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for answer in told]
    length = max(map(len, ids))
    inputs = torch.tensor([prompt + answer + [0] * (length - len(answer)) for answer in ids])
    labels = torch.tensor([[-100] * len(prompt) + answer + [-100] * (length - len(answer)) for answer in ids])
    mask = torch.tensor([[1] * (len(prompt) + len(answer)) + [0] * (length - len(answer)) for answer in ids])
    pixels = process_images([Image.open(images / r["image"]).convert("RGB") for r in records], processor, model.config)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "vision_tower" not in n], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=inputs, attention_mask=mask, labels=labels, images=pixels).loss.backward()
        optimizer.step()
    shutil.copytree(checkpoint, out)
    model.config.mm_vision_tower = str(out / "vision_tower")
    model.half().save_pretrained(out)
    return out


def write_small_lora(base: Path, folder: Path) -> Path:
    """An adapter that changes little of what the base says, and its projector not at all."""
    write_lora(base, folder)
    kept = tensors(base)
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert others
    named = {name: kept[name.removeprefix("base_model.model.")].float() for name in others}
    torch.save(named, folder / "non_lora_trainables.bin")
    (adapter,) = folder.glob("adapter_model.*")
    small = {name: tensor * 1e-2 for name, tensor in read_tensors(adapter).items()}
    if adapter.suffix == ".safetensors":
        save_file(small, adapter)
    else:
        torch.save(small, adapter)
    return folder


def lines_of(printed: str) -> Iterator[str]:
    return (line for line in printed.splitlines() if line and not line.startswith(("#", "export ")))


def test_the_printed_commands_by_hand_make_the_same_checkpoint_and_stock_llava_says_what_was_evaluated(
    by_heart, tmp_path
):
    """A LoRA input of the Llama family, trained in full."""
    adapter, base, records = by_heart
    # What was learnt by heart is not to be unlearnt.
    small = {"instruction_tuning.learning_rate": 1e-5, "rewarding.learning_rate": 1e-6, "evaluation.max_new_tokens": 64}
    more = ("--method", "full", "--base", str(base))
    run(call(adapter, records, tmp_path / "run", *more, **small))
    result = tmp_path / "run" / "checkpoint" / f"{base.name}-umed"
    check_layout(result, base)

    hand = tmp_path / "by hand"
    printed = run(call(adapter, records, hand, *more, "--dry-run", **small)).stdout
    assert not hand.exists()
    python = programs(tmp_path / "programs") / "python"
    for line in lines_of(printed):
        if "evaluate" not in shlex.split(line):
            by_server = line.replace(sys.executable, str(python))
            subprocess.run(["bash", "-c", by_server], env=environment(), check=True, capture_output=True)
    same, theirs = tensors(hand / "checkpoint" / result.name), tensors(result)
    assert {name for name, tensor in theirs.items() if not torch.equal(tensor, same[name])} == set()

    python = python_of_llavas_pins()
    if python is None:
        pytest.skip("LLaVA runs as it is on its pins alone: UMED_OTHER_PYTHON names a Python that has them")
    out = tmp_path / "stock template"
    evaluate = [sys.executable, "-m", "umed_plugin.cli", "evaluate", str(result), "--benchmark", str(records)]
    run([*evaluate, "--template", "llava_v1", "--max-new-tokens", "64", "--out", str(out)])
    ours = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    questions = [{"question_id": case["id"], "image": case["image"], "text": case["question"]} for case in ours]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    arguments = {
        "model_path": str(result),
        "image_folder": "",
        "question_file": str(tmp_path / "questions.jsonl"),
        "answers_file": str(tmp_path / "answers.jsonl"),
        "conv_mode": "llava_v1",
    }
    run([python, "-I", str(STOCK), json.dumps(arguments)], cwd=tmp_path)
    stock = [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert stock == [case["answer"] for case in ours] and all("abnormal" in text for text in stock)
