"""Python runs this at the start of every child of ``umed-run``, which puts this folder on PYTHONPATH.

It installs the hook that applies the patches after LLaVA's training code has been imported, and then runs the sitecustomize
that it hides, if there is one. It must not fail in a Python that has nothing to do with LLaVA, and Python would only print an
error that is raised here; so an error is kept and raised when LLaVA's training code is imported.
"""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


class _Refusal:
    """A finder that lets nobody import LLaVA's training code, because its patches could not be installed."""

    def __init__(self, reason):
        self.reason = reason

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "llava.train.llava_trainer":
            raise RuntimeError(
                "umed-run could not install its patches in this Python, so training must not start: " + self.reason
            )


def _find_plugin():
    """Make this very copy of umed_plugin importable: a checkout need not be installed, nor be the current folder."""
    spec = importlib.util.find_spec("umed_plugin")
    if spec is None:
        sys.path.append(ROOT)
    elif os.path.dirname(os.path.realpath(spec.origin)) != os.path.realpath(os.path.join(ROOT, "umed_plugin")):
        sys.path.insert(0, ROOT)


def _install():
    try:
        _find_plugin()
        from umed_plugin.patches import TRIGGERS, after_import

        from umed_plugin.patching import install

        install(TRIGGERS, after_import)
    except (ImportError, SyntaxError, AttributeError, TypeError) as error:
        sys.meta_path.insert(0, _Refusal(f"{type(error).__name__}: {error}"))


def _run_hidden():
    """Run the next sitecustomize on the path, as Python would have done without this one."""
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != os.path.realpath(HERE)]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


_install()
_run_hidden()
