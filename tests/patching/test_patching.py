"""The machinery of patches on a library made for the test: every order of import, patch, patch twice and undo."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from umed_plugin import patching
from umed_plugin.patching import Patch, PatchMisfit, Recorder, Target, import_hook

SOURCE = """
VALUE = 1
TABLE = {"a": 1}

def answer():
    return 41

class Base:
    def inherited(self):
        return "base"

class Thing(Base):
    @classmethod
    def make(cls):
        return cls
"""
CHANGED = SOURCE.replace("41", "40")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A module ``fakelib`` that can be imported; whatever was applied or installed is gone afterwards."""
    # A file written twice within a second keeps its time stamp, and then an old .pyc would be taken for the new source.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "fakelib.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    hooks = [finder for finder in sys.meta_path if isinstance(finder, import_hook.PostImportFinder)]
    yield tmp_path / "fakelib.py"
    patching.undo_all()
    sys.modules.pop("fakelib", None)
    for finder in [f for f in sys.meta_path if isinstance(f, import_hook.PostImportFinder) and f not in hooks]:
        import_hook.uninstall(finder)


def change(recorder: Recorder) -> None:
    fakelib = sys.modules["fakelib"]
    stock = fakelib.answer
    recorder.replace(fakelib, "answer", lambda: stock() + 1)
    recorder.replace(fakelib.Thing, "inherited", lambda self: "patched")
    recorder.replace(fakelib.Thing, "make", classmethod(lambda cls: "patched"))
    recorder.add_item(fakelib.TABLE, "b", 2)


def make_patch(library, name="answer", do=change, sha256=None):
    """A patch of ``fakelib.answer`` that knows its present source."""
    if sha256 is None:
        namespace = importlib.import_module("fakelib")
        sha256 = patching.source_hash(namespace.answer)
        sys.modules.pop("fakelib")
    target = Target("fakelib:answer", ">=1", (sha256,))
    return Patch(name, (target,), why="a test", delete_when="never", change=do, trigger="fakelib")


def state(fakelib):
    thing = fakelib.Thing
    return fakelib.answer(), thing().inherited(), thing.make(), dict(fakelib.TABLE), "inherited" in vars(thing)


PATCHED = (42, "patched", "patched", {"a": 1, "b": 2}, True)


def stock_state(fakelib):
    return 41, "base", fakelib.Thing, {"a": 1}, False


@pytest.mark.parametrize("order", ["import-install", "install-import", "install-twice", "patch-twice", "import-patch"])
def test_every_order_patches_once_and_undoes(library, order):
    patch = make_patch(library)

    def after(name):
        patching.apply([patch])

    steps = {
        "import": lambda: importlib.import_module("fakelib"),
        "install": lambda: import_hook.install(["fakelib"], after),
    }
    steps["patch"] = lambda: patching.apply([patch])
    for step in order.replace("twice", order.split("-")[0]).split("-"):
        steps[step]()
    fakelib = importlib.import_module("fakelib")
    assert state(fakelib) == PATCHED
    patching.apply([patch])
    assert state(fakelib) == PATCHED
    patching.undo(patch)
    patching.undo(patch)
    assert state(fakelib) == stock_state(fakelib)
    patching.apply([patch])
    assert state(fakelib) == PATCHED
    patching.undo_all()
    assert state(fakelib) == stock_state(fakelib)


def test_a_fresh_import_is_patched_again(library):
    patch = make_patch(library)
    import_hook.install(["fakelib"], lambda name: patching.apply([patch]))
    first = importlib.import_module("fakelib")
    del sys.modules["fakelib"]
    second = importlib.import_module("fakelib")
    assert second is not first
    assert state(second) == PATCHED
    assert state(first) == stock_state(first)


def test_the_hook_leaves_the_module_its_own_loader_and_source(library):
    import_hook.install(["fakelib"], lambda name: None)
    fakelib = importlib.import_module("fakelib")
    assert type(fakelib.__loader__).__name__ == "SourceFileLoader"
    assert fakelib.__spec__.loader is fakelib.__loader__


def test_two_hooks_do_not_ask_each_other_for_ever(library):
    seen = []
    import_hook.install(["fakelib"], lambda name: seen.append(1))
    import_hook.install(["fakelib"], lambda name: seen.append(2))
    importlib.import_module("fakelib")
    assert sorted(seen) == [1, 2]


def test_two_patches_of_one_target_see_the_original_source_and_undo_in_reverse(library):
    first = make_patch(library)
    second = make_patch(library, name="second", do=_times_ten)
    fakelib = importlib.import_module("fakelib")
    patching.apply([first])
    patching.apply([second])
    assert fakelib.answer() == 420
    assert patching.original(fakelib, "answer")() == 41
    with pytest.raises(PatchMisfit, match="replaced again"):
        patching.undo(first)
    patching.undo_all()
    assert state(fakelib) == stock_state(fakelib)


