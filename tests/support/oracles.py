"""Public implementations that tests compare with: the extra ``test`` brings them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


def oracle(name: str) -> ModuleType:
    """The module, or a skipped test that says why; a failed one in an environment that `make test` made for the tests.

    `constraints/environment.sh` marks what it has made, with the extra ``test`` in it: there nothing may be missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if Path(sys.prefix, ".complete").is_file():
            raise
    pytest.skip(f"{name} is not installed in this environment; in those that `make test` makes it is")
