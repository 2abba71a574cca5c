"""Names for the things that a user can choose or add: annotation readers, rewards, judges.

A name of the form ``my_module:my_object`` is imported from the user's own file instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from umed_plugin.errors import UsageError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary from name to object whose lookup errors tell the user what exists.

    Args:
        kind: what the entries are, in the words of an error message ("reward", "annotation reader").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an object under ``name``; a name can be taken once."""

        def add(entry: T) -> T:
            if name in self._entries:
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
        if name not in self._entries:
            raise UsageError(unknown_name(self.kind, name, self._entries) + " Your own: 'my_module:my_object'.")
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

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
