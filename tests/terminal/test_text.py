"""Untrusted text: escaped where a terminal could obey it, and left alone where people read it."""

from __future__ import annotations

import io
import json

import pytest

from umed_plugin.terminal.console import console
from umed_plugin.terminal.text import of_library, one_line, printable, printable_json

HOSTILE = "no\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066\x7f\udcff\u2028.png"
SHOWN = "no\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202egnp\\u2066\\x7f\\udcff\\u2028.png"


def test_control_characters_are_escaped() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable(SHOWN) == SHOWN


@pytest.mark.parametrize(
    "text", ["plain", "肺部结节.png", "फेफड़े में गाँठ", "بزرگ\u200cشدن", "é\u0301 \U0001f600\ufe0f", "a\u3000b", "a\n\tb"]
)
def test_what_people_read_stays(text: str) -> None:
    assert printable(text) == text


def test_a_name_in_a_message_is_one_line() -> None:
    assert one_line("a\numed: done\tb\r") == "a\\numed: done\\tb\\r"


def test_json_stays_json() -> None:
    value = {"name": HOSTILE.replace("\udcff", ""), "肺": ["\x85"]}
    text = printable_json(value)
    assert json.loads(text) == value and "肺" in text and printable(text) == text


def test_a_librarys_bar_moves_and_cannot_overwrite_from_within() -> None:
    assert of_library("\r 3/9 [00:01") == "\r 3/9 [00:01"
    assert of_library("\x1b[93mWARNING\x1b[0m a\rb\x1b[2J") == "WARNING a\\rb\\x1b[2J"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_shows_names_as_they_are(terminal: bool) -> None:
    from rich.table import Table

    shown = console(file=io.StringIO(), force_terminal=terminal, width=200)
    table = Table(title="[b]titles")
    table.add_column(f"[b]{HOSTILE}")
    table.add_row(f"[/nonsense] {HOSTILE} :smile:")
    shown.print(f"[red]{HOSTILE}[/red]", style="bold")
    shown.print(table)
    text = shown.file.getvalue()
    assert text.count(SHOWN) == 3
    assert "[red]" in text and "[b]" in text and "[/nonsense]" in text and ":smile:" in text
    assert "\x1b]0" not in text and "\x07" not in text and "\u202e" not in text


def test_without_utf_8_other_letters_are_escaped() -> None:
    import subprocess
    import sys

    code = "from umed_plugin.terminal.console import guarded_streams\nwith guarded_streams(): print('\\u80ba \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
    )
    assert done.stdout == b"\\u80ba \\udcff\n", done.stderr