def _times_ten(recorder):
    fakelib = sys.modules["fakelib"]
    stock = fakelib.answer
    recorder.replace(fakelib, "answer", lambda: stock() * 10)


def test_a_changed_source_is_refused_and_nothing_is_applied(library):
    good = make_patch(library, name="good")
    known = make_patch(library, name="other")
    library.write_text(CHANGED)
    importlib.invalidate_caches()
    fitting = Patch("fits", (), "a test", "never", change, trigger="fakelib")
    with pytest.raises(PatchMisfit) as caught:
        patching.apply([fitting, good, known])
    message = str(caught.value)
    fakelib = importlib.import_module("fakelib")
    for part in ("'good'", "'other'", "fakelib:answer", "unknown", patching.source_hash(fakelib.answer), "remedy"):
        assert part in message
    assert fakelib.answer() == 40
    assert not patching.is_applied(fitting)


@pytest.mark.parametrize("path", ["fakelib:gone", "fakelib.gone:answer", "fakelib:Thing.gone"])
def test_a_missing_target_is_refused(library, path):
    patch = Patch("p", (Target(path, ">=1", ()),), "a test", "never", change, trigger="fakelib")
    with pytest.raises(PatchMisfit, match="missing"):
        patching.apply([patch])


def test_a_version_outside_the_range_is_refused(library):
    patch = Patch("p", (Target("pytest:fixture", "<1.0", ()),), "a test", "never", change, trigger="fakelib")
    with pytest.raises(PatchMisfit, match="outside the known range"):
        patching.apply([patch])


def test_a_patch_that_fails_half_way_leaves_nothing_behind(library):
    def half(recorder):
        change(recorder)
        recorder.replace(sys.modules["fakelib"], "gone", 1)

    with pytest.raises(PatchMisfit, match="nothing to replace"):
        patching.apply([make_patch(library, do=half)])
    fakelib = importlib.import_module("fakelib")
    assert state(fakelib) == stock_state(fakelib)


@pytest.mark.parametrize(
    ("version", "versions", "fits"),
    [
        ("1.2.2.post1", ">=1.1.3,<1.3", True),
        ("1.3", ">=1.1.3,<1.3", False),
        ("1.3.0", ">=1.1.3,<1.3", False),
        ("2.0.1+cu117", ">=2.0,<2.1", True),
        ("4.36.2", ">=4.36,<4.37", True),
        ("1.1.2", ">=1.1.3", False),
        ("2", "==2.0", True),
        ("unknown", ">=1", True),
        ("1.2.2-med", ">=1.1.3,<1.3", True),
        ("1.3-med", ">=1.1.3,<1.3", False),
        ("2.1.0a0.nv23.dirty", ">=2.2", False),
        ("2.13.0+cpu", ">=2.13", True),
        ("2.13.0+cpu", "<2.13", False),
        ("4.37.0.dev0", ">=4.36,<4.38", True),
        ("4.37.0.dev0", ">=4.37,<4.38", True),
        ("4.37.0.dev0", "<4.37", False),
        ("1.3.0rc1", ">=1.1.3,<1.3", False),
        ("5.23.1", ">=4.36,<4.38 || >=5.23,<5.24", True),
        ("4.40.0", ">=4.36,<4.38 || >=5.23,<5.24", False),
    ],
)
def test_version_ranges(version, versions, fits):
    assert patching.version_fits(version, versions) is fits


@pytest.mark.parametrize("version", ["5.0.0rc1", "5.0.0.dev0", "4.57.6", "5.0.0+cu130", "5.0.0.post1"])
def test_a_version_is_on_one_side_of_a_limit(version):
    """Otherwise patches for before and from 5 on would both be left out, and LLaVA would run without either."""
    assert patching.version_fits(version, "<5") is not patching.version_fits(version, ">=5")


@pytest.mark.parametrize("versions", ["4.36", ">=4.36 <4.37", "=>4", ">=4.36,<4.38 | >=5"])
def test_what_is_not_a_range_is_an_error(versions):
    with pytest.raises(ValueError, match="Invalid specifier"):
        patching.version_fits("4.36", versions)


@pytest.mark.parametrize("versions", ["", ">=1 ||", "|| >=1", ">=1 || || <5", ",", ">=1 || ,"])
def test_an_empty_range_is_an_error(versions):
    """It would hold every version."""
    for version in ("4.36", "unknown"):
        with pytest.raises(ValueError, match=r"Invalid specifier: a range in '.*' is empty"):
            patching.version_fits(version, versions)


@pytest.mark.parametrize("name", ["umed_plugin.patching", "umed_plugin.patching.import_hook", "umed_plugin.patches"])
def test_packaging_is_imported_by_the_first_comparison_alone(name):
    code = (
        f"import sys, {name}; from umed_plugin.patching import version_fits; before = 'packaging' in sys.modules;"
        "print(before, version_fits('1', '>=1'), 'packaging' in sys.modules)"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False True True\n", done.stderr
