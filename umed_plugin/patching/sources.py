"""The source of a patch's targets, read from the files of the installed libraries without importing them.

Importing LLaVA's training code takes seconds and prints the warnings of a dozen libraries. What is not plainly in a file (an
inherited method, an import inside a function) is left to `umed_plugin.patching.misfit`, which imports.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional, Union

from umed_plugin.patching.patches import Patch, Target, installed, version_fits

_MOST_IMPORTS = 8  # from where a name is used to where it is defined


def surely_fits(patch: Patch) -> bool:
    """Whether the files on the disk show that a patch fits. False: it does not, or only an import can tell."""
    return all(_target_fits(target) for target in patch.targets)


def _target_fits(target: Target) -> bool:
    if not version_fits(installed(target.library)[1], target.versions):
        return False
    source = _source_of(target.module, tuple(target.path.partition(":")[2].split(".")))
    if source is None or not target.sha256:
        return source is not None
    return hashlib.sha256(source.encode()).hexdigest() in target.sha256


def _file_of(module: str) -> Optional[Path]:
    """The file of a module, found from the folder of its top package, which is not imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    if not rest:
        return Path(spec.origin)
    if not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def _parsed(file: Path) -> Optional[tuple[list[str], ast.Module]]:
    try:
        text = file.read_text(encoding="utf-8")
        return text.splitlines(keepends=True), ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return None


@functools.cache
def _source_of(module: str, path: tuple[str, ...], depth: int = 0) -> Optional[str]:
    """The text of a definition as `inspect.getsource` gives it, with decorators; of another name, its assignment.

    Names that a module or class imports are looked up where they come from. None: there is no such name, or more than one.
    """
    file = _file_of(module)
    parsed = None if file is None or depth > _MOST_IMPORTS else _parsed(file)
    if file is None or parsed is None:
        return None
    lines = parsed[0]
    owner: Union[ast.Module, ast.ClassDef] = parsed[1]
    for number, name in enumerate(path):
        given = [node for node in _statements(owner.body) if name in _given(node)]
        imports = [node for node in given if isinstance(node, ast.ImportFrom)]
        if imports:
            return _imported(imports, name, path[number + 1 :], module, file, depth)
        if len(given) != 1:
            return None if given else _starred(owner, path, module, file, depth)
        (node,) = given
        if number + 1 == len(path):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            return "".join(lines[first - 1 : node.end_lineno])
        if not isinstance(node, ast.ClassDef):
            return None
        owner = node
    return None


def _imported(
    imports: Sequence[ast.ImportFrom], name: str, rest: tuple[str, ...], module: str, file: Path, depth: int
) -> Optional[str]:
    for node in imports:
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        source = _source_of(_absolute(node, module, file), (original, *rest), depth + 1)
        if source is not None:
            return source
    return None


def _starred(
    owner: Union[ast.Module, ast.ClassDef], path: tuple[str, ...], module: str, file: Path, depth: int
) -> Optional[str]:
    if not isinstance(owner, ast.Module):
        return None
    stars = [
        _absolute(node, module, file)
        for node in _statements(owner.body)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    # transformers' models are hundreds: the one that the name names comes first.
    for star in sorted(stars, key=lambda star: star.rpartition(".")[2].replace("_", "") not in path[0].lower()):
        source = _source_of(star, path, depth + 1)
        if source is not None:
            return source
    return None


def _absolute(node: ast.ImportFrom, module: str, file: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, also inside ``if`` and ``try``."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse, *getattr(node, "finalbody", [])])
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
        else:
            yield node


def _given(node: ast.stmt) -> list[str]:
    """The names that a statement gives."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [alias.asname or alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
