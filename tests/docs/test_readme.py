"""The README's commands run, its scripts' flags exist, its recipe is valid, and its tables are what the code says.

``UMED_WRITE_README=1 python -m pytest tests/docs/test_readme.py`` writes the tables anew.
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

from umed_plugin import cli, patching
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.patches import old_flags

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

# Commands that take long or change the environment, and the tests that run them or what they call.
RUN_ELSEWHERE = {
    "make demo": "test_demo.py",
    "make test": "test_readme.py",
    "pip install .": "test_packaging.py",
    "umed patches": "test_patches.py",
    "umed upgrade": "test_upgrade_runs.py",
    "umed merge": "test_export.py",
    "umed evaluate": "test_evaluate.py",
    "umed convert": "test_convert.py",
    "umed doctor": "test_doctor.py",
    "umed-run deepspeed": "test_deepspeed.py",
    **dict.fromkeys(
        ("mkdir", "cp", "for part", "unzip", "umed recipe check mau", "umed recipe build mau"), "test_mau_page.py"
    ),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def between(name: str) -> tuple[str, str, str]:
    """The README up to and with the first of a pair of marks, inside, and from the second on."""
    first, second = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = README.read_text().split(first)
    inside, after = rest.split(second)
    return before + first, inside, second + after


def check_table(name: str, rows: list[list[str]]) -> None:
    """Compare the README's table called ``name`` with ``rows``, the first of which is its head."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    table = "".join(f"| {' | '.join(row)} |\n" for row in cells)
    before, inside, after = between(name)
    if os.environ.get("UMED_WRITE_README"):
        README.write_text(before + table + after)
    else:
        assert inside == table, (
            "the table is out of date: UMED_WRITE_README=1 python -m pytest tests/docs/test_readme.py"
        )


def test_the_table_of_flags_is_what_the_code_has() -> None:
    rows = [["flag", "default", "what it does"]]
    for flag in dataclasses.fields(UmedFlags):
        default = "" if flag.default is None else f"`{flag.default}`"
        rows.append([f"`--{flag.name}`", default, flag.metadata["help"]])
    check_table("flags", rows)


def test_the_table_of_patches_is_what_the_code_has() -> None:
    from umed_plugin.patches import ALL

    rows = [["patch", "changes or relies on", "of", "without it", "can go when"]]
    for patch in ALL:
        targets = "<br>".join(dict.fromkeys(f"`{target.path.partition(':')[2]}`" for target in patch.targets))
        libraries = "<br>".join(sorted({f"{target.library} {target.versions}" for target in patch.targets}))
        rows.append([f"`{patch.name}`", targets, libraries, patch.why, patch.delete_when])
    check_table("patches", rows)


def test_the_table_of_findings_is_what_the_code_has() -> None:
    from umed_plugin.commands.doctor.catalogue import GROUPS
    from umed_plugin.commands.doctor.environment import ENVIRONMENT

    rows = [["finding", "severity", "what is found", "what it leads to", "`--fix`"]]
    for kinds in (*GROUPS.values(), ENVIRONMENT):
        rows += [[f"`{kind.code}`", kind.severity, kind.what, kind.why, kind.fix] for kind in kinds]
    check_table("findings", rows)


def test_the_table_of_benchmarks_is_what_the_code_has() -> None:
    from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS

    rows = [["`--benchmark`", "what is asked", "`--data-root` holds", "figures"]]
    rows.append(
        [
            "`mau`, any recipe, a JSON of records",
            "the test split's studies",
            "the recipe's data set",
            "accuracy by source and their mean, IoU, IoU at least 0.25 and 0.5, pointing game of boxes and of attention, vision "
            "relevance, false boxes on negatives, lesions by size",
        ]
    )
    for one in BENCHMARKS.values():
        rows.append([f"`{one.name}`", f"{one.title} ([source]({one.url.split(' ')[0]}))", one.needs, one.reported])
    check_table("benchmarks", rows)


