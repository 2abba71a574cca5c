"""The ``umed`` command: ``umed COMMAND ...``, or ``python -m umed_plugin.cli COMMAND ...``.

Exit status: 0 done, 1 failed (the message says what to fix), 2 wrong usage, 130 interrupted, 141 nobody reads the output, 128 + N
ended by signal N. An error that the user can fix is printed as one message. Any other exception is a bug: it is printed
as one line, and with its traceback if the environment has UMED_TRACEBACK=1.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from umed_plugin import __version__
from umed_plugin.commands import add_commands, signals
from umed_plugin.errors import UmedError, UsageError, did_you_mean, fail, unknown_name
from umed_plugin.files import failed_write
from umed_plugin.terminal.console import guarded_streams
from umed_plugin.terminal.progress import be_quiet
from umed_plugin.terminal.silent_imports import silent_imports
from umed_plugin.terminal.text import one_line

DONE, FAILED, WRONG_USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141
TRACEBACK = "UMED_TRACEBACK"
_REQUIRED = "the following arguments are required"  # how argparse's message begins
# What a training command begins with.
_TRAINING_COMMANDS = ("python", "python3", "bash", "sh", "torchrun", "deepspeed", "accelerate")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Logger -> its words that nobody can act on. "" is the root logger.
_NOT_TOLD = {
    "": "xformers not found",  # LLaVA: it is optional
    "transformers.configuration_utils": "to instantiate a model of type ``",  # it does not know LLaVA's model types
    "transformers.utils.import_utils": "requires torchvision (not installed)",  # the other reader is as good
}
_LONGEST = 300  # characters of an unforeseen error's message


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UsageError`, with a suggestion for a misspelled word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting: only `main` sets exit statuses."""
        if message.startswith(
            _REQUIRED
        ):  # argparse looks for these first; a misspelled flag is often why one is missing
            message += "".join(f"\n{line}" for line in self._misspelled())
        raise UsageError(f"{message}\nSee {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but unknown arguments are an error of the parser that met them, which knows its flags and its help."""
        self._given = [*map(str, sys.argv[1:] if args is None else args)]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(_unknown_arguments(unknown, self._option_string_actions))
        return found, unknown

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help at once: where nobody reads it, `main` learns that here, and not Python as it ends."""
        print(message, end="", file=file or sys.stderr, flush=True)

    def _misspelled(self) -> list[str]:
        """A sentence for each flag that was given and is not known."""
        flags = self._option_string_actions
        names = [word.partition("=")[0] for word in self._given if word.startswith("--") and word != "--"]
        wrong = [name for name in names if not any(flag.startswith(name) for flag in flags)]
        return _unknown_arguments(wrong, flags).split("\n") if wrong else []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        kind = "command" if isinstance(action, argparse._SubParsersAction) else "value"
        named = None if kind == "command" else action
        if kind == "command" and (
            os.path.basename(str(value)) in _TRAINING_COMMANDS or str(value).endswith((".sh", ".py"))
        ):
            raise argparse.ArgumentError(
                named, f"{value} is not a command of umed. Training runs through umed-run: umed-run {value} ..."
            )
        raise argparse.ArgumentError(named, unknown_name(kind, str(value), [str(choice) for choice in action.choices]))


def _unknown_arguments(unknown: Sequence[str], flags: Iterable[str]) -> str:
    """A sentence for each unknown flag, with the one that was probably meant; else for each word too many."""
    names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not names:
        return f"unexpected arguments: {' '.join(unknown)}."
    known = [flag for flag in flags if flag.startswith("--")]
    return "\n".join(f"unknown flag {name}.{did_you_mean(name, known)}" for name in names)


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
    try:
        with guarded_streams(), silent_imports(), signals.raised():
            return _run(argv)
    finally:
        be_quiet(False)


def _run(argv: Sequence[str] | None) -> int:
    _silence_libraries()
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return DONE
        be_quiet(getattr(args, "quiet", False))
        status = int(args.run(args))
        sys.stdout.flush()  # as for help
        return status
    except UsageError as error:
        fail(str(error))
        return WRONG_USAGE
    except UmedError as error:
        fail(str(error))
        return FAILED
    except KeyboardInterrupt:
        fail("interrupted")
        return INTERRUPTED
    except signals.Ended as error:
        fail(f"ended by {error}")
        return error.status
    except BrokenPipeError:  # `umed recipe list | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except Exception as error:  # noqa: BLE001  the last line of every command
        return _unforeseen(error)


def _unforeseen(error: Exception) -> int:
    """One line for what no command has foreseen; the traceback on demand."""
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    elif isinstance(error, OSError) and error.strerror:
        # The disk is full, a folder is read-only: the machine says what is wrong, and the user can change it.
        fail(f"{one_line(error.filename or 'reading or writing')}: {error.strerror}.")
    elif found := _OS_ERROR.search(str(error)):  # safetensors writes in Rust and raises an exception of its own
        fail(f"reading or writing: {os.strerror(int(found[1]))}.")
    elif reason := failed_write(error):
        fail(f"{one_line(reason)}.")
    elif isinstance(error, UnicodeEncodeError) and "utf" not in error.encoding.lower():
        fail(
            f"the locale of this process ({error.encoding}) has no character {error.object[error.start]!a}, which a file name "
            "needs. Set another locale: export PYTHONUTF8=1"
        )
    elif isinstance(error, MemoryError):
        fail(f"there is not enough memory: {one_line(error) or 'MemoryError'}")
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = one_line(f"{type(error).__name__}: {error}")
        what = what if len(what) <= _LONGEST else f"{what[:_LONGEST]} ..."
        fail(
            f"unexpected error: {what} ({place.filename}, line {place.lineno}). This is a bug: please report it to the "
            f"authors of umed-plugin, with what the same command prints after `export {TRACEBACK}=1`."
        )
    return FAILED


def _silence_libraries() -> None:
    """Hide what libraries say about hardware and packages that the command does not use, and about what is so in every LLaVA."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        warnings.filterwarnings("ignore", message="`rope_scaling` is deprecated", category=FutureWarning)
    for logger in _NOT_TOLD:
        logging.getLogger(logger).addFilter(_is_to_be_told)


def _is_to_be_told(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in _NOT_TOLD.values())


if __name__ == "__main__":
    sys.exit(main())
