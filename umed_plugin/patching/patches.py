"""The patch contract: recorded replacements, and patches that know which code they fit.

After the trigger module of a patch is imported (`umed_plugin.patching.import_hook`), all patches of that trigger are verified
before the first is applied. A patch that does not fit raises `PatchMisfit`, so training stops before the model is loaded. `undo`
and `undo_all` restore everything, newest first.

Importing this module imports only the standard library, and no patched library. ``umed patches`` shows which patches fit.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.patching.other_projects import other_project

# Import name -> possible distributions: LLaVA's forks share the import name `llava`.
DISTRIBUTIONS = {"llava": ("llava-torch", "llava", "llava-med", "llava_med", "llava-next")}
_ABSENT = object()


class PatchMisfit(UmedError):
    """A patch was written for other code than the installed code."""


@dataclass(frozen=True)
class Target:
    """One object that a patch replaces or relies on.

    Args:
        path: ``module:attribute.path``, for example ``llava.train.train:train``.
        versions: ranges of the library's version, for example ``>=4.36,<4.37 || >=5.23,<5.24``. Version strings do not prove
            much (LLaVA's tag 1.2.0 calls itself 1.1.3), so the hash must match too.
        sha256: accepted hashes of ``inspect.getsource`` of the object; empty if the object has no source of its own
            (a dictionary, a module).
    """

    path: str
    versions: str
    sha256: tuple[str, ...]

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Patch:
    """A change to another library: what, why, for which versions, and until when.

    Args:
        name: the patch's file name in ``patches/``, without ``.py``.
        targets: everything that it replaces or relies on.
        why: what goes wrong without it.
        delete_when: what must happen before the file can be deleted.
        change: makes the change through the recorder that it is given.
        trigger: module after whose import the patch is applied.
        needed: library and range of versions that need this change, for example ``("transformers", ">=5")``. With other versions,
            or without the library, the patch is neither verified nor applied. None: needed with all versions.
    """

    name: str
    targets: tuple[Target, ...]
    why: str
    delete_when: str
    change: Callable[[Recorder], None]
    trigger: str = "llava.train.train"
    needed: tuple[str, str] | None = None

    def not_needed(self) -> str | None:
        """Why the installed libraries do not need this patch, as text; None if it is needed."""
        if self.needed is None:
            return None
        library, versions = self.needed
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
        version = installed(library)[1]
        return None if version_fits(version, versions) else f"{library} {version} is not {versions}"

    def apply(self, recorder: Recorder) -> None:
        """Make the change; ``recorder`` records every replacement."""
        self.change(recorder)


@dataclass(frozen=True)
class Replacement:
    """One recorded replacement; ``old`` is absent if the name was inherited or new."""

    owner: Any
    name: str
    old: Any
    new: Any
    is_item: bool

    def current(self) -> Any:
        return self.owner.get(self.name, _ABSENT) if self.is_item else getattr(self.owner, self.name, _ABSENT)

    def restore(self) -> None:
        if self.is_item:
            if self.old is _ABSENT:
                del self.owner[self.name]
            else:
                self.owner[self.name] = self.old
        elif self.old is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)


@dataclass
class Recorder:
    """Replaces attributes and dictionary items, and records how to restore them (like pytest's monkeypatch)."""

    done: list[Replacement] = field(default_factory=list)

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Set ``owner.name``, which must exist (it may be inherited).

        Raises:
            PatchMisfit: it does not exist.
        """
        if not hasattr(owner, name):
            raise PatchMisfit(f"nothing to replace: {getattr(owner, '__name__', owner)!r} has no {name!r}.")
        old = inspect.getattr_static(owner, name) if name in vars(owner) else _ABSENT
        self.done.append(Replacement(owner, name, old, new, is_item=False))
        setattr(owner, name, new)

    def add(self, owner: Any, name: str, new: Any) -> None:
        """Set ``owner.name``, which must not exist.

        Raises:
            PatchMisfit: it exists already.
        """
        if hasattr(owner, name):
            raise PatchMisfit(f"nothing to add: {getattr(owner, '__name__', owner)!r} has {name!r} already.")
        self.done.append(Replacement(owner, name, _ABSENT, new, is_item=False))
        setattr(owner, name, new)

    def add_item(self, owner: dict, name: str, new: Any) -> None:
        """Set ``owner[name]``, whether or not it exists."""
        self.done.append(Replacement(owner, name, owner.get(name, _ABSENT), new, is_item=True))
        owner[name] = new

    def undo(self) -> None:
        """Restore everything, newest first."""
        while self.done:
            self.done.pop().restore()


# Applied patches in order. The module object distinguishes a fresh import from the module that was patched.
_applied: dict[str, tuple[Patch, Recorder, ModuleType]] = {}


def original(owner: Any, name: str) -> Any:
    """``owner.name`` as its library defines it, even if applied patches have replaced it."""
    for _, recorder, _ in _applied.values():
        for replacement in recorder.done:
            if replacement.owner is owner and replacement.name == name and not replacement.is_item:
                return (
                    getattr(super(owner, owner), name) if replacement.old is _ABSENT else _bound(owner, replacement.old)
                )
    return getattr(owner, name)


def _bound(owner: Any, old: Any) -> Any:
    """Bind a class's raw method, as attribute access would."""
    return old.__get__(None, owner) if isinstance(owner, type) and hasattr(old, "__get__") else old


def resolve(path: str) -> tuple[Any, str]:
    """Owner and name of ``module:attribute.path``. Imports the module."""
    module_name, _, attribute = path.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = attribute.split(".")
    for parent in parents:
        owner = original(owner, parent)
    return owner, name


def source_hash(thing: Any) -> str:
    """SHA-256 of the source text of a function or class, without decorators that set ``__wrapped__``."""
    return hashlib.sha256(inspect.getsource(inspect.unwrap(thing)).encode()).hexdigest()


@functools.cache  # reading the metadata of a library takes milliseconds, and every patch asks
def installed(library: str) -> tuple[str, str]:
    """Distribution name and version of an import name; the import name and ``unknown`` if there is no metadata."""
    for name in DISTRIBUTIONS.get(library, (library,)):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return library, "unknown"


def version_fits(version: str, versions: str) -> bool:
    """Whether a version lies in a range.

    A pre-release counts as the release that it leads to, and local and post-release parts do not count: of ``<5`` and ``>=5``
    exactly one holds for 5.0.0rc1. Hashes judge the source itself.

    Args:
        version: as metadata gives it. Of one that PEP 440 does not allow, such as ``1.2-med``, the leading numbers count; one
            without them, such as ``unknown``, is in every range.
        versions: PEP 440 specifiers, such as ``>=1.1.3,<1.3``, or several of them separated by ``||``.

    Raises:
        ValueError: ``versions`` is not such a range, or has nothing on one side of a ``||``.

    Example:
        >>> version_fits("2.13.0+cpu", ">=2.0,<2.2 || >=2.13")
        True
    """
    # Not at the top of the file: every Python under umed-run imports this module, with or without site-packages.
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    ranges = [SpecifierSet(specifiers) for specifiers in versions.split("||")]
    if not all(len(specifiers) for specifiers in ranges):  # an empty set would hold every version
        raise ValueError(f"Invalid specifier: a range in {versions!r} is empty; write each as in '>=1.1.3,<1.3'")
    try:
        release = Version(version).base_version
    except InvalidVersion:
        numbers = re.match(r"\d+(\.\d+)*", version)
        if numbers is None:
            return True
        release = numbers.group()
    return any(release in specifiers for specifiers in ranges)


def misfit(patch: Patch) -> str | None:
    """Why ``patch`` does not fit the installed libraries, as one message; None if it fits or is not needed.

    Imports the targets' modules.
    """
    if patch.not_needed():
        return None
    for target in patch.targets:
        reason = _target_misfit(target)
        if reason:
            distribution, version = installed(target.library)
            module = sys.modules.get(target.library)
            return (
                f"patch {patch.name!r} does not fit {target.path}: {reason}\n"
                f"  installed: {distribution} {version} ({getattr(module, '__file__', 'not importable')})\n"
                f"  known: {target.library} {target.versions}\n"
                f"  it exists because: {patch.why}\n"
                "  remedy: install a known version. Or compare the installed source with what the patch replaces; if the patch "
                f"still fits, add the hash to patches/{patch.name}.py. `umed patches` lists all patches."
            )
    return None


def _target_misfit(target: Target) -> str | None:
    try:
        owner, name = resolve(target.path)
        target_object = original(owner, name)
    except (ImportError, AttributeError, KeyError) as error:  # KeyError: importing its package ended early
        return f"the target is missing ({error})."
    except PatchMisfit as error:
        return f"importing it applies another patch, and {error}"
    version = installed(target.library)[1]
    if not version_fits(version, target.versions):
        return f"version {version} is outside the known range."
    if not target.sha256:
        return None
    digest = source_hash(target_object)
    return None if digest in target.sha256 else f"its source has the unknown SHA-256 {digest}."


def apply(patches: Sequence[Patch]) -> None:
    """Verify all of ``patches``, then apply those that are needed and not applied yet.

    Raises:
        PatchMisfit: a patch does not fit; none of them was applied.
    """
    pending = []
    for patch in patches:
        if patch.not_needed():
            continue
        module = importlib.import_module(patch.trigger)
        if patch.name in _applied:
            if _applied[patch.name][2] is module:
                continue
            _undo_one(patch.name)
        pending.append((patch, module))
    misfits = [message for message in (misfit(patch) for patch, _ in pending) if message]
    if misfits:
        other = other_project() if any(patch.trigger.startswith("llava") for patch, _ in pending) else None
        raise PatchMisfit("\n".join(misfits) if other is None else str(other))
    for patch, module in pending:
        recorder = Recorder()
        _applied[patch.name] = (patch, recorder, module)
        try:
            patch.apply(recorder)
        except BaseException:
            _undo_one(patch.name)
            raise


def is_applied(patch: Patch) -> bool:
    """Whether ``patch`` is applied."""
    return patch.name in _applied


def undo(patch: Patch) -> None:
    """Undo one patch; does nothing if it is not applied.

    Raises:
        PatchMisfit: the same target was replaced again since; undo that first.
    """
    if patch.name not in _applied:
        return
    for replacement in reversed(_applied[patch.name][1].done):
        if replacement.current() is not replacement.new and not isinstance(
            replacement.new, (classmethod, staticmethod)
        ):
            raise PatchMisfit(
                f"patch {patch.name!r} cannot be undone: {replacement.name!r} was replaced again. Use undo_all()."
            )
    _undo_one(patch.name)


def undo_all() -> None:
    """Undo every patch, newest first."""
    for name in reversed(list(_applied)):
        _undo_one(name)


def _undo_one(name: str) -> None:
    _applied.pop(name)[1].undo()
