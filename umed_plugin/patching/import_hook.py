"""A hook that runs right after a module's import, so that patches reach a library before anything uses it.

`install` puts a finder on ``sys.meta_path``; `umed_plugin/site/sitecustomize.py` does it in every Python child of ``umed-run``.
This module imports only the standard library, and installing the hook imports no patched library.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any


class _PatchingLoader(importlib.abc.Loader):
    """The module's own loader, with a call after the module has been executed."""

    def __init__(self, loader: Any, after: Callable[[str], None]) -> None:
        self._loader = loader
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must have its own loader again: inspect and pkgutil get the source from it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after(module.__name__)


class PostImportFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a trigger module, and wraps its loader."""

    def __init__(self, triggers: Iterable[str], after: Callable[[str], None]) -> None:
        self.triggers = frozenset(triggers)
        self.after = after
        self._searching: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """The spec of a trigger module with its loader wrapped; None for any other module."""
        if fullname not in self.triggers or fullname in self._searching:
            return None
        # Two finders of this kind would otherwise call each other forever.
        self._searching.add(fullname)
        try:
            specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, self.after)
        return spec


def install(triggers: Iterable[str], after: Callable[[str], None]) -> PostImportFinder:
    """Call ``after(name)`` right after each import of a module in ``triggers``; immediately for those already imported.

    Installing the same hook twice returns the existing finder.
    """
    for finder in sys.meta_path:
        if isinstance(finder, PostImportFinder) and finder.after is after:
            return finder
    finder = PostImportFinder(triggers, after)
    sys.meta_path.insert(0, finder)
    for name in sorted(finder.triggers & set(sys.modules)):
        after(name)
    return finder


def uninstall(finder: PostImportFinder) -> None:
    """Remove the hook; applied patches stay in place."""
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
