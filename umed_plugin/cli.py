"""The ``umed`` command: ``umed COMMAND ...``, or ``python -m umed_plugin.cli COMMAND ...``.

Exit status: 0 done, 1 failed (the message says what to fix), 2 wrong usage, 130 interrupted. An error that the user can fix is
printed as one message; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from umed_plugin import __version__
from umed_plugin.commands import add_commands
from umed_plugin.errors import UmedError, UsageError, unknown_name

DONE, FAILED, WRONG_USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UsageError`, with a suggestion for a misspelled word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting: only `main` sets exit statuses."""
        raise UsageError(f"{message}\nSee {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        kind = "command" if isinstance(action, argparse._SubParsersAction) else "value"
        named = None if kind == "command" else action
        raise argparse.ArgumentError(named, unknown_name(kind, str(value), [str(choice) for choice in action.choices]))


def build_parser() -> Parser:
    """The parser with every command of `umed_plugin.commands`."""
    parser = Parser(
        prog="umed",
        description="Upgrade a LLaVA-Med-style checkpoint to UMed-LVLM inside an existing LLaVA environment.",
        epilog="example:\n  umed demo --out runs/demo\n\nTraining itself runs through umed-run: see umed-run --help.",
    )
    parser.add_argument("--version", action="version", version=f"umed-plugin {__version__}")
    add_commands(parser.add_subparsers(title="commands", dest="command", metavar="COMMAND"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return DONE
        return int(args.run(args))
    except UsageError as error:
        print(f"umed: {error}", file=sys.stderr)
        return WRONG_USAGE
    except UmedError as error:
        print(f"umed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("umed: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `umed recipe list | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


if __name__ == "__main__":
    sys.exit(main())
