"""The subcommands of ``umed``: a module each, or a folder with ``command.py`` where a command has more than that.

A command module has ``add_parser(subparsers)``, which adds its parser with a description, an example in the epilog and
``set_defaults(run=function)``; ``run(args)`` returns the exit status. Heavy imports stand inside ``run``, so that
``umed --help`` answers at once and in an environment without LLaVA.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# In the order in which a person meets them, which is the order of the help text.
COMMANDS = (
    "demo.command",
    "upgrade.command",
    "recipe.command",
    "evaluate",
    "status",
    "report.command",
    "serve.command",
    "merge",
    "convert",
    "rollout_server",
    "doctor.command",
    "patches",
)


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Let every command add its parser."""
    for module in COMMANDS:
        importlib.import_module(f"{__name__}.{module}").add_parser(subparsers)
