"""``umed-run``: it finds children wherever they are, passes on what they say, and stops what cannot be patched."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.engine import free_port
from support.records import write_records
from support.umed_runs import ROOT, environment, train_flags, umed_run

from umed_plugin.launch import SITE, child_environment

# What a child reports: the hook is there once, and nothing heavy has been imported.
PROBE = (
    "import sys; print(sum(type(f).__name__ == 'UmedDoor' for f in sys.meta_path), "
    "[m for m in ('umed_plugin', 'inspect', 'torch', 'llava') if m in sys.modules])"
)


def test_without_a_command_it_is_a_usage_error():
    for command, words in (([], "no command was given"), (["--umed_stage", "x"], "is not a flag of umed-run")):
        run = umed_run(command)
        assert run.returncode == 2
        assert words in run.stderr
        assert "example:" in run.stderr


def test_help_is_printed():
    run = umed_run(["--help"])
    assert run.returncode == 0
    assert "usage: umed-run" in run.stdout


def test_what_cannot_be_run_is_named_like_a_shell_does(tmp_path):
    run = umed_run(["torchrum", "x"])
    assert run.returncode == 127
    assert "Did you mean 'torchrun'" in run.stderr
    script = tmp_path / "finetune.sh"
    script.write_text("echo")
    run = umed_run([str(script)])
    assert run.returncode == 126
    assert "not executable" in run.stderr
    script.chmod(0o755)
    run = umed_run([str(script)])
    assert run.returncode == 126
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("true llava/train/train_mem.py \\\n    --lora_enable True\n", True),
        ('exit 0 "$@"\n', False),
        ("echo ${@:2}\n", False),
        ("echo $1\n", False),
        ("source settings.sh || true\n", False),
    ],
    ids=["LLaVA's own", "all", "some", "one", "handed on"],
)
def test_flags_behind_a_script_that_takes_none_are_not_lost_in_silence(text, lost, tmp_path):
    """Bash drops them: the run would train whatever the script says."""
    script = tmp_path / "finetune_task_lora.sh"
    script.write_text(f"#!/bin/bash\n{text}")
    script.chmod(0o755)
    for start in (["bash"], ["bash", "-e"], []):
        run = umed_run([*start, str(script), "--umed_stage", "rewarding"])
        assert (run.returncode == 2 and 'it holds no "$@"), so --umed_stage would be lost' in run.stderr) == lost
        assert 'it holds no "$@"' not in umed_run([*start, str(script), "--max_steps", "1"]).stderr


def test_a_stream_that_the_shell_has_closed_is_no_error():
    words = shlex.join([sys.executable, "-m", "umed_plugin.launch", sys.executable, "-c", "raise SystemExit(3)"])
    assert subprocess.run(["sh", "-c", f"exec {words} >&-"], env=environment()).returncode == 3


def test_the_exit_status_is_the_commands():
    assert umed_run(["sh", "-c", "exit 7"]).returncode == 7
    assert umed_run(["--", "sh", "-c", "exit 8"]).returncode == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command(number, tmp_path):
    up = tmp_path / "up"
    code = f"import os, time; open({str(up)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-m", "umed_plugin.launch", "python", "-c", code]
    child = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (up.exists() and up.read_text()):
        assert time.monotonic() < deadline and child.poll() is None, "the command did not start"
        time.sleep(0.02)
    assert int(up.read_text()) == child.pid, "umed-run becomes the command"
    child.send_signal(number)
    assert child.wait(timeout=20) == -number


def test_children_of_children_find_the_plugin_from_anywhere(tmp_path):
    shutil.copytree(
        ROOT / "umed_plugin", tmp_path / "checkout" / "umed_plugin", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "patches", tmp_path / "checkout" / "patches", ignore=shutil.ignore_patterns("__pycache__"))
    probe = tmp_path / "probe.py"
    probe.write_text(f"{PROBE}\nimport umed_plugin; print(umed_plugin.__file__)")
    outer = tmp_path / "outer.py"
    outer.write_text(f"import subprocess, sys; subprocess.run([sys.executable, {str(probe)!r}], cwd='/', check=True)")
    script = tmp_path / "nested.sh"
    script.write_text(f"cd /\npython {outer}\n")
    base = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "umed_plugin.launch", "bash", str(script)]
    run = subprocess.run(command, cwd=tmp_path / "checkout", env=base, capture_output=True, text=True, check=True)
    where = str(tmp_path / "checkout" / "umed_plugin" / "__init__.py")
    assert run.stdout.splitlines() == ["1 []", where]


def test_a_hidden_sitecustomize_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.hidden = 'ran'")
    run = umed_run(
        ["python", "-c", f"import sys; print(sys.hidden, sys.modules['sitecustomize'].__file__); {PROBE}"],
        pythonpath=tmp_path,
    )
    assert run.stdout.splitlines() == [f"ran {tmp_path / 'sitecustomize.py'}", "1 []"]


def test_the_environment_gets_one_folder_once():
    once = child_environment({"PYTHONPATH": "a:b", "X": "1"})
    assert once == {"PYTHONPATH": f"{SITE}:a:b", "X": "1"}
    assert child_environment(once) == once
    assert child_environment({}) == {"PYTHONPATH": str(SITE)}


@pytest.mark.parametrize(
    ("arguments", "heard"),
    [
        ([], False),
        (["--bits", "16", "--optim", "adamw_torch"], False),
        (["--bits", "4"], True),
        (["--bits=8"], True),
        (["--optim", "paged_adamw_8bit"], True),
    ],
)
def test_bitsandbytes_is_heard_only_in_runs_that_use_it(arguments, heard, tmp_path):
    """Stand-ins for both libraries; as in LLaVA, importing llava imports bitsandbytes."""
    for name, code in {
        "llava": "import bitsandbytes",
        "bitsandbytes": "import warnings; print('undefined symbol'); warnings.warn('no GPU')",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    (tmp_path / "train.py").write_text("import llava, bitsandbytes; print(bitsandbytes.__name__)")
    run = umed_run(["python", str(tmp_path / "train.py"), *arguments], pythonpath=tmp_path)
    assert run.returncode == 0, run.stderr
    said = [run.stdout.splitlines(), "no GPU" in run.stderr]
    assert said == ([["undefined symbol", "bitsandbytes"], True] if heard else [["bitsandbytes"], False])


@pytest.mark.llava
def test_a_broken_plugin_does_not_let_training_start(tmp_path):
    checkout = tmp_path / "umed_plugin"
    shutil.copytree(ROOT / "umed_plugin" / "site", checkout / "site")
    (checkout / "__init__.py").write_text("")
    (checkout / "patches.py").write_text("raise ImportError('half an installation')")
    run = subprocess.run(
        [sys.executable, "-c", "print('started'); import llava.train.llava_trainer"],
        env={**environment(), "PYTHONPATH": str(checkout / "site")},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 1
    assert run.stdout.startswith("started")
    assert "training must not start: ImportError: half an installation" in run.stderr


@pytest.mark.llava
@pytest.mark.parametrize("how", ["module", "file"])
def test_the_script_that_no_patch_can_reach_is_refused_by_name(how):
    script = str(Path(find_spec("llava.train.train_mem").origin).with_name("train.py"))
    run = umed_run(["python", *(["-m", "llava.train.train"] if how == "module" else [script]), "--output_dir", "x"])
    assert run.returncode == 2
    assert ("python -m llava.train.train " if how == "module" else script) in run.stderr
    assert "train_mem" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.llava
def test_a_changed_llava_stops_the_run_before_the_model_is_loaded(tmp_path):
    package = Path(find_spec("llava").origin).parent
    shutil.copytree(package, tmp_path / "llava", ignore=shutil.ignore_patterns("__pycache__", "serve", "eval"))
    file = tmp_path / "llava" / "train" / "train.py"
    changed = file.read_text().replace("eval_dataset=None,", "eval_dataset=None,  # changed")
    assert changed != file.read_text()
    file.write_text(changed)
    run = umed_run(["python", "-m", "llava.train.train_mem", "--output_dir", "x"], pythonpath=tmp_path)
    assert run.returncode == 1
    for part in ("patch 'data_module' does not fit", "make_supervised_data_module", str(tmp_path / "llava"), "remedy"):
        assert part in run.stderr
    assert "Traceback" not in run.stderr
    assert "umed:" not in run.stdout


def test_two_processes_train_lora_from_a_shell_script(tiny_llama, tmp_path):
    records, output = write_records(tmp_path / "data"), tmp_path / "out"
    (records.parent / "1.png").write_bytes(b"no image")
    more = [
        "--umed_stage",
        "instruction_tuning",
        "--umed_on_bad_image",
        "skip",
        "--lora_enable",
        "True",
        "--lora_r",
        "2",
        "--max_steps",
        "2",
    ]
    flags = " ".join(train_flags(tiny_llama, records, output, *more))
    script = tmp_path / "finetune.sh"
    script.write_text(
        f"torchrun --nproc_per_node 2 --master_port {free_port()} {find_spec('llava.train.train_mem').origin} {flags}\n"
    )
    run = umed_run(["bash", str(script)])
    assert run.returncode == 0, run.stderr[-3000:]
    assert (output / "non_lora_trainables.bin").is_file()
    assert json.loads((output / "config.json").read_text())["model_type"] == "llava_llama"
    assert run.stdout.count("supervision check") == 1
    assert "record-1" in run.stderr


def test_xformers_script_trains_a_full_mistral(tiny_mistral, tmp_path):
    records, output = write_records(tmp_path / "data", questions=2), tmp_path / "out"
    stage = ["--umed_stage", "instruction_tuning", "--max_steps", "1", "--bf16", "True"]
    run = umed_run(["python", "-m", "llava.train.train_xformers", *train_flags(tiny_mistral, records, output, *stage)])
    assert run.returncode == 0, run.stderr[-3000:]
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "llava_mistral"
    assert config["architectures"] == ["LlavaMistralForCausalLM"]
    if find_spec("xformers") is None:
        assert "xformers is missing" in run.stdout
