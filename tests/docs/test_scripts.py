"""The training scripts of README and docs/training.md: flags that exist, and both stages from a checkpoint to its evaluation.

So do the reward and the judge of docs/rewards.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.forked_shells import programs
from support.pages import DOCS, README, blocks, commands, pages
from support.umed_runs import ROOT, run_python

from umed_plugin import patching
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.patches import old_flags

REWARDS = DOCS / "rewards.md"
TRAINING = DOCS / "training.md"


@pytest.mark.one_stack
def test_the_reward_is_short_and_runs_in_stage_2(tiny_mistral: Path, tmp_path: Path) -> None:
    """The page's file as it stands, in a run: its values are written beside the answers that they are for."""
    from support.records import grounded_records
    from support.umed_runs import train_flags, umed_run

    (code,) = blocks(REWARDS, "python")
    assert len([line for line in code.splitlines() if line]) <= 10
    (rewards,) = re.findall(r"`--umed_rewards (\S*my_rewards:\S+)`", REWARDS.read_text())
    own = rewards.split(",")[-1]
    assert f"`reward/{own}`" in REWARDS.read_text()
    file = grounded_records(tmp_path / "data")
    records = json.loads(file.read_text())
    for record in records[::2]:
        record["conversations"][1]["value"] += " On the Left."
    file.write_text(json.dumps(records))
    (tmp_path / "my_rewards.py").write_text(code)

    flags = (
        "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 12 --max_steps 4 --umed_log_candidates 1"
    )
    run = umed_run(
        [
            *("python", "-m", "llava.train.train_mem"),
            *train_flags(tiny_mistral, file, tmp_path / "out", *flags.split(), "--umed_rewards", rewards),
        ],
        cwd=tmp_path,
        pythonpath=tmp_path,
    )

    assert run.returncode == 0, run.stderr[-3000:]
    groups = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert len(groups) == 4
    for group in groups:
        with_side = int(group["id"].split("-")[1]) % 2 == 0
        assert [answer[own] for answer in group["candidates"]] == ([0.0] * 2 if with_side else [None] * 2)
    assert f"reward/{own}" in (tmp_path / "out" / "trainer_state.json").read_text()


@pytest.mark.one_stack
def test_the_judge_of_the_page_has_flags_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.llava_args import llava_args
    from transformers import HfArgumentParser

    from umed_plugin.flags.checks import find_faults

    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    (line,) = blocks(REWARDS, "text")
    (flags,) = HfArgumentParser(UmedFlags).parse_args_into_dataclasses(
        ["--umed_stage", "rewarding", *shlex.split(line)]
    )
    assert flags.umed_judge.startswith("openai:") and flags.umed_judge_budget
    assert find_faults(flags, *llava_args()) == []


def test_every_training_flag_that_a_page_names_exists() -> None:
    names = {name for page in pages() for name in re.findall(r"--umed_\w+", page.read_text())}
    assert "--umed_judge_base_url" in names
    assert names <= {f"--{flag.name}" for flag in dataclasses.fields(UmedFlags)}


def applied(script: list[str], diff: str) -> list[str]:
    """``script`` after ``diff``; the lines that the diff keeps or removes must stand in it in this order."""
    script, at = list(script), 0
    for line in diff.splitlines():
        mark, text = line[0], line[1:]
        if mark == "+":
            script.insert(at, text)
            at += 1
            continue
        at = script.index(text, at)
        if mark == "-":
            del script[at]
        else:
            at += 1
    return script


def flags_of(script: list[str]) -> list[str]:
    """The arguments after the script's Python file."""
    words = shlex.split(" ".join(line.rstrip("\\") for line in script))
    return words[words.index("llava/train/train_mem.py") + 1 :]


# LLaVA's scripts/v1_5/finetune_task_lora.sh: the wheel of LLaVA does not hold it.
SCRIPT = [
    "deepspeed llava/train/train_mem.py \\",
    "    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \\",
    "    --deepspeed ./scripts/zero3.json \\",
    "    --model_name_or_path liuhaotian/llava-v1.5-13b \\",
    "    --version v1 \\",
    "    --data_path ./playground/data/llava_v1_5_mix665k.json \\",
    "    --image_folder ./playground/data \\",
    "    --vision_tower openai/clip-vit-large-patch14-336 \\",
    "    --mm_projector_type mlp2x_gelu \\",
    "    --mm_vision_select_layer -2 \\",
    "    --mm_use_im_start_end False \\",
    "    --mm_use_im_patch_token False \\",
    "    --image_aspect_ratio pad \\",
    "    --group_by_modality_length True \\",
    "    --bf16 True \\",
    "    --output_dir ./checkpoints/llava-v1.5-13b-task-lora \\",
    "    --num_train_epochs 1 \\",
    "    --per_device_train_batch_size 16 \\",
    "    --per_device_eval_batch_size 4 \\",
    "    --gradient_accumulation_steps 1 \\",
    '    --evaluation_strategy "no" \\',
    '    --save_strategy "steps" \\',
    "    --save_steps 50000 \\",
    "    --save_total_limit 1 \\",
    "    --learning_rate 2e-4 \\",
    "    --weight_decay 0. \\",
    "    --warmup_ratio 0.03 \\",
    '    --lr_scheduler_type "cosine" \\',
    "    --logging_steps 1 \\",
    "    --tf32 True \\",
    "    --model_max_length 2048 \\",
    "    --gradient_checkpointing True \\",
    "    --dataloader_num_workers 4 \\",
    "    --lazy_preprocess True \\",
    "    --report_to wandb",
]
# Without a GPU, DeepSpeed and an account: the last of a flag given twice counts, but for --deepspeed, which is taken out.
ON_THIS_MACHINE = ["--use_cpu", "True", "--tf32", "False", "--report_to", "none"]


