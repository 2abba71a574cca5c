"""Which tests need LLaVA and which start training, read from their source: nobody has to remember a marker.

A test needs LLaVA when its module, a helper or a fixture that it uses imports torch or a library on top of it, itself, by
``pytest.importorskip`` or through other modules of this repository. Imports inside functions of the library are lazy and do not
count: a test that runs into one of those carries ``@pytest.mark.llava``. A test trains when it or its helpers use one of
`TRAINERS`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = frozenset(
    ("accelerate", "deepspeed", "llava", "monai", "peft", "safetensors", "sentencepiece", "tokenizers")
)
LIBRARIES |= {"torch", "torchvision", "transformers", "trl"}
# Of the library's functions that import torch when they are called, the one that most tests use.
LAZY = "make_checkpoint"
# What a test starts training or evaluation with, in a process of its own.
TRAINERS = ("support.umed_runs.train", "support.umed_runs.train_flags", "support.umed_runs.reward")
TRAINERS += ("support.umed_runs.run_python", "support.forked", "support.forked_shells.programs")
# Where the modules of this repository lie: first part of a dotted name -> folder.
PACKAGES = {"umed_plugin": ROOT / "umed_plugin", "support": ROOT / "tests" / "support"}


def llava_is_installed() -> bool:
    """Whether torch and LLaVA can be imported here; imports neither."""
    return all(importlib.util.find_spec(name) for name in ("torch", "llava"))


def functions_of(item: pytest.Item) -> list[tuple[Path, str]]:
    """(file, name) of a test and of all its fixtures that are written in this repository."""
    fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
    functions = [inspect.unwrap(function) for function in (item.function, *fixtures)]
    found = [(Path(function.__code__.co_filename), function.__name__) for function in functions]
    return [(file, name) for file, name in found if file.is_relative_to(ROOT)]


@cache
def file_needs_llava(file: Path) -> bool:
    """Whether importing the file imports one of `LIBRARIES`, itself or through this repository's modules."""
    waiting, seen = [file], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if any(name.split(".")[0] in LIBRARIES for name in _imported_by(current)):
            return True
        waiting += [inner for name in _imported_by(current) for inner in _files_of(name)]
    return False


@cache
def function_needs_llava(file: Path, name: str) -> bool:
    """Whether a function, or a helper of the same file that it names, imports one of `LIBRARIES` when it runs."""
    used = _used(file, name)
    imported = (name for node in used for name in _imports(ast.walk(node)))
    return function_trains(file, name) or any(LAZY in _names(node) for node in used) or any(map(_needs, imported))


@cache
def function_trains(file: Path, name: str) -> bool:
    """Whether a function, or a helper of the same file that it names, uses one of `TRAINERS`."""
    imported = set(_imports(ast.walk(_tree(file))))
    trainers = {name.rpartition(".")[2] for name in TRAINERS if name in imported}
    return bool(trainers) and any(not trainers.isdisjoint(_names(node)) for node in _used(file, name))


def _used(file: Path, name: str) -> list[ast.AST]:
    """The definition of a function, and those of the same file that it names, directly or through one another."""
    definitions = _definitions(file)
    waiting, used = [name], {}
    while waiting:
        current = waiting.pop()
        if current in definitions and current not in used:
            used[current] = definitions[current]
            waiting += _names(definitions[current])
    return list(used.values())


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _needs(name: str) -> bool:
    if name.split(".")[0] in LIBRARIES:
        return True
    file = _file_of(name)
    return file is not None and file_needs_llava(file)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _definitions(file: Path) -> dict[str, ast.AST]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name: node for node in _tree(file).body if isinstance(node, kinds)}


@cache
def _imported_by(file: Path) -> frozenset[str]:
    """Dotted names that importing a file imports itself."""
    return frozenset(_imports(_at_import(_tree(file).body)))


def _at_import(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: function bodies and ``if TYPE_CHECKING`` are left out."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _at_import(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _at_import(ast.iter_child_nodes(node))


def _imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            yield from (given.value for given in node.args if isinstance(given, ast.Constant))


def _files_of(name: str) -> list[Path]:
    """The files that importing a module of this repository runs: its packages' and its own."""
    parts = name.split(".")
    files = [_file_of(".".join(parts[:count])) for count in range(1, len(parts) + 1)]
    return [file for file in files if file]


@cache
def _file_of(name: str) -> Path | None:
    first, *rest = name.split(".")
    if first not in PACKAGES:
        file = ROOT / "benchmarks" / f"{name}.py"
        return file if file.is_file() else None
    path = PACKAGES[first].joinpath(*rest)
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None
