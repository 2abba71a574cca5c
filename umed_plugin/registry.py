"""Registries of what a user can choose by name or add: annotation readers, rewards, judges.

A name of the form ``my_module:my_object`` is imported from the user's own file instead.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from umed_plugin.errors import UsageError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary from name to object. A failed lookup raises an error that lists the names that exist.

    Args:
        kind: what the entries are, as error messages call them ("reward", "annotation reader").
        package: the package whose modules register the entries that the plugin ships. All of them are imported at the first
            lookup, so that a new entry is one new file and no list has to name it. Empty: nothing is imported.
    """

    def __init__(self, kind: str, package: str = "") -> None:
        self.kind = kind
        self._package = package
        self._discovering = False
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds an object under ``name``.

        A name can be taken once. Running the same definition again, as a notebook does, replaces the entry. The decorator raises
        ValueError if another object has the name, whether the user or the plugin registered it.
        """

        def add(entry: T) -> T:
            if not self._discovering and not self._is_shipped(entry):
                self._discover()  # otherwise the clash would be found later, and at a line of the plugin
            if name in self._entries and _origin(self._entries[name]) != _origin(entry):
                raise ValueError(f"{self.kind} {name!r} is registered already, as {self._entries[name]!r}")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry called ``name``, or import it when the name is ``module:attribute``.

        Raises:
            UsageError: the name, the module or its attribute does not exist.
        """
        if ":" in name:
            return self._import(name)
        if name not in self:
            raise UsageError(unknown_name(self.kind, name, self) + " Your own: 'my_module:my_object'.")
        return self._entries[name]

    def _import(self, name: str) -> T:
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
            raise UsageError(
                f"{self.kind} {name!r}: there is no module {module_name!r} on sys.path. "
                "Start from the folder that holds it, or add that folder to PYTHONPATH."
            ) from error
        if not hasattr(module, attribute):
            raise UsageError(f"{self.kind} {name!r}: {module.__file__} has no {attribute!r}.")
        return getattr(module, attribute)

    def _discover(self) -> None:
        """Import every module of the package once; each registers its entries while it is imported."""
        if not self._package:
            return
        self._discovering = True
        try:
            for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__, f"{self._package}."):
                importlib.import_module(module.name)
        finally:
            self._discovering = False
        self._package = ""

    def _is_shipped(self, entry: T) -> bool:
        """Whether an entry was defined in the package, so that its module may be in the middle of its own import."""
        return f"{getattr(entry, '__module__', '')}.".startswith(f"{self._package}.")

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._entries))


def _origin(entry: Any) -> tuple[Any, Any]:
    """Where an object was defined: equal for two runs of one definition."""
    return getattr(entry, "__module__", None), getattr(entry, "__qualname__", id(entry))
