"""The public API: exactly these names, each with an example that runs, and nothing imported before it is asked for."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import umed_plugin

ROOT = Path(umed_plugin.__file__).resolve().parents[1]
# They load, merge or convert weights, import training code, or read pixels through MONAI.
NEED_LLAVA = {"build_records", "compare", "evaluate", "load_checkpoint", "load_image", "merge", "register_reward"}
NEED_LLAVA |= {"to_llava", "to_transformers"}
PUBLIC = [
    "ImageGeometry", "UmedError", "UsageError", "__version__", "build_records", "compare", "diagnose", "evaluate",
    "format_box", "load_checkpoint", "load_image", "load_recipe", "load_records", "merge", "parse_boxes",
    "record_geometry", "register_reader", "register_reward", "save_records", "score_answer", "set_iou", "to_llava",
    "to_transformers",
]  # fmt: skip

WITH_EXAMPLES = [
    pytest.param(name, marks=pytest.mark.llava) if name in NEED_LLAVA else name
    for name in PUBLIC
    if name != "__version__"
]


def test_the_exported_members_are_these() -> None:
    """A new name, or one that goes, is a decision: change this list and docs/python-api.md with it."""
    assert umed_plugin.__all__ == PUBLIC
    assert set(umed_plugin._MODULES) == set(PUBLIC) - {"__version__"}
    assert set(PUBLIC) <= set(dir(umed_plugin))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    if name in NEED_LLAVA:
        # What these libraries print when they are imported first is not the example's output.
        importlib.import_module("monai")
        importlib.import_module("llava.model")
    member = getattr(umed_plugin, name)
    assert member.__module__.startswith("umed_plugin.")
    assert "Example:" in (member.__doc__ or ""), f"{name} has no Example: in its docstring"
    (examples,) = [found for found in doctest.DocTestFinder(recurse=False).find(member, name) if found.examples] or [
        None
    ]
    assert examples is not None, f"the example of {name} has no >>> line"
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(examples)
    assert outcome.attempted and not outcome.failed


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        umed_plugin.trian


def test_importing_the_package_imports_nothing_but_the_standard_library() -> None:
    code = "import sys, umed_plugin; print([name for name in sys.modules if name.startswith('umed_plugin.')])"
    shown = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_package_holds_itself_once() -> None:
    """A checkout on sys.path must not make `umed_plugin.tests` or `umed_plugin.umed_plugin` importable."""
    names = [module.name for module in pkgutil.walk_packages(umed_plugin.__path__, "umed_plugin.", onerror=print)]
    assert len(names) == len(set(names))
    assert not [name for name in names if {"umed_plugin", "tests"} & {*name.split(".")[1:]}]
    assert {"umed_plugin.patches.trainer", "umed_plugin.data_recipes"} <= set(names)
    for name in ("tests", "umed_plugin", "benchmarks", "docs"):
        assert importlib.util.find_spec(f"umed_plugin.{name}") is None, name


def test_few_modules_lie_in_the_root() -> None:
    modules = [path.name for path in Path(umed_plugin.__file__).parent.glob("*.py")]
    assert len(modules) <= 8, modules
