"""Real, tiny training runs through ``umed-run``: the command line, the environment, and the final weights."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from support import forked

if TYPE_CHECKING:
    import torch

# LLaVA's script in two processes. With --standalone torch 2.0 takes a fixed port, and two runs at a time would meet there.
TWO_PROCESSES = [
    *("torchrun", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--nproc_per_node", "2"),
    *("-m", "llava.train.train_mem"),
]
ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"  # on the path of a process that imports `support`


def train_flags(checkpoint: Path, records: Path, output: Path, *more: str) -> list[str]:
    """Flags of a short fp32 run on the CPU; ``more`` comes last and wins."""
    version = "umed_mistral" if "mistral" in checkpoint.name else "umed_v1"
    return (
        f"""
        --model_name_or_path {checkpoint} --version {version}
        --vision_tower {checkpoint}/vision_tower --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu
        --mm_use_im_patch_token False --data_path {records} --image_folder {records.parent} --image_aspect_ratio pad
        --output_dir {output} --per_device_train_batch_size 2 --use_cpu True --report_to none --logging_steps 1
        --model_max_length 512 --learning_rate 1e-3 --disable_tqdm True --save_total_limit 3
    """.split()
        + list(more)
    )


def umed_run(
    command: list[str], *, pythonpath: Path | None = None, fresh: bool = False, **keywords: object
) -> subprocess.CompletedProcess:
    """``umed-run COMMAND`` from a folder that is not the checkout; the plugin is found through the launcher alone.

    LLaVA's script in one or two processes is forked from a process that has imported torch, unless ``fresh``: `support.forked`.
    """
    by_file = keywords.pop("by_file", False)
    launcher = [str(ROOT / "umed_plugin" / "launch.py")] if by_file else ["-m", "umed_plugin.launch"]
    env = environment(*([pythonpath] if pythonpath else []))
    return run_python([*launcher, *command], env=env, fresh=fresh, **keywords)


def run_python(
    arguments: list[str],
    *,
    env: dict[str, str],
    python: str = sys.executable,
    fresh: bool = False,
    forks_too: bool = False,
    timeout: float = 300,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess:
    """``python ARGUMENTS``, forked where `support.forked` can, unless ``fresh``; its own commands too with ``forks_too``."""
    return run_command(
        [python, *map(str, arguments)], env=env, fresh=fresh, forks_too=forks_too, timeout=timeout, cwd=cwd
    )


def run_command(
    command: list[str],
    *,
    env: dict[str, str],
    fresh: bool = False,
    forks_too: bool = False,
    timeout: float = 300,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess:
    """A command by its full words, such as a plan's, run as `run_python` runs its own."""
    if not fresh and forked.wanted(command):
        return forked.Forked(command, env=env, cwd=cwd, forks_too=forks_too).done(timeout)
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def accelerate_settings() -> dict[str, str]:
    """What accelerate reads of this process's environment; transformers 4 writes there what arguments it parses."""
    return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}


def environment(*pythonpath: Path) -> dict[str, str]:
    """The test's environment without accelerate's settings, on one thread, with the running Python first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    entries = [str(ROOT), *map(str, pythonpath)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in accelerate_settings()}
    return {**inherited, **offline, "PATH": path, "PYTHONPATH": os.pathsep.join(entries)}


def other_python() -> str | None:
    """The Python of another stack, which ``.ci/run`` names; None where there is none."""
    return os.environ.get("UMED_OTHER_PYTHON")


def python_of_llavas_pins() -> str | None:
    """A Python in which LLaVA runs as it is, without the plugin: this one, else the other stack's."""
    return sys.executable if version("transformers").startswith("4.") else other_python()


def train(checkpoint: Path, records: Path, output: Path, *more: str, **keywords: object) -> subprocess.CompletedProcess:
    """Stage 1 by ``umed-run python -m llava.train.train_mem``."""
    flags = train_flags(checkpoint, records, output, "--umed_stage", "instruction_tuning", *more)
    return umed_run(["python", "-m", "llava.train.train_mem", *flags], **keywords)


# The interrupted run stops itself: this sitecustomize, which ours hides and has to run, waits for the first checkpoint.
INTERRUPT = """
import os, sys, threading, time
def wait():
    while not os.path.isfile({state!r}):
        time.sleep(0.002)
    os.kill(os.getpid(), {signal})
if "llava.train.train_mem" in " ".join(sys.orig_argv if hasattr(sys, "orig_argv") else [open("/proc/self/cmdline").read()]):
    threading.Thread(target=wait, daemon=True).start()
"""


def weights(output: Path) -> dict[str, torch.Tensor]:
    """All weights that a run has saved at its end: at least one."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for name in ("adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"):
        if (output / name).is_file():
            found.update(torch.load(output / name, weights_only=True))
    for file in output.glob("*.safetensors"):
        found.update(load_file(file))
    assert found, f"{output} holds no weights"
    return found


FLAGS = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 4 --umed_max_new_tokens 12 --learning_rate 1e-3 --max_steps 8 --save_steps 3"
    " --umed_rewards relevance,localization,vision_relevance,localization_diou,localization_curriculum,format,half:half"
    " --umed_reward_weights 1,1,1,1,1,1,0.5..0.25"
)


# A reward that differs between candidates of a model with random weights, where IoU and relevance are mostly 0.
OWN_REWARD = """
def half(prompts, completions, **columns):
    return [sum(letter < "n" for letter in text.lower()) / (1 + len(text)) for text in completions]
"""


def reward(
    checkpoint: Path, records: Path, output: Path, *more: str, hook: Path | None = None
) -> subprocess.CompletedProcess:
    """Stage 2 with the rewards of `FLAGS`; ``hook`` is a folder on the path, whose sitecustomize runs."""
    folder = hook or records.parent
    (folder / "half.py").write_text(OWN_REWARD)
    flags = train_flags(checkpoint, records, output, *FLAGS, *more)
    return umed_run(["python", "-m", "llava.train.train_mem", *flags], pythonpath=folder)
