"""The ``umed`` command from outside: help, exit statuses, suggestions, and what it leaves unimported."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from umed_plugin import __version__, cli
from umed_plugin.commands import COMMANDS
from umed_plugin.errors import UmedError, UsageError, did_you_mean


def subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every parser below ``parser``, at any depth."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield child
                yield from subcommands(child)


def leaves() -> list[Any]:
    parsers = [parser for parser in subcommands(cli.build_parser()) if not list(subcommands(parser))]
    return [pytest.param(parser, id=parser.prog) for parser in parsers]


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command that raises ``error``."""

    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli, "add_commands", lambda parsers: parsers.add_parser("work").set_defaults(run=run))
    return cli.main(["work"])


def test_alone_it_prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {module.partition('.')[0].replace('_', '-')}" in shown for module in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("recipe check brain_tumor_coco --dataroot D", "unknown flag --dataroot. Did you mean '--data-root'?"),
        ("evaluate C --benchmrk vqa_rad --ot=x", "unknown flag --benchmrk. Did you mean '--benchmark'?"),
        ("patches all", "unexpected arguments: all."),
        ("torchrun --nproc_per_node 2 train.py", "Training runs through umed-run: umed-run torchrun"),
        ("scripts/finetune.sh", "Training runs through umed-run: umed-run scripts/finetune.sh"),
    ],
)
def test_a_word_that_no_command_knows_is_named_with_what_was_meant(typed: str, said: str, capsys: Any) -> None:
    assert cli.main(typed.split()) == cli.WRONG_USAGE
    shown = capsys.readouterr().err
    assert said in shown
    command = " ".join(["umed", *typed.split()[: 2 if typed.startswith("recipe") else 1]])
    assert f"See {'umed' if 'umed-run' in said else command} --help" in shown, "the help of the command, and not umed's"


def test_words_in_another_order_are_what_was_meant() -> None:
    assert did_you_mean("mistral_umed", ["mistral_direct", "umed_mistral"]) == " Did you mean 'umed_mistral'?"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"umed-plugin {__version__}\n"


@pytest.mark.parametrize("parser", leaves())
def test_help_has_a_description_and_an_example(parser: argparse.ArgumentParser) -> None:
    assert parser.description
    assert parser.epilog and f"  {parser.prog}" in parser.epilog, "an example that can be copied"
    assert parser.epilog in parser.format_help(), "its lines are kept"


@pytest.mark.parametrize("parser", leaves())
def test_every_argument_is_explained_and_a_function_is_set(parser: argparse.ArgumentParser) -> None:
    assert not [action.dest for action in parser._actions if not action.help]
    assert callable(parser.get_default("run"))


def test_a_misspelt_command_is_wrong_usage_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dmeo"]) == 2
    assert "Did you mean 'demo'?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["demo", "--no-such-flag"], ["evaluate"], ["recipe", "lst"], ["merge", "x"]])
def test_wrong_arguments_are_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("umed: ") and "--help" in error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UmedError("a.yaml: broken"), 1, "umed: a.yaml: broken\n"),
        (UsageError("--seed: no"), 2, "umed: --seed: no\n"),
        (KeyboardInterrupt(), 130, "umed: interrupted\n"),
    ],
)
def test_what_a_person_can_mend_has_no_traceback(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails_with(error, monkeypatch) == status
    assert capsys.readouterr().err == message


def test_a_bug_is_one_line_that_says_where_and_how_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    assert fails_with(KeyError("no\x1b[2J\nsecond"), monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("umed: unexpected error: KeyError: 'no\\x1b[2J\\nsecond' (")
    assert "test_cli.py, line " in error and "report it" in error and "UMED_TRACEBACK=1" in error


def test_a_bug_shows_its_traceback_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert fails_with(ZeroDivisionError("by\x1b[2Jzero"), monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)") and "ZeroDivisionError: by\\x1b[2Jzero" in error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/o\x1but.json"), "umed: /o\\x1but.json: No space left on device.\n"),
        (PermissionError(13, "Permission denied"), "umed: reading or writing: Permission denied.\n"),
        (RuntimeError("I/O error: x (os error 28)"), "umed: reading or writing: No space left on device.\n"),
        (
            UnicodeEncodeError("ascii", "a\u80ba", 1, 2, "x"),
            "umed: the locale of this process (ascii) has no character '\\u80ba', which a file name needs. Set another locale: "
            "export PYTHONUTF8=1\n",
        ),
        (MemoryError("8 GB"), "umed: there is not enough memory: 8 GB\n"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails_with(error, monkeypatch) == 1
    assert capsys.readouterr().err == message


def test_a_name_cannot_pretend_to_be_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails_with(UmedError("a\numed: all is well\x1b]0;owned\x07.png: no such image"), monkeypatch) == 1
    assert capsys.readouterr().err == "umed: a\n  umed: all is well\\x1b]0;owned\\x07.png: no such image\n"


def test_what_print_and_libraries_write_is_escaped_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        print("\x1b[31mred\x1b[0m \x9b2J \u202egnp.exe")
        print("\r 3/9 [00:01", end="", file=sys.stderr)
        return 0

    monkeypatch.setattr(cli, "add_commands", lambda parsers: parsers.add_parser("work").set_defaults(run=run))
    streams = sys.stdout, sys.stderr
    assert cli.main(["work"]) == 0
    assert (sys.stdout, sys.stderr) == streams
    shown = capsys.readouterr()
    assert shown.out == "red \\x9b2J \\u202egnp.exe\n" and shown.err == "\r 3/9 [00:01"


@pytest.mark.llava
def test_libraries_are_imported_in_silence() -> None:
    code = (
        "import sys; from umed_plugin import cli;"
        "run = lambda args: bool(__import__('bitsandbytes')) - 1;"
        "cli.add_commands = lambda parsers: parsers.add_parser('work').set_defaults(run=run);"
        "status = cli.main(['work']); import bitsandbytes;"
        "assert bitsandbytes.__spec__.loader.__class__.__name__ == 'SourceFileLoader'; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or "No module named 'bitsandbytes'" in done.stderr
    assert done.returncode or (done.stdout, done.stderr) == ("", "")


def test_what_a_library_logs_at_its_import_is_not_shown(tmp_path: Path) -> None:
    """On some processors bitsandbytes asks for a further package. Its later words are shown."""
    (tmp_path / "bitsandbytes.py").write_text(
        "import logging\nlogger = logging.getLogger('bitsandbytes.cpu')\nlogger.warning('at import')\n"
    )
    code = (
        "from umed_plugin.terminal.silent_imports import silent_imports\n"
        "with silent_imports():\n    import bitsandbytes\n"
        "bitsandbytes.logger.warning('later')"
    )
    places = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH"), os.getcwd()])])
    environment = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "later\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from umed_plugin import cli; cli.main([]);"
        "print(sorted({'torch', 'transformers', 'llava', 'monai', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("typed", ["--help", "recipe list", "recipe show demo_studies", "patches"])
def test_a_reader_that_has_seen_enough_is_no_error(typed: str) -> None:
    """Whether argparse, rich or print writes, and when Python writes what it has buffered."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "umed_plugin.cli", *typed.split()]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=buffered, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.READER_GONE, b"")


@pytest.mark.parametrize(
    ("typed", "status"), [("--help >&-", 0), ("recipe list >&-", 0), ("recipe list >&- 2>&-", 0), ("recpe 2>&-", 2)]
)
def test_a_stream_that_the_shell_has_closed_is_no_error(typed: str, status: int) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m umed_plugin.cli {typed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")
