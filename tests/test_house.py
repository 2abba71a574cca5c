"""What keeps the tests in order: their imports, markers and budgets, and that a forked process is like a started one."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import budget, forked, needs
from support.forked_shells import programs
from support.records import write_records
from support.umed_runs import environment, run_python, train_flags

import umed_plugin

TESTS = Path(__file__).resolve().parent
# Also in the code of a child process, which stands in a string.
IMPORT_OF_A_TEST = re.compile(
    r"\b(?:from|import)\s+[\w.]*\btest_\w+|__import__\(\W*test_\w+|import_module\(\W*test_\w+"
)


def imported(module: ast.Module) -> set[str]:
    """All dotted names that a module imports, in functions too, and those in the code of its strings."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {found.split()[-1] for found in IMPORT_OF_A_TEST.findall(node.value)}
    return names


def only_tests(names: set[str]) -> set[str]:
    modules = {file.stem for file in TESTS.rglob("test_*.py")}
    return {name for name in names if modules & set(re.findall(r"\w+", name))}


def test_no_test_module_is_imported():
    """What two tests share stands in tests/support/ or in a conftest.py."""
    found = {
        str(file.relative_to(TESTS)): wrong
        for file in sorted(TESTS.rglob("*.py"))
        if file != Path(__file__) and (wrong := only_tests(imported(ast.parse(file.read_text()))))
    }
    assert found == {}


def test_imports_are_found_wherever_they_stand():
    code = "def f():\n    from test_cli import run\nimport test_files\nX = '''\nfrom test_launch import y\n'''\nimport test_time"
    assert only_tests(imported(ast.parse(code))) == {"test_cli.run", "test_files", "test_launch"}


def test_what_needs_llava_is_read_from_imports():
    """At the top of the module, through helpers, in a function; what only the library imports lazily does not count."""
    files = {file.stem: file for file in TESTS.rglob("test_*.py")}
    assert needs.file_needs_llava(files["test_forward"])
    assert needs.file_needs_llava(TESTS / "support" / "taught.py")
    assert not needs.file_needs_llava(files["test_cli"])
    assert needs.function_needs_llava(TESTS / "conftest.py", "tiny_mistral")
    assert not needs.function_needs_llava(TESTS / "conftest.py", "records")
    assert needs.function_trains(files["test_resume"], "test_started_again_behind_its_last_step_it_trains_no_step_more")
    assert not needs.function_trains(files["test_launch"], "test_the_environment_gets_one_folder_once")


def test_every_folder_has_a_budget_and_the_slowest_files_exist():
    folders = {file.parent.name for file in TESTS.rglob("test_*.py")} - {TESTS.name}
    assert set(budget.BUDGET) == {*folders, "."}
    assert sum(budget.BUDGET.values()) <= 2 * 12 * 60, "more than twelve minutes on two cores"
    assert set(budget.SLOWEST) <= {file.name for file in TESTS.rglob("test_*.py")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "umed_plugin.cli", "--version"],
        ["-m", "umed_plugin.cli", "evaluate", "somewhere"],
        ["-m", "umed_plugin.launch", "python", "-m", "llava.train.train_mem", "--umed_stage", "no"],
    ],
    ids=["exit 0", "exit 2", "training"],
)
def test_a_forked_process_ends_and_prints_as_a_started_one(arguments, tmp_path):
    said = []
    for fresh in (False, True):
        done = run_python(arguments, env=environment(), cwd=tmp_path, fresh=fresh)
        last = [line for line in done.stderr.splitlines() if not line.startswith(" ")][-1:]
        # A forked process has imported bitsandbytes before, which prints what a CPU lacks.
        printed = [line for line in done.stdout.splitlines() if "bitsandbytes" not in line][-1:]
        said.append((done.returncode, printed, last))
    assert said[0] == said[1] and any(said[0][1:])


def test_a_forked_process_dies_like_a_started_one(tiny_llama, tmp_path):
    """By a signal to its session, with the status that a shell sees."""
    more = ["--umed_stage", "instruction_tuning", "--max_steps", "999"]
    flags = train_flags(tiny_llama, write_records(tmp_path / "data"), tmp_path / "out", *more)
    command = ["python", "-m", "umed_plugin.launch", "python", "-m", "llava.train.train_mem", *flags]
    process = forked.start(command, env=environment(), new_session=True)
    while not (tmp_path / "out").is_dir():
        assert process.poll() is None, process.done()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.run
def test_a_shells_line_is_forked_with_its_words_streams_and_status(tmp_path):
    path = os.pathsep.join([str(programs(tmp_path / "programs")), os.environ["PATH"]])
    line = 'umed --version > "a file"; umed evaluate; echo "status $?"; python -c "print(6 * 7)"'
    run = {"cwd": tmp_path, "env": {**environment(), "PATH": path}, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", line], **run)
    assert umed_plugin.__version__ in (tmp_path / "a file").read_text()
    assert "arguments are required: CKPT" in done.stderr
    assert done.stdout.splitlines()[-2:] == ["status 2", "42"], "what is not the plugin's is run as it is"


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_test_sets_for_accelerate_reaches_no_run_and_no_other_test(number, tmp_path):
    """transformers 4 sets this by itself, when a test parses ``--bf16 True``."""
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ, "of the test before"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    assert not any(name.startswith("ACCELERATE_") for name in environment(tmp_path))