@pytest.mark.llava
@pytest.mark.parametrize("command", commands())
def test_every_command_is_valid_and_has_a_test(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid: `make` has the target, `umed` takes the arguments. What is not run below is run by the test file named above."""
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=60)
    if words[0] == "umed":
        cli.build_parser().parse_args(words[1:])
    tests = [file for start, file in RUN_ELSEWHERE.items() if command.startswith(start)]
    runs_here = words[:2] == ["umed", "recipe"] and words[3:4] != ["mau"]
    assert runs_here != bool(tests), f"no test runs {command!r}"
    assert all((ROOT / "tests" / file).is_file() for file in tests)


def test_the_recipe_commands_run(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``umed recipe`` command as it stands, with the README's own recipe, on the real images."""
    data = real_data / "brain_tumor_coco"
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks("yaml")
    Path("my_tumors.yaml").write_text(recipe.replace("/data/brain_tumor_coco", str(data)))
    Path("my_tumors").mkdir()
    ran = [one for one in commands() if one.startswith("umed recipe") and one.split()[3:4] != ["mau"]]
    for command in ran:
        assert cli.main(shlex.split(command.replace("/data/brain_tumor_coco", str(data)))[1:]) == 0, command
    assert len(ran) == 4
    assert Path("my_tumors/train.json").stat().st_size > 1000


def test_the_recipe_is_valid_and_short(tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    assert len(recipe.splitlines()) <= 10
    (tmp_path / "my_tumors.yaml").write_text(recipe)
    load_recipe(str(tmp_path / "my_tumors.yaml"))


def test_the_reward_is_short_and_runs_in_stage_2(tiny_mistral: Path, tmp_path: Path) -> None:
    """The README's file as it stands, in a run: its values are written beside the answers that they are for."""
    from support.records import grounded_records
    from support.umed_runs import train_flags, umed_run

    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 10
    (rewards,) = re.findall(r"`--umed_rewards (\S*my_rewards:\S+)`", README.read_text())
    own = rewards.split(",")[-1]
    assert f"`reward/{own}`" in README.read_text()
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


def test_the_judge_of_the_readme_has_flags_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.llava_args import llava_args
    from transformers import HfArgumentParser

    from umed_plugin.flags.checks import find_faults

    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    (line,) = blocks("text")
    (flags,) = HfArgumentParser(UmedFlags).parse_args_into_dataclasses(
        ["--umed_stage", "rewarding", *shlex.split(line)]
    )
    assert flags.umed_judge.startswith("openai:") and flags.umed_judge_budget
    assert find_faults(flags, *llava_args()) == []
    names = re.findall(r"--umed_judge\w*", README.read_text())
    assert set(names) <= {f"--{flag.name}" for flag in dataclasses.fields(UmedFlags)}


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

    first, second = blocks("diff")
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
    # Where the README's merge looks for it.
    assert training_args.output_dir == f"./checkpoints/stage{1 if stage == 'instruction_tuning' else 2}-lora"
    assert any(f"{training_args.output_dir} " in command for command in commands()) or stage == "rewarding"
    assert find_faults(umed, model_args, data_args, training_args) == []


def script_for(stage: str, model: Path, tower: Path, data: Path, out: Path) -> str:
    """The README's script of a stage with model, data and device swapped, and two steps long."""
    first, second = blocks("diff")
    script = applied(SCRIPT, first)
    if stage == "rewarding":
        script = applied(script, second)
    swapped = {
        "deepspeed llava/train/train_mem.py": f"{sys.executable} -m llava.train.train_mem",
        "python llava/train/train_mem.py": f"{sys.executable} -m llava.train.train_mem",
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


def test_the_scripts_and_commands_lead_from_a_checkpoint_to_its_evaluation(
    real_data: Path, tiny_mistral: Path, tmp_path: Path
) -> None:
    """Both stages through ``umed-run bash SCRIPT``, each merged, and the result evaluated, on the real images."""
    data, model = real_data / "brain_tumor_coco", tiny_mistral
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def umed(module: str, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", f"umed_plugin.{module}", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    for number, stage in enumerate(("instruction_tuning", "rewarding"), start=1):
        script = tmp_path / f"{stage}.sh"
        script.write_text(
            script_for(stage, model, tiny_mistral / "vision_tower", data, tmp_path / f"stage{number}-lora")
        )
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
