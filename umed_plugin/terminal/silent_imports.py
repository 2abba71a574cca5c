"""Import libraries without what they print about hardware that no command needs, such as bitsandbytes without a GPU."""

from __future__ import annotations

import contextlib
import importlib.abc
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

SILENT = frozenset({"bitsandbytes"})
# Values of --optim that name an optimizer of bitsandbytes, such as adamw_bnb_8bit, paged_lion_32bit and ademamix.
_ITS_OPTIMIZERS = ("bnb", "8bit", "paged", "ademamix")


def uses_bitsandbytes(arguments: Sequence[str]) -> bool:
    """Whether a training computes with bitsandbytes (``--bits 4``, or an optimizer of it): then its words are about this run.

    Example:
        >>> uses_bitsandbytes(["train_mem.py", "--bits", "16"]), uses_bitsandbytes(["train_mem.py", "--bits=4"])
        (False, True)
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = dict(zip(words, words[1:]))
    optimizer = given.get("--optim", "")
    return given.get("--bits", "16") in ("4", "8") or any(name in optimizer for name in _ITS_OPTIMIZERS)


class _SilentLoader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _unheard(module.__name__):
            warnings.simplefilter("ignore")
            self._loader.exec_module(module)


@contextlib.contextmanager
def _unheard(name: str) -> Iterator[None]:
    """Drop what the logger of a library, and those below it, say inside the ``with`` block."""
    logger, handler = logging.getLogger(name), logging.NullHandler()
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class SilentImports(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module of `SILENT`, and wraps its loader."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """The spec of a silent module; None for any other module."""
        if fullname not in SILENT:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _SilentLoader(spec.loader)
        return spec


@contextlib.contextmanager
def silent_imports() -> Any:
    """Silence the imports of `SILENT` inside the ``with`` block."""
    finder = SilentImports()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
