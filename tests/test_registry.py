"""The registry of names: what it holds, what it discovers, and what it says about names that do not exist."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from umed_plugin.errors import UsageError
from umed_plugin.registry import Registry


def fruit() -> None:
    """What the tests register."""


def test_a_name_is_taken_once() -> None:
    registry: Registry[object] = Registry("fruit")
    assert registry.register("apple")(fruit) is fruit
    assert registry.get("apple") is fruit
    with pytest.raises(ValueError, match="fruit 'apple' is registered already, as <function fruit"):
        registry.register("apple")(len)
    assert registry.get("apple") is fruit


def test_the_same_definition_run_again_replaces_the_entry() -> None:
    """As when the cell of a notebook is run twice."""
    registry: Registry[object] = Registry("fruit")
    for _ in range(2):
        namespace: dict[str, object] = {"__name__": "notebook"}
        exec("def pear(): pass", namespace)
        registry.register("pear")(namespace["pear"])
    assert registry.get("pear") is namespace["pear"]
    with pytest.raises(ValueError, match="registered already"):
        registry.register("pear")(object())


def test_unknown_names() -> None:
    registry: Registry[object] = Registry("fruit")
    registry.register("pear")(fruit)
    with pytest.raises(UsageError, match=r"unknown fruit 'paer'\. Did you mean 'pear'\? Allowed: pear\. Your own: "):
        registry.get("paer")
    with pytest.raises(UsageError, match=r"fruit 'no_such_module:x': there is no module 'no_such_module' on sys\.path"):
        registry.get("no_such_module:x")
    with pytest.raises(UsageError, match=r"fruit 'json:x': .*json.* has no 'x'"):
        registry.get("json:x")


def test_an_own_module_that_lacks_an_import_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_fruit_that_needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        Registry("fruit").get("my_fruit_that_needs_more:x")


def test_modules_of_the_package_are_imported_at_the_first_lookup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "orchard_of_the_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from umed_plugin.registry import Registry\nFRUIT = Registry('fruit', __name__)\n"
    )
    for name in ("cherry", "plum"):
        (package / f"{name}.py").write_text(
            f"from orchard_of_the_test import FRUIT\n\n\n@FRUIT.register('{name}')\ndef grow():\n    return '{name}'\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    import orchard_of_the_test

    (package / "fig.py").write_text("from orchard_of_the_test import FRUIT\n\nFRUIT.register('fig')(len)\n")
    assert list(orchard_of_the_test.FRUIT) == ["cherry", "fig", "plum"]
    assert orchard_of_the_test.FRUIT.get("plum")() == "plum"
    assert "fig" in orchard_of_the_test.FRUIT and "date" not in orchard_of_the_test.FRUIT


ORCHARD = """
from umed_plugin.registry import Registry

FRUIT = Registry("fruit", __name__)
"""
SHIPPED = """
from {package} import FRUIT


@FRUIT.register("plum")
def grow():
    return "plum"


FRUIT.register("fig")(len)  # defined outside of the package, while the package is being imported
"""


@pytest.mark.parametrize("first", ["", "shipped"])
def test_a_shipped_name_is_refused_at_the_users_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Whether or not the module with the shipped entry has been imported by then."""
    name = f"orchard_that_ships_{first or 'later'}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(ORCHARD)
    (tmp_path / name / "shipped.py").write_text(SHIPPED.format(package=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[object] = importlib.import_module(name).FRUIT
    if first:
        importlib.import_module(f"{name}.{first}")
    with pytest.raises(ValueError, match="fruit 'plum' is registered already, as <function grow"):
        registry.register("plum")(fruit)
    registry.register("mine")(fruit)
    assert list(registry) == ["fig", "mine", "plum"]


def test_a_package_that_cannot_be_imported_says_so_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "barren_orchard").mkdir()
    (tmp_path / "barren_orchard" / "__init__.py").write_text(ORCHARD)
    (tmp_path / "barren_orchard" / "pear.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[object] = importlib.import_module("barren_orchard").FRUIT
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            registry.register("apple")(fruit)
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            registry.get("apple")
