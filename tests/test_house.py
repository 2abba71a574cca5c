"""What keeps the tests in order: no test module imports another one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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
