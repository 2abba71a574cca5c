"""What `umed upgrade` starts on the machines that people have, started here: only device, precision and size are swapped.

The flag lists are the plan's own. Each test prints which flags it swapped, and compares them with the few that may be.
"""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from support.quantized import needs_kernels
from support.records import grounded_records
from support.umed_runs import environment, run_command

from umed_plugin.commands.machine import Machine
from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.commands.upgrade.run import Upgrade
from umed_plugin.commands.upgrade.settings_file import read_settings

GB = 2**30
MACHINES = {
    "1 x 24 GB": Machine(1, 24 * GB),
    "1 x 80 GB": Machine(1, 80 * GB),
    "8 x 80 GB": Machine(8, 80 * GB),
    "1 x V100 (fp16)": Machine(1, 32 * GB, bf16=False),
}
# What a CPU lacks, and what is only size. Everything else runs as the plan has it.
ON_A_CPU = {"use_cpu": "True", "tf32": "False"}
NO_FP16 = {"fp16": "False", "bf16": "True"}  # half precision with float32 masters, in the format that a CPU has
NO_BF16_BETWEEN_PROCESSES = {"fp16": "False", "bf16": "False"}  # gloo before torch 2.2; NCCL can
SHORT = {"max_steps": "2", "per_device_train_batch_size": "2", "umed_max_new_tokens": "8", "umed_num_candidates": "2"}
SWAPPED = {*ON_A_CPU, *NO_FP16, *SHORT, "num_train_epochs", "nproc_per_node"}


def swapped(step: Step) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """The command for two processes at most on a CPU, and flag -> (the plan's value, the value here)."""
    words, changed = list(step.command), {}
    given = {word[2:]: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    wanted = {**ON_A_CPU, **(NO_FP16 if given["fp16"] == "True" else {}), **SHORT}
    wanted["nproc_per_node"] = str(min(2, int(given["nproc_per_node"])))
    if wanted["nproc_per_node"] == "2" and version("torch").startswith(("2.0.", "2.1.")):
        wanted |= NO_BF16_BETWEEN_PROCESSES
    for flag, value in wanted.items():
        if flag in given and given[flag] != value:
            words[words.index(f"--{flag}") + 1] = value
        elif flag not in given and not flag.startswith("umed_"):
            words += [f"--{flag}", value]
        else:
            continue
        changed[flag] = (given.get(flag, "not given"), value)
    return words, changed


def run_stage(step: Step, folder: Path) -> None:
    words, changed = swapped(step)
    print(f"{step.name}: " + ", ".join(f"--{flag} {old} -> {new}" for flag, (old, new) in changed.items()))
    assert set(changed) <= SWAPPED
    run = run_command(words, env=environment(), cwd=folder, timeout=300)
    assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


@pytest.mark.parametrize(
    ("machine", "method", "bits"),
    [
        *((machine, "lora", 16) for machine in MACHINES),
        ("8 x 80 GB", "full", 16),
        ("1 x V100 (fp16)", "full", 16),
        pytest.param("1 x 24 GB", "lora", 4, marks=needs_kernels),
    ],
)
def test_both_stages_of_the_plan_for_a_machine_run(
    machine: str, method: str, bits: int, tiny_mistral: Path, tmp_path: Path
) -> None:
    records = grounded_records(tmp_path / "data")
    changes = {"checkpoint": str(tiny_mistral), "recipe": str(records), "method": method, "bits": bits}
    upgrade = Upgrade(tmp_path / "run", read_settings(None, changes), Console(quiet=True), machine=MACHINES[machine])
    for step in upgrade.steps:
        if step.trains:
            run_stage(step, tmp_path)
            assert (step.outputs[0] / "trainer_state.json").is_file()
        elif step.name == "checkpoint_instruction_tuning":
            run = run_command([*step.command], env=environment(), cwd=tmp_path)
            assert run.returncode == 0, run.stderr[-3000:]
