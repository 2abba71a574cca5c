"""Python runs this at the start of every child of ``umed-run``, which puts this folder on PYTHONPATH.

When `llava` is imported, it installs the hook that applies the patches, and silences bitsandbytes where a run does not use it. It
also runs the sitecustomize that it hides, if any. A Python process that does not use LLaVA loses no time and cannot fail here.
Python would only print an error raised here, so an error is kept and raised when LLaVA's training code is imported.
"""

import os
import sys
from importlib.machinery import PathFinder

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


class UmedDoor:
    """A finder that finds nothing; when `llava` is imported, it replaces itself with the real hook."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "llava":
            sys.meta_path.remove(self)
            _install()


class _Refusal:
    """A finder that blocks the import of LLaVA's training code, because the patches could not be installed."""

    def __init__(self, reason):
        self.reason = reason

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "llava.train.llava_trainer":
            raise RuntimeError(
                "umed-run could not install its patches in this Python, so training must not start: " + self.reason
            )


def _install():
    try:
        from umed_plugin.patches import TRIGGERS, after_import
        from umed_plugin.patching.import_hook import install
        from umed_plugin.terminal.silent_imports import SilentImports, uses_bitsandbytes

        install(TRIGGERS, after_import)
        if not uses_bitsandbytes(sys.argv):
            sys.meta_path.insert(0, SilentImports())
    except (ImportError, SyntaxError, AttributeError, TypeError) as error:
        sys.meta_path.insert(0, _Refusal(type(error).__name__ + ": " + str(error)))


def _find_plugin():
    """Make this copy of umed_plugin importable, even if the checkout is neither installed nor the current folder."""
    spec = PathFinder.find_spec("umed_plugin")
    if spec is None:
        sys.path.append(ROOT)
    elif spec.origin is None or os.path.dirname(os.path.realpath(spec.origin)) != os.path.dirname(
        os.path.realpath(HERE)
    ):
        sys.path.insert(0, ROOT)


def _run_hidden():
    """Run the next sitecustomize on the path, as Python would without this one."""
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != os.path.realpath(HERE)]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is None or spec.loader is None:
        return
    import importlib.util

    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


_find_plugin()
sys.meta_path.insert(0, UmedDoor())
_run_hidden()