def test_the_readme_and_the_page_make_the_same_scripts() -> None:
    made = []
    for page in (README, TRAINING):
        first, second = blocks(page, "diff")
        made.append((sorted(applied(SCRIPT, first)), sorted(applied(applied(SCRIPT, first), second))))
    assert made[0] == made[1]


@pytest.fixture
def patched_llava() -> Iterator[ModuleType]:
    """`llava.train.train` with the flags that a training process knows."""
    from llava.train import train

    patching.apply([old_flags.PATCH])
    yield train
    patching.undo(old_flags.PATCH)


@pytest.mark.parametrize("stage", ["instruction_tuning", "rewarding"])
def test_the_script_with_the_changes_has_flags_that_llava_and_the_plugin_take(
    stage: str, patched_llava: ModuleType, tmp_path: Path
) -> None:
    from transformers import HfArgumentParser

    from umed_plugin.flags.checks import find_faults

    first, second = blocks(TRAINING, "diff")
    script = applied(SCRIPT, first)
    if stage == "rewarding":
        script = applied(script, second)
    assert (stage == "instruction_tuning") == any("deepspeed" in line for line in script)
    script = [line for line in script if "--deepspeed" not in line]
    words = [word.replace("/data/brain_tumor_coco", str(tmp_path)) for word in flags_of(script)] + ON_THIS_MACHINE

    of_llava = patched_llava.ModelArguments, patched_llava.DataArguments, patched_llava.TrainingArguments
    parser = HfArgumentParser((*of_llava, UmedFlags))
    model_args, data_args, training_args, umed = parser.parse_args_into_dataclasses(words)

    assert umed.umed_stage == stage and umed.umed_recipe == "brain_tumor_coco"
    assert model_args.version == "umed_mistral" and training_args.lora_r == 128
    # Where the page's merge looks for it.
    assert training_args.output_dir == f"./checkpoints/stage{1 if stage == 'instruction_tuning' else 2}-lora"
    assert any(f"{training_args.output_dir} " in command for command in commands(TRAINING)) or stage == "rewarding"
    assert find_faults(umed, model_args, data_args, training_args) == []


def script_for(stage: str, model: Path, tower: Path, data: Path, out: Path, python: Path) -> str:
    """The page's script of a stage with model, data and device swapped, and two steps long."""
    first, second = blocks(TRAINING, "diff")
    script = applied(SCRIPT, first)
    if stage == "rewarding":
        script = applied(script, second)
    swapped = {
        "deepspeed llava/train/train_mem.py": f"{python} -m llava.train.train_mem",
        "python llava/train/train_mem.py": f"{python} -m llava.train.train_mem",
        "./checkpoints/llava-med-v1.5-mistral-7b": str(model),
        "./checkpoints/llava-mistral-stage1": str(model),
        "openai/clip-vit-large-patch14-336": str(tower),
        "/data/brain_tumor_coco": str(data),
        "./checkpoints/stage": str(out.parent / "stage"),
    }
    text = "\n".join(line for line in script if "--deepspeed" not in line)
    for old, new in swapped.items():
        text = text.replace(old, new)
    short = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"]
    short += ["--umed_num_candidates", "2", "--umed_max_new_tokens", "12"] if stage == "rewarding" else []
    return f"{text} {shlex.join([*ON_THIS_MACHINE, *short])}\n"


def stock_answers(checkpoint: Path, images: Path, folder: Path) -> list[str]:
    """What stock LLaVA, with the plugin not importable, answers about the first image of a folder."""
    image = sorted(images.glob("*.jpg"))[0].name
    question = {"question_id": 0, "image": image, "text": "Is there anything abnormal?"}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    files = {"question_file": folder / "questions.jsonl", "answers_file": folder / "answers.jsonl"}
    arguments = {"model_path": checkpoint, "image_folder": images, **files}
    script = [str(ROOT / "benchmarks" / "stock_vqa.py"), json.dumps({key: str(v) for key, v in arguments.items()})]
    subprocess.run([sys.executable, "-I", *script], cwd=folder, check=True, timeout=300)
    return [json.loads(line)["text"] for line in files["answers_file"].read_text().splitlines()]


@pytest.mark.one_stack
def test_the_scripts_and_commands_lead_from_a_checkpoint_to_its_evaluation(
    real_data: Path, tiny_mistral: Path, tmp_path: Path
) -> None:
    """Both stages through ``umed-run bash SCRIPT``, each merged, and the result evaluated, on the real images."""
    data, model = real_data / "brain_tumor_coco", tiny_mistral
    python = programs(tmp_path / "programs") / "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def umed(module: str, *arguments: str | Path) -> None:
        done = run_python(["-m", f"umed_plugin.{module}", *arguments], cwd=tmp_path, env=environment, timeout=500)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    for number, stage in enumerate(("instruction_tuning", "rewarding"), start=1):
        script = tmp_path / f"{stage}.sh"
        out = tmp_path / f"stage{number}-lora"
        script.write_text(script_for(stage, model, tiny_mistral / "vision_tower", data, out, python))
        umed("launch", "bash", script)
        merged = tmp_path / f"llava-mistral-stage{number}"
        umed("cli", "merge", tmp_path / f"stage{number}-lora", "--base", model, "--out", merged)
        model = merged

    benchmark = ("--benchmark", "brain_tumor_coco", "--data-root", data)
    umed(
        "cli", "evaluate", model, *benchmark, "--limit", "4", "--max-new-tokens", "12", "--out", tmp_path / "evaluation"
    )
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()
    assert len(stock_answers(model, data / "test", tmp_path)) == 1
