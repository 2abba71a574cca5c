"""The subcommands of ``umed``, one module each.

A command module has ``add_parser(subparsers)``, which adds its parser with a description, an example in the epilog and
``set_defaults(run=function)``; ``run(args)`` returns the exit status. Heavy imports stand inside ``run``, so that
``umed --help`` answers at once and in an environment without LLaVA.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# In the order in which a person meets them, which is the order of the help text.
COMMANDS = ("demo", "upgrade", "recipe", "evaluate", "report", "serve", "merge", "convert", "doctor", "patches")


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Let every command add its parser."""
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
