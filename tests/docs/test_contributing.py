"""Each example change of CONTRIBUTING.md works on a copy of the tree; CHANGELOG.md names what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import blocks
from support.umed_runs import ROOT, environment

import umed_plugin

pytestmark = pytest.mark.one_stack
EXAMPLES = blocks(ROOT / "CONTRIBUTING.md", "diff")
SUBJECTS = re.findall(r"^### (.*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout without what tools leave, its links kept."""
    copy = tmp_path_factory.mktemp("contributing") / "tree"
    copy.mkdir()
    for name in ("umed_plugin", "patches", "data_recipes", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".importlinter", "CONTRIBUTING.md", "README.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def test_every_example_has_a_test_and_at_most_one_other_file() -> None:
    assert len(EXAMPLES) == len(SUBJECTS) == 4
    for example in EXAMPLES:
        files = re.findall(r"^\+\+\+ b/(.*)$", example, re.MULTILINE)
        assert len(files) == 2 and [file.startswith("tests/") for file in files] == [False, True]


@pytest.mark.run
@pytest.mark.llava
def test_the_examples_work_on_a_copy_of_the_tree(tree: Path) -> None:
    tests = []
    for example in EXAMPLES:
        done = subprocess.run(
            ["git", "apply", "-"],
            cwd=tree,
            input=example,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        tests += re.findall(r"^\+\+\+ b/(tests/.*)$", example, re.MULTILINE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=tree, env={**environment(), "PYTHONPATH": str(tree)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"{len(tests)} passed" in done.stdout


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == umed_plugin.__version__


def test_every_new_module_of_the_changelog_is_there() -> None:
    table = (ROOT / "CHANGELOG.md").read_text().split("| before | now |")[1].split("\n\n")[0]
    package = ROOT / "umed_plugin"
    for row in table.splitlines()[2:]:
        now = row.split("|")[2]
        names = re.findall(r"`([\w.*]+)`", now)
        for name in names:
            name = f"{names[0].rpartition('.')[0]}{name}" if name.startswith(".") else name
            path = package / name.replace(".*", "").replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{row}: {name}"
